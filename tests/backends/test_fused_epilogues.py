"""ATen's way of the fused op: one call where a library has one, the scales in the packed weight, no needless pass."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bap_kernels as bk
from bap_kernels import _C
from bap_kernels.testing import assert_close, make_fused, make_tensors, poison
from tests.backends.fused_calls import CASE, FREE, LAYOUTS, NORM, assert_right, expected, run

ONEDNN = "mkldnn::_convolution_pointwise"

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not torch._C._jit_get_schemas_for_operator(ONEDNN),
    reason="this PyTorch has no fused convolution of oneDNN",
)


@pytest.fixture(autouse=True)
def _empty_cache() -> Iterator[None]:
    _C.clear_packed_cache()
    yield
    _C.clear_packed_cache()


def packs(dtype: torch.dtype) -> bool:
    """Whether there is the candidate with a weight in oneDNN's order."""
    try:
        bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):
        return False
    return dtype == torch.float32 or bf16


def passes(call: Callable[[], Any], warm: bool = True) -> list[str]:
    """The operators that a call spends a pass over memory on, the second time."""
    if warm:
        call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    names = []
    for event in profile.events():
        top = event.cpu_parent is None or event.cpu_parent.name.split("::")[0] not in ("aten", "mkldnn")
        if top and event.name.split("::")[0] in ("aten", "mkldnn") and event.name.split("::")[1] not in FREE:
            names.append(event.name)
    return names


