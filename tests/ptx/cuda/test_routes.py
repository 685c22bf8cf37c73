"""Which route a call takes, what it refuses, and which library it takes."""

from __future__ import annotations

import pytest
import torch

import bap_kernels
from bap_kernels import _C
from bap_kernels.testing import Case, make_tensors, run
from tests.ptx.cuda.device import CONV, PACK, UNPACK, WEIGHT, kernels, launches, library

BASE = Case(in_channels=64, out_channels=32, size=(8, 8), in_list="null", out_list="null", dtype=torch.bfloat16)
POINTWISE = BASE.but(kernel=(1, 1), padding=(0, 0, 0, 0))


def launched(case: Case, channels: list[int] | None = None, backward: bool = False) -> list[str]:
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
        with launches() as names:
            if backward:
                y.backward(grad)
            else:
                torch.ops.bap_kernels.gathered_conv2d(*sample.args)
    return names


RANDOM = [1, 2, 5, 7, 20, 33]
BLOCKS = [c for c in range(64) if c // 8 % 2]


def test_routes() -> None:
    last = {"layout": "channels_last"}
    assert launched(POINTWISE, RANDOM) == [CONV]  # planes: any list
    assert launched(POINTWISE.but(stride=(2, 2)), RANDOM) == [PACK, CONV, UNPACK]
    assert launched(POINTWISE.but(size=(7, 7)), RANDOM) == [PACK, CONV, UNPACK]  # planes of 98 bytes
    assert launched(BASE.but(**last)) == [CONV]
    assert launched(BASE.but(**last), BLOCKS) == [CONV]
    # Several taps: one halo in place of a copy; see test_halo.py for what it declines.
    assert launched(BASE, RANDOM) == [CONV]
    assert launched(BASE.but(**last), RANDOM) == [CONV]
    assert launched(BASE.but(layout="sliced_last")) == [CONV]
    assert launched(BASE.but(in_channels=3, **last)) == [CONV]
    wide = BASE.but(out_channels=136)
    assert launched(wide, RANDOM) == [CONV]
    assert launched(wide.but(**last), RANDOM) == [PACK, CONV]
    assert launched(wide.but(layout="sliced_last")) == [PACK, CONV]


def test_routes_of_the_gradients() -> None:
    assert launched(BASE.but(layout="channels_last"), BLOCKS, backward=True) == [CONV, WEIGHT]
    assert launched(BASE.but(layout="channels_last"), RANDOM, backward=True) == [CONV, PACK, WEIGHT]
    # Planes go back through planes; the sums over pixels want channels side by side.
    assert sorted(launched(POINTWISE, RANDOM, backward=True)) == sorted([CONV, PACK, PACK, WEIGHT])


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
    long = make_tensors(BASE.but(kernel=(2, 31), size=(3, 40), padding=(0, 0, 0, 0)))
    with pytest.raises(NotImplementedError, match="rows and columns of taps that add up to more than 32"):
        run(long, "cuda")
    huge = torch.zeros(1, 1, 1, 1).expand(1, 1, 2**15, 2**15)
    with pytest.raises(NotImplementedError, match="beyond 32-bit"), bap_kernels.use_backend("cuda"):
        bap_kernels.gathered_conv2d(huge, torch.zeros(1, 1, 1, 1), stride=2**14)


def test_the_backend_can_run_and_is_never_chosen() -> None:
    assert _C.unsupported_reason("cuda") is None
    with kernels() as names:
        run(make_tensors(BASE), "auto")
    assert names == []


def test_a_library_of_other_sources_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"_C_cuda was built from other sources than bap_kernels\._C"):
        _C.set_cuda_launcher(library().launcher_of_other_sources())
