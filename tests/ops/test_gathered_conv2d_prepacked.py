"""The candidate with a weight reordered by oneDNN."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bap_kernels import _C, reference
from bap_kernels.testing import Case, Sample, assert_close, lay_out, make_fused, make_tensors, poison, run, unlisted

pytestmark = [
    pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN"),
    pytest.mark.usefixtures("own_choice_table"),
]

ROUTE = "gather_packed"
CASE = Case(1, 40, 30, (12, 13), seed=3)


@pytest.fixture(autouse=True)
def _no_packed_weights() -> Iterator[None]:
    _C.clear_packed_cache()
    yield
    _C.clear_packed_cache()


def candidates(sample: Sample, cache_packed: bool = True) -> set[str]:
    """Return the candidates that `auto` measures for a new case."""
    _C.set_choice_file("")
    _C.clear_choices()
    run(sample, cache_packed=cache_packed)
    return {name for choice in _C.choices() for name in choice["candidates"]}


def force(path: Path, route: str = ROUTE) -> None:
    """Load a choice file in which this candidate is the fastest in every known case."""
    keys = [choice["case"] for choice in _C.choices()]
    path.unlink(missing_ok=True)
    _C.clear_choices()
    _C.set_choice_file(str(path))
    run(make_tensors(Case(1, 9, 9, (5, 5))))
    head, line = path.read_text().splitlines()
    machine, _, _, times, counts, when = line.split("\t")
    times += f"{route}=1 " if f"{route}=" not in times else ""
    # A case with a candidate that the file knows no time of would be measured anew.
    others = ("native", "gather", "gather_flat", ROUTE, "dense")
    times += "".join(f"{name}=1000000 " for name in others if f" {name}=" not in f" {times}")
    path.write_text(head + "\n" + "".join("\t".join([machine, key, route, times, counts, when]) + "\n" for key in keys))
    _C.set_choice_file("")
    _C.clear_choices()
    _C.set_choice_file(str(path))
    assert {choice["backend"] for choice in _C.choices()} == {route}


CASES = {
    "3x3": CASE,
    "1x1": CASE.but(kernel=(1, 1), padding=(0, 0, 0, 0)),
    "first_layer": CASE.but(in_channels=3, out_channels=24, kernel=(7, 7), stride=(2, 2), padding=(3, 3, 3, 3)),
    "one_channel": CASE.but(in_list="one", out_list="one"),
    "strided": CASE.but(kernel=(3, 2), stride=(2, 1), padding=(1, 1, 0, 0)),
    "uneven_padding": CASE.but(kernel=(3, 2), padding=(1, 0, 2, 1)),
    "dilated": CASE.but(dilation=(2, 3), padding=(2, 2, 3, 3)),
    "many_images": CASE.but(batch=33, size=(5, 6)),
    "one_pixel": CASE.but(batch=2, size=(1, 1)),
    "shuffled": CASE.but(in_list="shuffled", out_list="shuffled", batch=3),
    "all_inputs": CASE.but(in_list="null"),
    "no_list": CASE.but(in_list="null", out_list="null", bias=False),
    "depthwise": CASE.but(depthwise=True),
    "depthwise_strided": CASE.but(depthwise=True, kernel=(3, 2), stride=(2, 1), padding=(1, 0, 2, 1)),
    "weight_last": CASE.but(weight_layout="channels_last"),
    "weight_sliced": CASE.but(weight_layout="sliced", in_list="null", out_list="null"),
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "sliced_last", "stepped"])
@pytest.mark.parametrize("name", CASES)
def test_prepacked_is_right_when_forced(name: str, layout: str, tmp_path: Path) -> None:
    case = CASES[name].but(layout=layout)
    sample = make_tensors(case)
    # A view counts as shared memory, and this one is too scattered to be compared.
    sample.weight = sample.weight.data
    expected = reference.gathered_conv2d(*sample.args)
    assert ROUTE in candidates(sample)
    force(tmp_path / "choices.tsv")
    _C.clear_packed_cache()
    hits = _C.packed_cache_info()["hits"]
    for _ in range(2):
        y = run(sample, cache_packed=True)
        assert_close(y, expected, case.dtype, sample.depth)
        if layout != "stepped" and case.size != (1, 1):
            last = layout.endswith("last")
            assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    # Only its packed weight was used, with a hit.
    assert _C.packed_cache_info()["hits"] == hits + 1
    assert [choice["backend"] for choice in _C.choices()] == [ROUTE]
    if len(unlisted(sample.in_index, case.in_channels)):
        for value in (torch.nan, torch.inf):
            poisoned = poison(make_tensors(case), value)
            assert_close(run(poisoned, cache_packed=True), expected, case.dtype, sample.depth)
    sample.input[:, 0 if sample.in_index is None else int(sample.in_index[0])] = torch.nan
    assert run(sample, cache_packed=True).isnan().any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_prepacked_fused_is_right(layout: str, tmp_path: Path) -> None:
    flags = ("in_scale", "in_shift", "in_relu", "out_scale", "out_shift", "residual", "out_relu")
    sample = make_tensors(CASE.but(layout=layout))
    fused = make_fused(sample, flags, CASE.dtype)
    op = torch.ops.bap_kernels._gathered_conv2d_fused
    op(*sample.args, **fused, cache_packed=True)
    assert ROUTE in _C.choices()[0]["candidates"]
    force(tmp_path / "choices.tsv")
    y, _ = op(*sample.args, **fused, cache_packed=True)
    assert [choice["backend"] for choice in _C.choices()] == [ROUTE]
    assert_close(y, reference.gathered_conv2d_fused(*sample.args, **fused), CASE.dtype, 4 * sample.depth + 4)


def test_prepacked_supports_strided_bias(tmp_path: Path) -> None:
    sample = make_tensors(CASE.but(out_list="null"))
    sample.bias = torch.randn(2 * len(sample.bias))[::2]
    assert ROUTE in candidates(sample)
    force(tmp_path / "choices.tsv")
    y = run(sample, cache_packed=True)
    assert_close(y, reference.gathered_conv2d(*sample.args), CASE.dtype, sample.depth)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_prepacked_bfloat16_is_right(layout: str, tmp_path: Path) -> None:
    sample = make_tensors(CASE.but(dtype=torch.bfloat16, layout=layout))
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert (ROUTE in candidates(sample)) == supported
    if not supported:
        pytest.skip("no bfloat16 convolution in oneDNN on this machine")
    force(tmp_path / "choices.tsv")
    y = run(sample, cache_packed=True)
    assert_close(y, reference.gathered_conv2d(*sample.args), torch.bfloat16, sample.depth)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_prepacked_is_no_candidate_for_other_dtypes(dtype: torch.dtype) -> None:
    sample = make_tensors(CASE.but(dtype=dtype))
    assert ROUTE not in candidates(sample)
    y = run(sample, cache_packed=True)
    assert_close(y, reference.gathered_conv2d(*sample.args), dtype, sample.depth)


def test_prepacked_is_no_candidate_without_caching() -> None:
    assert ROUTE not in candidates(make_tensors(CASE), cache_packed=False)
    # Another tensor may write to the slice, which is too scattered to be compared.
    assert ROUTE not in candidates(make_tensors(CASE.but(weight_layout="sliced")))


def test_prepacked_weight_in_inference_mode_is_compared_by_value(tmp_path: Path) -> None:
    with torch.inference_mode():
        sample = make_tensors(CASE)
        assert ROUTE in candidates(sample)
        force(tmp_path / "choices.tsv")
        for _ in range(3):
            y = run(sample, cache_packed=True)
            assert_close(y, reference.gathered_conv2d(*sample.args), CASE.dtype, sample.depth)
            sample.weight[-1, -1].add_(1)


def test_disabled_onednn_is_another_case(tmp_path: Path) -> None:
    sample = make_tensors(CASE)
    expected = reference.gathered_conv2d(*sample.args)
    assert ROUTE in candidates(sample)
    force(tmp_path / "choices.tsv")
    with torch.backends.mkldnn.flags(enabled=False):
        assert_close(run(sample, cache_packed=True), expected, CASE.dtype, sample.depth)
        measured = [choice for choice in _C.choices() if "no-onednn" in choice["case"]]
        assert len(measured) == 1
        assert ROUTE not in measured[0]["candidates"]
    assert_close(run(sample, cache_packed=True), expected, CASE.dtype, sample.depth)
    assert len(_C.choices()) == 2


def test_prepacked_accepts_empty_batch() -> None:
    sample = make_tensors(CASE.but(batch=0))
    assert run(sample, cache_packed=True).shape == sample.output_shape
    assert _C.choices() == []


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_prepacked_follows_weight_changes(layout: str, tmp_path: Path) -> None:
    sample = make_tensors(CASE.but(layout=layout))
    assert ROUTE in candidates(sample)
    force(tmp_path / "choices.tsv")

    def assert_right() -> None:
        y = run(sample, cache_packed=True)
        assert_close(y, reference.gathered_conv2d(*sample.args), CASE.dtype, sample.depth)

    assert_right()
    sample.weight.mul_(2).add_(1)
    assert_right()
    sample.weight.data = torch.randn_like(sample.weight)
    assert_right()
    sample.in_index.copy_(torch.arange(len(sample.in_index), dtype=torch.int32))
    assert_right()
    assert [choice["backend"] for choice in _C.choices()] == [ROUTE]


def test_prepacked_weight_is_kept_for_several_shapes(tmp_path: Path) -> None:
    samples = []
    for size in ((12, 13), (9, 20), (12, 14)):
        sample = make_tensors(CASE)
        sample.input = lay_out(torch.randn(2, 40, *size), "channels_last")
        samples.append(sample)
    for sample in samples:
        sample.weight, sample.in_index = samples[0].weight, samples[0].in_index
        run(sample, cache_packed=True)
    force(tmp_path / "choices.tsv")
    for sample in (*samples, *samples):
        y = run(sample, cache_packed=True)
        assert_close(y, reference.gathered_conv2d(*sample.args), CASE.dtype, sample.depth)


def test_prepacked_bytes_are_counted_and_freed(tmp_path: Path) -> None:
    sample = make_tensors(CASE)
    sample.weight = torch.nn.Parameter(sample.weight)
    with torch.no_grad():
        assert ROUTE in candidates(sample)
        force(tmp_path / "choices.tsv")
        _C.clear_packed_cache()
        run(sample, cache_packed=True)
    k_in, k_out = sample.kept
    info = _C.packed_cache_info()
    assert info["entries"] == 1
    assert info["bytes"] >= 4 * k_in * k_out * 9
    sample.weight = None
    gc.collect()
    assert _C.packed_cache_info()["entries"] == 0


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("route", ["native", "gather", "gather_packed", "dense"])
def test_packed_weights_do_not_keep_parameters_alive(route: str, layout: str, tmp_path: Path) -> None:
    # A packed weight with a graph would keep its parameter alive.
    sample = make_tensors(CASE.but(layout=layout))
    if route not in candidates(sample):
        pytest.skip(f"{route} cannot run here")
    force(tmp_path / "choices.tsv", route)
    _C.clear_packed_cache()
    sample.weight = torch.nn.Parameter(sample.weight)
    with torch.no_grad():
        run(sample, cache_packed=True)
    assert _C.packed_cache_info()["entries"] == 1
    del sample
    gc.collect()
    assert _C.packed_cache_info()["entries"] == 0


def test_slower_candidates_leave_no_packed_weights() -> None:
    sample = make_tensors(CASE)
    assert len(candidates(sample)) > 1
    assert _C.packed_cache_info()["entries"] == 1


def test_many_input_sizes_share_few_weight_orders(tmp_path: Path) -> None:
    sample, sizes = make_tensors(CASE), [(h, w) for h in range(5, 11) for w in range(5, 11)]

    def run_all() -> None:
        for size in sizes:
            sample.input = torch.randn(1, 40, *size)
            y = run(sample, cache_packed=True)
            assert_close(y, reference.conv_on_selected(*sample.args), CASE.dtype, sample.depth)

    for size in sizes:
        sample.input = torch.randn(1, 40, *size)
        run(sample, cache_packed=True)
    force(tmp_path / "choices.tsv")
    _C.clear_packed_cache()
    run_all()
    assert {choice["backend"] for choice in _C.choices()} == {ROUTE}
    assert 1 <= _C.packed_cache_info()["entries"] <= 4
    misses = _C.packed_cache_info()["misses"]
    run_all()
    assert _C.packed_cache_info()["misses"] == misses