class Block(nn.Module):
    """A residual block as planned: conv+norm+relu, then conv+norm+add+relu."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        for norm in (self.norm1, self.norm2):
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.normal_(norm.running_mean)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + x)


@needs_onednn
@pytest.mark.parametrize("layout", LAYOUTS)
def test_planned_layers_take_one_pass_each(layout: str) -> None:
    block = Block().eval()
    x = torch.randn(4, 32, 16, 16).contiguous(memory_format=getattr(torch, f"{layout}_format", torch.channels_last))
    with bk.use_backend("aten"), torch.no_grad():
        planned = bk.plan(bk.swap_(block), x)
        found = passes(lambda: planned(x))
        torch.testing.assert_close(planned(x), block(x), rtol=1e-4, atol=1e-4)
    # In NCHW PyTorch's call of oneDNN can't add: that is a pass, the ReLU in it.
    second = [ONEDNN] if layout == "channels_last" else ["aten::convolution", "aten::_add_relu"]
    assert found == [ONEDNN, *second]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("flags", [NORM, (*NORM, "out_relu"), (*NORM, "residual"), (*NORM, "residual", "out_relu")])
def test_without_onednn_only_the_residual_and_the_relu_are_passes(flags: tuple[str, ...], layout: str) -> None:
    for dtype in (torch.float64, torch.float32):
        sample = make_tensors(CASE.but(layout=layout, in_list="null", out_list="null", dtype=dtype))
        fused = make_fused(sample, flags, dtype, layout)
        with torch.backends.mkldnn.flags(enabled=False):
            found = passes(lambda sample=sample, fused=fused: run(sample, fused))
            assert_right(run(sample, fused), sample, fused)
        after = {(): [], ("out_relu",): ["relu_"], ("residual",): ["add"], ("residual", "out_relu"): ["_add_relu"]}
        assert found == ["aten::convolution", *(f"aten::{name}" for name in after[flags[2:]])]


def test_unkept_weights_leave_the_scale_to_one_pass() -> None:
    sample = make_tensors(CASE.but(in_list="null", out_list="null"))
    fused = make_fused(sample, (*NORM, "residual", "out_relu"), torch.float32)
    found = passes(lambda: run(sample, fused, cache_packed=False))
    assert found == ["aten::convolution", "aten::addcmul", "aten::add_", "aten::relu_"]
    assert_right(run(sample, fused, cache_packed=False), sample, fused)


@pytest.mark.parametrize("candidate", ["gather", "gather_flat", "gather_packed", "dense", "masked"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_candidate_folds(dtype: torch.dtype, layout: str, candidate: str) -> None:
    sample = make_tensors(CASE.but(layout=layout, dtype=dtype))
    if candidate == "gather_packed" and not packs(dtype):
        pytest.skip(f"this torch does not prepack weights of {dtype}: no oneDNN for it")
    for flags in (
        (*NORM, "out_relu"),
        (*NORM, "residual", "out_relu"),
        NORM,
        ("out_scale", "residual"),
        ("out_shift",),
    ):
        for residual in ("contiguous", "channels_last", "sliced"):
            fused = make_fused(sample, flags, torch.float32, residual)
            for _ in range(2):
                y = run(sample, fused, candidate)
                assert_right(y, sample, fused)
                assert y.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")


@pytest.mark.parametrize("candidate", ["gather", "dense"])
def test_unlisted_nan_does_not_hide_behind_a_relu(candidate: str) -> None:
    sample = make_tensors(CASE.but(layout="channels_last"))
    fused = make_fused(sample, (*NORM, "out_relu"), torch.float32)
    exact = expected(sample, fused)
    poison(sample)
    assert_close(run(sample, fused, candidate), exact, torch.float32, 4 * sample.depth)


@needs_onednn
def test_scale_of_the_input_is_folded_where_nothing_stands_between() -> None:
    for depthwise in (False, True):
        sample = make_tensors(CASE.but(in_list="null", out_list="null", depthwise=depthwise))
        for flags, folds in (
            (("in_scale",), True),
            (("in_scale", "in_relu"), False),
            (("in_scale", "in_shift"), False),
        ):
            fused = make_fused(sample, (*flags, "out_scale", "out_relu"), torch.float32)
            found = passes(lambda sample=sample, fused=fused: run(sample, fused))
            assert (found == [ONEDNN]) == folds, found
            assert_right(run(sample, fused), sample, fused)


@needs_onednn
@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_relu6_is_fused(layout: str, depthwise: bool) -> None:
    sample = make_tensors(CASE.but(in_list="null", out_list="null", depthwise=depthwise, layout=layout))
    fused = make_fused(sample, (*NORM, "out_max"), torch.float32)
    assert passes(lambda: run(sample, fused)) == [ONEDNN]
    assert_right(run(sample, fused), sample, fused)
    packed = passes(lambda: run(sample, fused, "gather_packed"))
    assert [name for name in packed if name != "aten::copy_"] == [ONEDNN]
    assert_right(run(sample, fused, "gather_packed"), sample, fused)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_relu6_behind_a_residual_is_right(layout: str) -> None:
    sample = make_tensors(CASE.but(layout=layout))
    fused = make_fused(sample, (*NORM, "residual", "out_max"), torch.float32, layout)
    for candidate in ("gather", "gather_packed", "dense"):
        assert_right(run(sample, fused, candidate), sample, fused)


def test_prologue_of_a_gathered_input_is_in_place() -> None:
    sample = make_tensors(CASE)
    fused = make_fused(sample, ("in_scale", "in_shift", "in_relu"), torch.float32)
    before = sample.input.clone()
    found = passes(lambda: run(sample, fused))
    # The bias is listed, too.
    assert sorted(found) == sorted(["aten::index_select"] * 2 + ["aten::addcmul", "aten::relu_", "aten::convolution"])
    for in_list in ("odd", "null"):
        sample = make_tensors(CASE.but(in_list=in_list))
        fused = make_fused(sample, ("in_scale", "in_shift", "in_relu"), torch.float32)
        assert_right(run(sample, fused), sample, fused)
        assert torch.equal(sample.input, before), "the input was written to"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residuals_of_depthwise_convolutions_are_right(dtype: torch.dtype) -> None:
    # PyTorch's call of oneDNN adds with groups in a pass of its own, which raises for bfloat16.
    sample = make_tensors(CASE.but(dtype=dtype, depthwise=True, layout="channels_last"))
    for flags in (("residual", "out_relu"), (*NORM, "residual", "out_relu"), ("residual",)):
        fused = make_fused(sample, flags, torch.float32, "channels_last")
        for candidate in ("gather", *(("gather_packed",) if packs(dtype) else ())):
            assert_right(run(sample, fused, candidate), sample, fused)


def test_residual_is_not_written_to() -> None:
    for layout in LAYOUTS:
        for flags in (("residual", "out_relu"), ("residual",), (*NORM, "residual", "out_relu")):
            sample = make_tensors(CASE.but(layout=layout))
            fused = make_fused(sample, flags, torch.float32, layout)
            before = fused["residual"].clone()
            for candidate in ("gather", "dense", *(("gather_packed",) if packs(torch.float32) else ())):
                for kept in (False, True):
                    if kept or candidate != "gather_packed":
                        run(sample, fused, candidate, cache_packed=kept)
            assert torch.equal(fused["residual"], before)


# Each function writes other numbers into a vector; not all of them count a version.
def in_place(vector: Tensor) -> None:
    vector.mul_(-3)


def through_numpy(vector: Tensor) -> None:
    vector.detach().numpy()[:] *= -3


def last_value(vector: Tensor) -> None:
    vector.data[-1:] += 5


# `dense` takes no scale of its input: `auto` never offers it such a call.
@pytest.mark.parametrize(
    ("name", "candidate"),
    [
        (name, candidate)
        for name in ("out_scale", "out_shift", "bias", "in_scale", "weight")
        for candidate in ("gather", "gather_packed", "dense")
        if (name, candidate) != ("in_scale", "dense")
    ],
)
@pytest.mark.parametrize("write", [in_place, through_numpy, last_value])
def test_each_change_of_a_folded_vector_is_used(name: str, write: Callable[[Tensor], None], candidate: str) -> None:
    sample = make_tensors(CASE.but(out_list="null", layout="channels_last"))
    flags = (*NORM, "out_relu", *(("in_scale",) if name == "in_scale" else ()))
    if candidate == "gather_packed" and not packs(torch.float32):
        pytest.skip("this torch does not prepack weights: no oneDNN")
    fused = make_fused(sample, flags, torch.float32)
    for _ in range(3):
        for _ in range(2):
            assert_right(run(sample, fused, candidate), sample, fused)
        if name == "weight":
            sample.weight.mul_(-3)
        else:
            write(fused.get(name, sample.bias))


def test_one_weight_may_have_several_norms() -> None:
    # As heads that several levels share: each has an entry of its own, and none is made twice.
    sample = make_tensors(CASE)
    norms = [make_fused(sample, (*NORM, "out_relu"), torch.float32, seed=seed) for seed in range(3)]
    for fused in norms:
        run(sample, fused)
    misses = _C.packed_cache_info()["misses"]
    for fused in norms * 2:
        assert_right(run(sample, fused), sample, fused)
    assert _C.packed_cache_info()["misses"] == misses


def test_entries_of_dropped_vectors_go() -> None:
    sample = make_tensors(CASE)
    for seed in range(40):
        run(sample, make_fused(sample, NORM, torch.float32, seed=seed))
    gc.collect()
    assert _C.packed_cache_info()["entries"] == 0
    assert _C.packed_cache_info()["bytes"] == 0


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_float16_weights_are_not_folded_where_they_would_not_hold_the_product(scale: float) -> None:
    sample = make_tensors(CASE.but(dtype=torch.float16, bias=False))
    fused = make_fused(sample, ("out_scale",), torch.float32)
    sample.weight /= 8
    fused["out_scale"] = torch.full_like(fused["out_scale"], scale)
    sample.input *= 1e-3 / min(scale, 1) if scale < 1 else 1e-4
    y = run(sample, fused)
    exact = expected(sample, fused)
    assert exact.abs().max() > 0.1 * min(1, scale * 100)
    torch.testing.assert_close(y.double(), exact, rtol=1e-2, atol=1e-2 * exact.abs().max().item())


def test_unknown_candidate_raises() -> None:
    sample = make_tensors(CASE)
    with pytest.raises(ValueError, match=r"run_aten\(\): expected `candidate` to be one of ATen's, got native"):
        run(sample, {}, "native")
