"""The inverse of the compact copy: against indexing, and in the routes that leave their result to it."""

from __future__ import annotations

import random

import pytest
import torch

import bap_kernels
from bap_kernels.testing import Case, lay_out, make_tensors
from bap_kernels.testing_switched import check_switched_backward
from tests.kernel_contract import DTYPES
from tests.ptx.cuda.device import CONV, UNPACK, library
from tests.ptx.cuda.test_routes import BASE, RANDOM, launched


def compact(batch: int, channels: int, size: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """(N, H, W, channels rounded up), NaN behind them."""
    source = torch.full((batch, *size, -(-channels // 16) * 16), torch.nan, dtype=dtype)
    source[..., :channels] = torch.randn(batch, *size, channels, generator=torch.Generator().manual_seed(3)).to(dtype)
    return source


def unpack(
    result: torch.Tensor,
    source: torch.Tensor,
    entries: torch.Tensor | None,
    used: torch.Tensor | None,
    block: int,
    depth: int,
) -> None:
    mode = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}[source.dtype]
    address = [0 if each is None else each.data_ptr() for each in (entries, used)]
    library().unpack(
        *(result.data_ptr(), result.shape, result.stride(), source.data_ptr(), source.shape[3]),
        *(mode, address[0], block, depth, address[1]),
    )


def unpacked(
    source: torch.Tensor,
    result: torch.Tensor,
    channels: list[int],
    block: int = 1,
    count: int | None = None,
) -> torch.Tensor:
    entries = torch.tensor([c // block for c in channels[::block]], dtype=torch.int32)
    used = None if count is None else torch.tensor([count], dtype=torch.int32)
    # A result that is not written must be seen.
    result.fill_(torch.nan)
    unpack(result, source, entries, used, block, len(channels))
    return result


def expected(source: torch.Tensor, result: torch.Tensor, channels: list[int], count: int | None = None) -> torch.Tensor:
    full = torch.zeros(result.shape, dtype=result.dtype)
    kept = len(channels) if count is None else count
    full[:, channels[:kept]] = source[..., :kept].permute(0, 3, 1, 2)
    return full


# Planes of whole chunks, of 98 and 196 bytes, of one pixel, and of more than one tile.
@pytest.mark.parametrize("size", [(8, 8), (7, 7), (1, 1), (9, 16)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "stepped", "transposed"])
def test_shuffled_lists(layout: str, dtype: torch.dtype, size: tuple[int, int]) -> None:
    channels = random.Random(5).sample(range(150), 70)
    source = compact(2, 70, size, dtype)
    result = lay_out(torch.empty(2, 150, *size, dtype=dtype), layout)
    assert torch.equal(unpacked(source, result, channels), expected(source, result, channels))


@pytest.mark.parametrize("block", [8, 16, 32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks(dtype: torch.dtype, block: int) -> None:
    blocks = random.Random(block).sample(range(160 // block), 3)
    channels = [block * number + c for number in blocks for c in range(block)]
    source = compact(1, len(channels), (5, 8), dtype)
    result = torch.empty(1, 160, 5, 8, dtype=dtype)
    assert torch.equal(unpacked(source, result, channels, block), expected(source, result, channels))


@pytest.mark.parametrize("count", [0, 1, 64, 70])
def test_a_count_on_the_device(count: int) -> None:
    channels = random.Random(7).sample(range(100), 70)
    source = compact(2, 70, (4, 8), torch.bfloat16)
    source[..., count:] = torch.nan
    result = torch.empty(2, 100, 4, 8, dtype=torch.bfloat16)
    assert torch.equal(unpacked(source, result, channels, count=count), expected(source, result, channels, count))


@pytest.mark.parametrize("channels", [1, 64, 65])
def test_without_a_list(channels: int) -> None:
    source = compact(3, channels, (6, 6), torch.float32)
    result = torch.full((3, channels, 6, 6), torch.nan)
    unpack(result, source, None, None, 0, channels)
    assert torch.equal(result, source[..., :channels].permute(0, 3, 1, 2))


@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_planes(dtype: torch.dtype, stride: tuple[int, int]) -> None:
    case = BASE.but(dtype=dtype, stride=stride)
    sample = make_tensors(case)
    sample.in_index = torch.tensor(RANDOM, dtype=torch.int32)
    sample.input.requires_grad_()
    grads = {}
    for backend in ("cuda", "aten"):
        with bap_kernels.use_backend(backend):
            y = torch.ops.bap_kernels.gathered_conv2d(*sample.args)
            g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
            (grads[backend],) = torch.autograd.grad(y, sample.input, g)
    tolerance = 0.05 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(grads["cuda"], grads["aten"], rtol=tolerance, atol=tolerance)
    others = [c for c in range(64) if c not in RANDOM]
    assert bool((grads["cuda"][:, others] == 0).all())
    assert launched(case, RANDOM, backward=True)[:3].count(UNPACK) == 1


def test_switches_off_leave_zeros_in_planes() -> None:
    for case in (Case(in_channels=24, out_channels=20, size=(7, 9)), Case(in_channels=70, kernel=(1, 1), size=(5, 5))):
        check_switched_backward(case.but(in_list="shuffled"), "cuda", "contiguous")


def test_forwards_of_planes_that_are_copied() -> None:
    # Planes of 98 bytes cannot be read in chunks: the copy goes in and the result out.
    pointwise = BASE.but(kernel=(1, 1), padding=(0, 0, 0, 0), size=(7, 7))
    assert launched(pointwise, RANDOM)[-2:] == [CONV, UNPACK]
    assert UNPACK not in launched(pointwise.but(layout="channels_last"), RANDOM)
