"""The choices of `auto`: one measurement for each case, every candidate right, bounded memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bap_kernels import _C, reference
from bap_kernels.testing import Case, assert_close, make_tensors, poison, run

CASE = Case(1, 40, 30, (12, 13), seed=3)


pytestmark = pytest.mark.usefixtures("own_choice_table")


def reread(path: Path) -> list[dict]:
    _C.set_choice_file("")
    _C.clear_choices()
    _C.set_choice_file(str(path))
    return _C.choices()


def test_each_case_is_measured_once() -> None:
    sample = make_tensors(CASE)
    run(sample)
    first = _C.choices()
    assert len(first) == 1
    for _ in range(5):
        run(sample)
    assert _C.choices() == first


def test_cases_are_distinguished() -> None:
    changes = (
        {"size": (12, 14)},
        {"stride": (2, 1)},
        {"kernel": (1, 1), "padding": (0, 0, 0, 0)},
        {"layout": "channels_last"},
        {"dtype": torch.bfloat16},
        {"in_list": "one"},
        {"batch": 2},
        {"dilation": (2, 2)},
    )
    run(make_tensors(CASE))
    for count, change in enumerate(changes, 2):
        run(make_tensors(CASE.but(**change)))
        assert len(_C.choices()) == count, change


def test_fixed_backends_and_trivial_cases_are_not_measured() -> None:
    run(make_tensors(CASE), "aten")
    run(make_tensors(CASE.but(batch=0)))
    run(make_tensors(CASE.but(in_list="zero")))
    run(make_tensors(CASE.but(out_list="zero")))
    assert _C.choices() == []


CANDIDATE_CASES = {
    "3x3": CASE,
    "1x1": CASE.but(kernel=(1, 1), padding=(0, 0, 0, 0)),
    "strided": CASE.but(stride=(2, 1), padding=(1, 0, 2, 1), kernel=(3, 2)),
    "dilated": CASE.but(dilation=(2, 3), padding=(2, 2, 3, 3)),
    "bfloat16": CASE.but(dtype=torch.bfloat16),
    "all_outputs": CASE.but(out_list="null", bias=False),
    "shuffled": CASE.but(in_list="shuffled", out_list="shuffled", batch=3),
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "sliced_last"])
@pytest.mark.parametrize("name", CANDIDATE_CASES)
def test_every_candidate_is_right(name: str, layout: str, tmp_path: Path) -> None:
    # Files that name each candidate as the fastest make `auto` use it.
    path, case = tmp_path / "choices.tsv", CANDIDATE_CASES[name].but(layout=layout)
    sample = make_tensors(case)
    expected = reference.gathered_conv2d(*sample.args)
    _C.set_choice_file(str(path))
    run(sample)
    candidates = list(_C.choices()[0]["candidates"])
    assert {"gather", "dense"} <= set(candidates)
    head, line = path.read_text().splitlines()
    machine, key, _, *rest = line.split("\t")
    for candidate in candidates:
        path.write_text("\n".join([head, "\t".join([machine, key, candidate, *rest]), ""]))
        assert [choice["backend"] for choice in reread(path)] == [candidate]
        assert_close(run(sample), expected, case.dtype, sample.depth)
        for value in (torch.nan, torch.inf):
            y = run(poison(make_tensors(case), value))
            assert_close(y, expected, case.dtype, sample.depth)
            assert y.is_contiguous(memory_format=torch.channels_last) == layout.endswith("last")
        listed = make_tensors(case)
        listed.input[:, int(sample.in_index[0])] = torch.nan
        assert run(listed)[:, :, 1:-1, 1:-1].isnan().all()
        assert [choice["backend"] for choice in _C.choices()] == [candidate]


def test_clear_choices_drops_choices() -> None:
    run(make_tensors(CASE))
    _C.clear_choices()
    assert _C.choices() == []


def test_results_do_not_change_with_the_choice() -> None:
    sample = make_tensors(CASE)
    expected = reference.gathered_conv2d(*sample.args)
    for _ in range(5):
        _C.clear_choices()
        for _ in range(2):
            assert_close(run(sample), expected, torch.float32, sample.depth)


def test_memory_of_many_cases_is_bounded() -> None:
    _C.set_choice_limit(6)
    try:
        for width in range(40, 50):
            run(make_tensors(CASE.but(size=(2, width), in_list="null")), "auto")
        kept = [choice["case"] for choice in _C.choices()]
        assert 3 <= len(kept) <= 6
        assert any(" 2x49 " in case for case in kept)
        # A case in constant use is kept.
        for width in range(50, 58):
            run(make_tensors(CASE.but(size=(2, width), in_list="null")), "auto")
            run(make_tensors(CASE.but(size=(2, 49), in_list="null")), "auto")
        assert any(" 2x49 " in choice["case"] for choice in _C.choices())
    finally:
        _C.set_choice_limit(1 << 14)
