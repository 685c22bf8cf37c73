"""What `auto` would choose on a GPU, followed on the CPU: candidates run as they are, and a clock that is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bap_kernels import _C, _dispatch, config, reference
from bap_kernels.testing import Case, Sample, assert_close, make_tensors, poison, run

CASE = Case(2, 20, 18, (6, 7), seed=1)
TIMES = {"gather": 3e-4, "gather_flat": 3e-4, "masked": 3e-4, "cuda": 3e-4, "triton": 3e-4}


@pytest.fixture(autouse=True)
def _own_table() -> Iterator[None]:
    _C.set_choice_file("")
    _C.clear_choices()
    yield
    _C.clear_choices()
    _C.set_choice_file(str(config.settings.choice_file or ""))


def clock(**times: float) -> Callable[[str], float]:
    return lambda route: (TIMES | times)[route]


def chosen(sample: Sample, seconds: Callable[[str], float], name: str = "H200", **options) -> str:
    route, y = _C.choose_as_on_gpu(*sample.args, name=name, seconds=seconds, **options)
    assert_close(y, reference.gathered_conv2d(*sample.args), sample.input.dtype, sample.depth)
    return route


def refusing(route: str) -> float:
    raise AssertionError(f"{route} was measured")


def candidates() -> set[str]:
    (choice,) = _C.choices()
    return set(choice["candidates"])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_candidates_of_a_case(layout: str) -> None:
    compact = {"gather", "gather_flat"} if layout == "channels_last" else {"gather"}
    chosen(make_tensors(CASE.but(layout=layout)), clock())
    assert candidates() == compact | {"masked"}
    _C.clear_choices()
    # Without a list nothing is left to weigh, and nothing is measured.
    for change in ({"in_list": "null"}, {"depthwise": True, "layout": "contiguous"}):
        assert chosen(make_tensors(CASE.but(layout=layout).but(**change)), refusing) == "gather"


@pytest.mark.parametrize("fastest", ["gather", "gather_flat", "masked"])
def test_the_fastest_is_taken_and_known_from_then_on(fastest: str) -> None:
    sample = make_tensors(CASE.but(layout="channels_last"))
    assert chosen(sample, clock(**{fastest: 1e-4})) == fastest
    assert chosen(sample, refusing) == fastest
    (choice,) = _C.choices()
    assert choice["backend"] == fastest
    assert choice["candidates"][fastest] == pytest.approx(100)
    assert choice["case"].endswith(" on H200")


def test_a_tie_within_noise_goes_to_the_first() -> None:
    sample = make_tensors(CASE)
    assert chosen(sample, clock(masked=0.98 * TIMES["gather"])) == "gather"
    assert chosen(sample, clock(masked=0.9 * TIMES["gather"]), "another") == "masked"


def test_each_gpu_and_the_cpu_have_choices_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "choices.tsv"
    _C.set_choice_file(str(path))
    sample = make_tensors(CASE)
    assert chosen(sample, clock(masked=1e-4), "A100") == "masked"
    assert chosen(sample, clock(gather=1e-4), "H200") == "gather"
    run(sample)
    assert len(_C.choices()) == 3
    assert chosen(sample, refusing, "A100") == "masked"
    # As another process finds them.
    _C.set_choice_file("")
    _C.clear_choices()
    _C.set_choice_file(str(path))
    assert chosen(sample, refusing, "A100") == "masked"
    assert chosen(sample, refusing, "H200") == "gather"
    run(sample)
    assert len(_C.choices()) == 3


def test_nothing_is_measured_while_a_stream_is_captured() -> None:
    sample = make_tensors(CASE)
    assert chosen(sample, refusing, capturing=True) == "gather"
    assert _C.choices() == []
    assert chosen(sample, clock(masked=1e-4)) == "masked"
    assert chosen(sample, refusing, capturing=True) == "masked"


def test_named_backends_are_weighed_only_where_shown_right() -> None:
    sample = make_tensors(CASE)
    chosen(sample, clock())
    assert not {"cuda", "triton"} & candidates()
    # Shown right, and not able to run here: not a candidate either.
    shown = [name for name in ("cuda", "triton") if _C.why_not(name) is not None]
    chosen(sample, clock(), "H200, shown", shown=shown)
    assert all(not {*shown} & set(choice["candidates"]) for choice in _C.choices())


def test_a_candidate_that_declines_the_call_is_left_out() -> None:
    # Backends that can run by their own account, and then refuse: one of them by name, the other when it is tried.
    sample = make_tensors(CASE.but(dtype=torch.float64))
    _C.set_why_not(lambda name: "")
    try:
        assert chosen(sample, clock(triton=1e-5, cuda=1e-5), shown=["triton", "cuda"]) == "gather"
    finally:
        _C.set_why_not(_dispatch._reason)
    assert candidates() == {"gather", "masked"}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_the_masked_route_keeps_unlisted_channels_out(layout: str, dtype: torch.dtype, value: float) -> None:
    for change in ({}, {"kernel": (1, 1), "padding": (0,) * 4}, {"padding": (2, 0, 1, 0), "stride": (2, 1)}):
        case = CASE.but(layout=layout, dtype=dtype, out_list="odd", **change)
        expected = reference.gathered_conv2d(*make_tensors(case).args)
        sample = poison(make_tensors(case), value)
        route, y = _C.choose_as_on_gpu(*sample.args, name="H200", seconds=clock(masked=1e-4))
        assert route == "masked"
        assert_close(y, expected, dtype, sample.depth)
