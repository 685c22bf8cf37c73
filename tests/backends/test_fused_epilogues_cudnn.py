"""ATen's way of the fused op on a GPU: one call of cuDNN, which a dispatch mode stands in for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bap_kernels import _C
from bap_kernels.testing import Sample, make_fused, make_tensors
from tests.backends.fused_calls import CASE, FREE, LAYOUTS, NORM, assert_right, run


@pytest.fixture(autouse=True)
def _empty_cache() -> Iterator[None]:
    _C.clear_packed_cache()
    yield
    _C.clear_packed_cache()


def on_meta(sample: Sample) -> Sample:
    """The sample without values, of tensors that own their memory."""
    there = dataclasses.replace(sample)
    for name in ("input", "weight", "bias", "in_index", "out_index"):
        tensor = getattr(there, name)
        if tensor is not None:
            setattr(there, name, torch.empty_like(tensor, device="meta"))
    return there


class FakeCudnn(TorchDispatchMode):
    """Sees the calls that ATen's way makes on a GPU, and computes those of cuDNN.

    Args:
        refuses: raises as cuDNN does where it has no engine.
    """

    def __init__(self, refuses: bool = False) -> None:
        super().__init__()
        self.refuses = refuses
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in FREE:
            self.calls.append(name)
        if not name.startswith("cudnn_convolution"):
            return func(*args, **(kwargs or {}))
        if self.refuses:
            raise RuntimeError("Unable to find an engine to execute this computation")
        z = None
        if name == "cudnn_convolution_relu":
            x, w, *options = args
        else:
            x, w, z, alpha, *options = args
            assert alpha == 1
        last = x.is_contiguous(memory_format=torch.channels_last)
        y = torch.conv2d(x, w, *options).contiguous(
            memory_format=torch.channels_last if last else torch.contiguous_format
        )
        return (y if z is None else y.add_(z)).relu_()


def gpu_calls(sample: Sample, fused: dict[str, Any], mode: FakeCudnn, **options: Any) -> list[str]:
    """The kernels of a call after the first."""
    with mode:
        run(sample, fused, on_gpu=True, **options)
        mode.calls.clear()
        run(sample, fused, on_gpu=True, **options)
    return mode.calls


# Folding a scale into float16 weights reads their values, which meta tensors do not have.
@pytest.mark.parametrize(
    ("dtype", "device"),
    [
        (torch.float32, "cpu"),
        (torch.float32, "meta"),
        (torch.float16, "cpu"),
        (torch.bfloat16, "cpu"),
        (torch.bfloat16, "meta"),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_call_of_cudnn_is_all(dtype: torch.dtype, layout: str, device: str) -> None:
    # Meta tensors have no values: what is kept is told by identity, as on a GPU.
    for bias in (False, True):
        sample = make_tensors(CASE.but(layout=layout, dtype=dtype, in_list="null", bias=bias))
        for flags in ((*NORM, "out_relu"), ("out_relu",), (*NORM, "residual", "out_relu"), ("residual", "out_relu")):
            fused = make_fused(sample, flags, torch.float32, layout)
            there = on_meta(sample) if device == "meta" else sample
            moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in fused.items()}
            name = "cudnn_convolution_add_relu" if "residual" in flags else "cudnn_convolution_relu"
            assert gpu_calls(there, moved, FakeCudnn()) == [name]
            if device == "cpu":
                with FakeCudnn():
                    assert_right(run(sample, fused, on_gpu=True), sample, fused)


def test_list_costs_one_selection_on_a_gpu() -> None:
    sample = make_tensors(CASE.but(layout="channels_last"))
    fused = make_fused(sample, (*NORM, "residual", "out_relu"), torch.float32, "channels_last")
    assert gpu_calls(sample, fused, FakeCudnn()) == ["index_select", "cudnn_convolution_add_relu"]
    masked = gpu_calls(sample, fused, FakeCudnn(), candidate="masked")
    assert masked[-1] == "cudnn_convolution_add_relu"
    assert not {"mul", "add", "add_", "relu", "relu_", "clone"} & set(masked)


@pytest.mark.parametrize(
    ("change", "flags", "after"),
    [
        ({}, (*NORM, "residual"), ["add"]),  # cuDNN's calls have a ReLU
        ({"dtype": torch.float64}, (*NORM, "out_relu"), ["relu_"]),
        ({"depthwise": True}, (*NORM, "out_relu"), ["relu_"]),
    ],
)
def test_what_cudnn_does_not_fuse_is_done_in_place(
    change: dict[str, Any], flags: tuple[str, ...], after: list[str]
) -> None:
    sample = make_tensors(CASE.but(in_list="null", out_list="null", **change))
    fused = make_fused(sample, flags, sample.input.dtype)
    assert gpu_calls(sample, fused, FakeCudnn()) == ["convolution", *after]


def test_residual_of_another_layout_is_added_in_place() -> None:
    sample = make_tensors(CASE.but(in_list="null", layout="channels_last"))
    fused = make_fused(sample, (*NORM, "residual", "out_relu"), torch.float32, "contiguous")
    assert gpu_calls(sample, fused, FakeCudnn())[0] == "convolution"


def test_deterministic_settings_keep_cudnns_fused_calls_out() -> None:
    sample = make_tensors(CASE.but(in_list="null"))
    fused = make_fused(sample, (*NORM, "out_relu"), torch.float32)
    before = torch.backends.cudnn.deterministic, torch.are_deterministic_algorithms_enabled()
    try:
        torch.backends.cudnn.deterministic = True
        assert gpu_calls(sample, fused, FakeCudnn()) == ["convolution", "relu_"]
        torch.backends.cudnn.deterministic = False
        torch.use_deterministic_algorithms(True)
        assert gpu_calls(sample, fused, FakeCudnn())[:2] == ["convolution", "relu_"]
    finally:
        torch.backends.cudnn.deterministic = before[0]
        torch.use_deterministic_algorithms(before[1])
    with torch.backends.cudnn.flags(enabled=False, deterministic=False):
        assert gpu_calls(sample, fused, FakeCudnn()) == ["convolution", "relu_"]


def test_case_that_cudnn_refuses_is_tried_once() -> None:
    sample = make_tensors(CASE.but(in_list="null", size=(9, 15)))
    fused = make_fused(sample, (*NORM, "out_relu"), torch.float32)
    mode = FakeCudnn(refuses=True)
    with mode:
        assert_right(run(sample, fused, on_gpu=True), sample, fused)
        assert "cudnn_convolution_relu" in mode.calls
    assert gpu_calls(sample, fused, mode) == ["convolution", "relu_"]


@pytest.mark.parametrize("name", ["out_scale", "out_shift", "bias", "weight"])
def test_changes_on_a_device_are_told_by_version_and_identity(name: str) -> None:
    sample = on_meta(make_tensors(CASE.but(in_list="null", out_list="null")))
    fused = {k: torch.empty(18, device="meta") for k in NORM} | {"out_relu": True}
    with FakeCudnn():
        run(sample, fused, on_gpu=True)
    given = fused | {"bias": sample.bias, "weight": sample.weight}

    def made() -> int:
        before = _C.packed_cache_info()["misses"]
        with FakeCudnn():
            run(sample, fused, on_gpu=True)
        return _C.packed_cache_info()["misses"] - before

    assert made() == 0
    given[name].mul_(2)
    assert made() > 0
    assert made() == 0
    # A step of an optimiser that counts no version.
    _C.drop_packed(given[name])
    assert made() > 0
    assert made() == 0
    other = torch.empty_like(given[name])
    if name in fused:
        fused[name] = other
    else:
        setattr(sample, name, other)
    assert made() > 0


def test_vectors_without_version_are_not_kept_on_a_device() -> None:
    sample = on_meta(make_tensors(CASE.but(in_list="null", out_list="null")))
    with torch.inference_mode():
        fused = {k: torch.empty(18, device="meta") for k in NORM} | {"out_relu": True}
    with FakeCudnn():
        run(sample, fused, on_gpu=True)
    assert _C.packed_cache_info()["entries"] == 0
