"""Every way through the kernels, whichever the op would take; blocks, full width, poison, large offsets, refusals."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

import bap_kernels
from bap_kernels import _C, reference
from bap_kernels.testing import LAYOUTS, Case, Sample, assert_close, make_fused, make_tensors, poison, run, unlisted

FLAGS = ("in_scale", "in_shift", "in_relu", "out_scale", "out_shift", "residual", "out_relu")
BASE = Case(in_channels=20, out_channels=18, size=(5, 6))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def computed(sample: Sample, route: str | None = None, fused: dict | None = None, **options) -> Tensor:
    from bap_kernels.triton import ops
    from bap_kernels.triton.launch import Epilogue, Prologue

    fused = fused or {}
    last = sample.input.stride(1) == 1
    shape = list(sample.output_shape)
    if options.get("full_width"):
        shape[1] = sample.weight.shape[0]
    out = torch.full(shape, torch.nan, dtype=sample.input.dtype)
    out = out.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    ops.gathered_conv2d(
        *(out, sample.input, sample.weight, sample.in_index, sample.out_index),
        *(sample.stride, sample.padding, sample.dilation),
        prologue=Prologue(fused.get("in_scale"), fused.get("in_shift"), fused.get("in_relu", False)),
        epilogue=Epilogue(
            *(sample.bias, fused.get("out_scale"), fused.get("out_shift")),
            *(fused.get("residual"), fused.get("out_relu", False), fused.get("dual")),
        ),
        route=route,
        **options,
    )
    return out


def blocks_of(b: int, channels: int, seed: int = 0) -> Tensor:
    """Half of the aligned blocks, out of order."""
    count = channels // b
    chosen = random.Random(seed).sample(range(count), max(1, count // 2))
    return torch.tensor([b * c + d for c in chosen for d in range(b)], dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("route", ["direct", "packed"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "stepped"])
def test_routes_agree_with_the_reference(layout: str, route: str, dtype: torch.dtype) -> None:
    for kernel in ((1, 1), (3, 2)):
        case = BASE.but(layout=layout, kernel=kernel, dtype=dtype)
        sample = make_tensors(case)
        fused = make_fused(sample, FLAGS, torch.float32)
        expected = reference.gathered_conv2d_fused(*sample.args, **fused)
        assert_close(computed(sample, route, fused), expected, dtype, 4 * sample.depth + 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b", [8, 16, 32])
def test_blocks(b: int, dtype: torch.dtype) -> None:
    from bap_kernels.triton.lists import channel_list

    for kernel, stride in (((1, 1), (1, 1)), ((3, 2), (2, 1))):
        case = BASE.but(
            in_channels=4 * b, kernel=kernel, stride=stride, layout="channels_last", dtype=dtype, size=(4, 5)
        )
        sample = make_tensors(case)
        sample.in_index = blocks_of(b, 4 * b)
        assert channel_list(sample.in_index, 4 * b).kind in (b, 2 * b)
        fused = make_fused(sample, ("in_scale", "in_relu"), torch.float32)
        expected = reference.gathered_conv2d_fused(*sample.args, **fused)
        for route in ("direct", "packed"):
            assert_close(computed(sample, route, fused), expected, dtype, 4 * sample.depth + 4)


@pytest.mark.parametrize("b", [8, 16, 32])
def test_gradients_of_blocks(b: int) -> None:
    from bap_kernels.triton import ops

    sample = make_tensors(Case(in_channels=3 * b, out_channels=2 * b, size=(4, 5), layout="channels_last"))
    sample.in_index, sample.out_index = blocks_of(b, 3 * b), blocks_of(b, 2 * b, 1)
    grad = torch.randn(sample.output_shape).contiguous(memory_format=torch.channels_last)
    arguments = (*sample.args[:2], *sample.args[3:8])
    got = ops.gathered_conv2d_backward(grad, *arguments, (True, True, True))
    for one, other in zip(got, reference.gathered_conv2d_backward(grad, *arguments), strict=True):
        assert_close(one, other, torch.float32, grad.numel())


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_weight_gradient_from_where_the_input_lies(layout: str, direct: bool) -> None:
    from bap_kernels.triton import ops

    sample = make_tensors(BASE.but(layout=layout, padding=(1, 0, 2, 1), stride=(1, 2)))
    grad = torch.randn(sample.output_shape).contiguous(memory_format=torch.channels_last)
    x, geometry = ops.geometry_of(
        *(sample.input, sample.weight, grad.shape[2:], sample.stride, sample.padding, sample.dilation)
    )
    got = ops.gradient_of_weight(*(grad, x, sample.weight, geometry, sample.in_index, sample.out_index), direct=direct)
    expected = reference.gathered_conv2d_backward(grad, *sample.args[:2], *sample.args[3:])[1]
    assert_close(got, expected, torch.float32, grad.numel())


def test_chunks_of_pixels_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    from bap_kernels.triton import launch_backward, ops

    sample = make_tensors(BASE.but(batch=3, size=(11, 9)))
    grad = torch.randn(sample.output_shape)
    seen = []
    real = launch_backward.weight_gradient_partials
    monkeypatch.setattr(
        launch_backward, "weight_gradient_partials", lambda *a: seen.append(real(*a).fill_(torch.nan)) or seen[-1]
    )
    arguments = (*sample.args[:2], *sample.args[3:8])
    got = ops.gathered_conv2d_backward(grad, *arguments, (False, True, False))[1]
    assert seen[0].shape[0] > 1
    assert_close(got, reference.gathered_conv2d_backward(grad, *arguments)[1], torch.float32, grad.numel())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("b", [1, 8])
def test_full_width_leaves_other_channels_alone(layout: str, b: int) -> None:
    for kernel in ((1, 1), (3, 3)):
        sample = make_tensors(BASE.but(layout=layout, kernel=kernel, out_channels=32))
        sample.out_index = blocks_of(b, 32)
        out = computed(sample, full_width=True)
        others = unlisted(sample.out_index, 32)
        assert torch.isnan(out[:, others]).all()
        expected = reference.gathered_conv2d(*sample.args)
        assert_close(out[:, sample.out_index.long()], expected, torch.float32, sample.depth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("route", "layout"),
    [("planar", "contiguous"), *((route, layout) for route in ("direct", "packed") for layout in LAYOUTS[:2])],
)
def test_compact_copies_are_stored_by_the_kernels(route: str, layout: str, dtype: torch.dtype) -> None:
    from bap_kernels.triton.launch import DualStore

    for kernel in ((1, 1),) if route == "planar" else ((1, 1), (3, 2)):
        padding = (0,) * 4 if kernel == (1, 1) else (1, 1, 1, 0)
        sample = make_tensors(BASE.but(kernel=kernel, padding=padding, layout=layout, dtype=dtype, out_channels=35))
        sample.out_index = None
        fused = make_fused(sample, ("out_scale", "residual", "out_relu"), torch.float32)
        # Of the three tiles of 16 filters one has no copied filter, and one no other.
        copied = torch.tensor([*range(16, 32), 34, 33], dtype=torch.int32)
        N, _, oH, oW = sample.output_shape
        wide = torch.full((N, len(copied) + 3, oH, oW), torch.nan, dtype=dtype)
        if layout == "channels_last":
            wide = wide.contiguous(memory_format=torch.channels_last)
        copy = wide[:, : len(copied)]
        fused["dual"] = DualStore(copy, _C.inverse_list(copied, 35))
        out = computed(sample, route, fused)
        del fused["dual"]
        assert_close(out, reference.gathered_conv2d_fused(*sample.args, **fused), dtype, 4 * sample.depth + 4)
        assert torch.equal(copy, out[:, copied.long()])
        assert torch.isnan(wide[:, len(copied) :]).all()


def test_the_op_leaves_no_copy_to_be_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    from bap_kernels.triton import ops

    sample, index = make_tensors(BASE.but(layout="channels_last")), torch.tensor([2, 0], dtype=torch.int32)
    seen = []
    real = ops.gathered_conv2d
    monkeypatch.setattr(ops, "gathered_conv2d", lambda *a, **k: seen.append(k["epilogue"].dual) or real(*a, **k))
    with bap_kernels.use_backend("triton"):
        y, copy = torch.ops.bap_kernels._gathered_conv2d_fused(
            *sample.args, None, None, False, None, None, None, False, dual_store_index=index
        )
    assert [one.tensor.data_ptr() for one in seen] == [copy.data_ptr()]
    assert torch.equal(copy, y[:, [2, 0]])
    assert copy.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("route", ["direct", "packed", None])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_unlisted_channels_reach_nothing(layout: str, route: str | None, value: float, nan_filled_empty: None) -> None:
    from bap_kernels.triton import ops

    for kernel in ((1, 1), (3, 2)):
        case = BASE.but(layout=layout, kernel=kernel)
        clean, sample = make_tensors(case), poison(make_tensors(case), value)
        assert_close(computed(sample, route), reference.gathered_conv2d(*clean.args), case.dtype, sample.depth)
        grad = torch.randn(sample.output_shape)
        got = ops.gathered_conv2d_backward(grad, *sample.args[:2], *sample.args[3:8], (True, True, True))
        expected = reference.gathered_conv2d_backward(grad, *clean.args[:2], *clean.args[3:])
        for one, other in zip(got, expected, strict=True):
            assert_close(one, other, case.dtype, grad.numel())


def test_relus_pass_nan_on() -> None:
    sample = make_tensors(BASE.but(kernel=(1, 1), padding=(0, 0, 0, 0), in_list="null", out_list="null", bias=False))
    sample.input[0, 3, 2, 2] = torch.nan
    fused = make_fused(sample, ("in_relu", "out_relu"), torch.float32)
    for route in ("planar", "direct", "packed"):
        out = computed(sample, route, fused)
        assert torch.isnan(out[0, :, 2, 2]).all()
        assert torch.isfinite(out[1]).all()


# One step of an axis below 2**31 elements, two above it: a product of 32 bits would wrap.
FAR = 2**30 + 8


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_offsets_beyond_32_bits(axis: int) -> None:
    sizes = [2, 5, 2, 2]
    sizes[axis] = 3
    strides = [64, 12, 2, 1]
    strides[axis] = FAR
    # Memory that is never touched costs nothing.
    x = torch.empty(2 * FAR + 256, dtype=torch.float16).as_strided(sizes, strides)
    x.copy_(torch.randn(sizes))
    weight = torch.randn(4, sizes[1], 1, 1).half()
    index = torch.tensor([sizes[1] - 1, 0], dtype=torch.int32)
    sample = Sample(x, weight, None, index, None, (1, 1), (0, 0, 0, 0), (1, 1), 1)
    expected = reference.gathered_conv2d(*sample.args)
    for route in ("direct", "packed", *(["planar"] if axis < 2 else [])):
        assert_close(computed(sample, route), expected, torch.float16, sample.depth)


def test_gradients_beyond_32_bits() -> None:
    from bap_kernels.triton import ops

    x = torch.empty(2 * FAR + 256, dtype=torch.float16).as_strided((3, 4, 2, 2), (FAR, 4, 2, 1))
    x.copy_(torch.randn(x.shape))
    weight, grad = torch.randn(4, 4, 1, 1).half(), torch.randn(3, 4, 2, 2).half()
    arguments = (x, weight, None, None, (1, 1), (0, 0, 0, 0), (1, 1))
    got = ops.gathered_conv2d_backward(grad, *arguments, (True, True, True))
    for one, other in zip(got, reference.gathered_conv2d_backward(grad, *arguments), strict=True):
        assert_close(one, other, torch.float16, grad.numel())


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (BASE.but(dtype=torch.float64), "no Triton kernel for torch.float64"),
        (BASE.but(depthwise=True), "no Triton kernel for depthwise convolutions"),
        (BASE.but(kernel=(33, 1), padding=(16, 16, 0, 0)), "a kernel of more than 32 rows or columns"),
    ],
)
def test_refusals(case: Case, reason: str) -> None:
    with pytest.raises(NotImplementedError) as caught:
        run(make_tensors(case), "triton")
    line = str(caught.value).splitlines()[0]
    assert line.startswith(
        f"gathered_conv2d(): expected a call that backend `triton` can run, got one that it cannot: {reason}"
    )
    assert 'Hint: use_backend("auto")' in line


def test_packed_weights_are_kept_and_seen_to_change() -> None:
    def kept() -> tuple[int, int]:
        info = bap_kernels.packed_cache_info()
        return info["entries"], info["bytes"]

    bap_kernels.clear_packed_cache()
    sample = make_tensors(BASE)
    first = run(sample, "triton", cache_packed=True)
    before = kept()
    assert before[0] == 1
    hits = bap_kernels.packed_cache_info()["hits"]
    assert torch.equal(run(sample, "triton", cache_packed=True), first)
    assert bap_kernels.packed_cache_info()["hits"] == hits + 1
    sample.weight.mul_(2)
    assert_close(
        run(sample, "triton", cache_packed=True), reference.gathered_conv2d(*sample.args), torch.float32, sample.depth
    )
    assert kept() == before
    run(sample, "triton", cache_packed=False)
    assert kept() == before
    bap_kernels.clear_packed_cache()


def test_autograd_names_the_backend_in_the_backward_too() -> None:
    sample = make_tensors(BASE)
    sample.weight.requires_grad_()
    y = run(sample, "triton")
    with bap_kernels.use_backend("triton"):
        y.sum().backward()
    expected = reference.gathered_conv2d_backward(torch.ones(y.shape), *sample.args[:2], *sample.args[3:])[1]
    assert_close(sample.weight.grad, expected, torch.float32, 60)
