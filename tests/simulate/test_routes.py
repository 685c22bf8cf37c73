"""Which route a call takes, what it refuses, and that the simulation itself can fail."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import bap_kernels
from bap_kernels import _C
from bap_kernels.testing import Case, make_tensors, run

BASE = Case(in_channels=64, out_channels=32, size=(8, 8), in_list="null", out_list="null", dtype=torch.bfloat16)
POINTWISE = BASE.but(kernel=(1, 1), padding=(0, 0, 0, 0))
CONV, PACK, WEIGHT = "_gathered_conv2d_cuda", "_channel_pack_cuda", "_weight_gradient_cuda"
UNPACK = "_channel_unpack_cuda"


def private_ops(case: Case, channels: list[int] | None = None, backward: bool = False) -> list[str]:
    """The backend's launches, in order."""
    sample = make_tensors(case)
    if channels is not None:
        sample.in_index = torch.tensor(channels, dtype=torch.int32)
    if backward:
        sample.input.requires_grad_()
        sample.weight.requires_grad_()
    with bap_kernels.use_backend("cuda"):
        y = torch.ops.bap_kernels.gathered_conv2d(*sample.args)
        grad = torch.ones_like(y)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            if backward:
                y.backward(grad)
            else:
                torch.ops.bap_kernels.gathered_conv2d(*sample.args)
    names = [event.name.removeprefix("bap_kernels::") for event in profiler.events()]
    return [name for name in names if name in (CONV, PACK, UNPACK, WEIGHT)]


RANDOM = [1, 2, 5, 7, 20, 33]
BLOCKS = [c for c in range(64) if c // 8 % 2]


def test_routes() -> None:
    last = {"layout": "channels_last"}
    assert private_ops(POINTWISE, RANDOM) == [CONV]  # planes: any list
    assert private_ops(POINTWISE.but(stride=(2, 2)), RANDOM) == [PACK, CONV, UNPACK]
    assert private_ops(POINTWISE.but(size=(7, 7)), RANDOM) == [PACK, CONV, UNPACK]  # planes of 98 bytes
    assert private_ops(BASE.but(**last)) == [CONV]
    assert private_ops(BASE.but(**last), BLOCKS) == [CONV]
    # Several taps: one halo in place of a copy; see test_halo.py for what it declines.
    assert private_ops(BASE, RANDOM) == [CONV]
    assert private_ops(BASE.but(**last), RANDOM) == [CONV]
    assert private_ops(BASE.but(layout="sliced_last")) == [CONV]
    assert private_ops(BASE.but(in_channels=3, **last)) == [CONV]
    wide = BASE.but(out_channels=136)
    assert private_ops(wide, RANDOM) == [CONV]
    assert private_ops(wide.but(**last), RANDOM) == [PACK, CONV]
    assert private_ops(wide.but(layout="sliced_last")) == [PACK, CONV]


def test_routes_of_the_gradients() -> None:
    assert private_ops(BASE.but(layout="channels_last"), BLOCKS, backward=True) == [CONV, WEIGHT]
    assert private_ops(BASE.but(layout="channels_last"), RANDOM, backward=True) == [CONV, PACK, WEIGHT]
    # Planes go back through planes; the sums over pixels want channels side by side.
    assert sorted(private_ops(POINTWISE, RANDOM, backward=True)) == sorted([CONV, PACK, PACK, WEIGHT])


def test_refusals() -> None:
    double = make_tensors(BASE.but(dtype=torch.float64))
    with pytest.raises(NotImplementedError, match=r"backend `cuda` can run, got .* no CUDA kernel for Double"):
        run(double, "cuda")
    depthwise = make_tensors(BASE.but(depthwise=True))
    with pytest.raises(NotImplementedError, match="no CUDA kernel for depthwise convolutions"):
        run(depthwise, "cuda")
    many = torch.zeros(65536, 1, 1, 1)
    with (
        pytest.raises(NotImplementedError, match="a batch of more than 65535 images"),
        bap_kernels.use_backend("cuda"),
    ):
        bap_kernels.gathered_conv2d(many, torch.zeros(1, 1, 1, 1))
    huge = torch.zeros(1, 1, 1, 1).expand(1, 1, 2**15, 2**15)
    with pytest.raises(NotImplementedError, match="beyond 32-bit"), bap_kernels.use_backend("cuda"):
        bap_kernels.gathered_conv2d(huge, torch.zeros(1, 1, 1, 1), stride=2**14)


def test_the_backend_can_run_and_is_never_chosen() -> None:
    assert _C.unsupported_reason("cuda") is None
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run(make_tensors(BASE), "auto")
    assert CONV not in {event.name.removeprefix("bap_kernels::") for event in profiler.events()}


def test_private_ops_check_their_options() -> None:
    ops = torch.ops.bap_kernels
    x = torch.zeros(1, 2, 4, 16, dtype=torch.float32).permute(0, 3, 1, 2)
    w = torch.zeros(16, 1, 16)
    with pytest.raises(RuntimeError, match=r"_gathered_conv2d_cuda\(\): expected 21 options, got 1"):
        ops._gathered_conv2d_cuda(x.clone(), x, [w], [w], [0, 15, 0, 1], *[None] * 13, [1])
    with pytest.raises(RuntimeError, match=r"_channel_pack_cuda\(\): expected 1 options, got 0"):
        ops._channel_pack_cuda(x, x, [w], [0, 15, 0, 1], None, None, None, [])
    with pytest.raises(RuntimeError, match=r"_weight_gradient_cuda\(\): expected 18 options, got 2"):
        ops._weight_gradient_cuda(x, x, x, None, None, None, None, [0, 1])
    options = [2, 2, 1, 1, 0, 1, 4, 4, 1, 1, 0, 1, 0, 16, *[0] * 7]
    with pytest.raises(RuntimeError, match="expected a source with aligned chunks"):
        ops._gathered_conv2d_cuda(x.clone(), x[:, 1:], [w], [w], [0, 15, 0, 1], *[None] * 13, options)
    with pytest.raises(RuntimeError, match="expected 1 to 16 runs of 4 integers, got 1 lists and 3 integers"):
        ops._gathered_conv2d_cuda(x.clone(), x, [w], [w], [0, 15, 0], *[None] * 13, options)
    with pytest.raises(RuntimeError, match="expected a convolution whose halo fits into shared memory"):
        ops._gathered_conv2d_cuda(
            x.clone(), x, [w], [w], [0, 15, 0, 1], *[None] * 13, [*options[:14], 2, *options[15:]]
        )
