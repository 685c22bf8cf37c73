"""The contract of the forward, and what belongs to these kernels alone: tiles, blocks, TF32, infinities, caches."""

from __future__ import annotations

import random

import pytest
import torch

import bap_kernels
from bap_kernels import reference
from bap_kernels.testing import Case, assert_close, check_forward, make_tensors, poison, run
from tests.kernel_contract import DTYPES, ForwardContract

BASE = Case(in_channels=40, out_channels=36, size=(5, 8))
WIDE = Case(in_channels=136, out_channels=144, size=(11, 12), batch=1, in_list="all", out_list="null")
POINTWISE = BASE.but(kernel=(1, 1), padding=(0, 0, 0, 0))


class TestForward(ForwardContract):
    backend = "cuda"
    base = BASE
    pointwise = POINTWISE


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
def test_several_tiles(kernel: tuple[int, int], layout: str, dtype: torch.dtype) -> None:
    padding = (kernel[0] // 2,) * 4
    assert check_forward(WIDE.but(kernel=kernel, padding=padding, layout=layout, dtype=dtype), "cuda")


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b", [8, 16, 32])
def test_blocks(b: int, dtype: torch.dtype, kernel: tuple[int, int]) -> None:
    case = BASE.but(in_channels=192, kernel=kernel, layout="channels_last", dtype=dtype, in_list="null")
    sample = make_tensors(case)
    # Out of order, so that no block follows from the one before.
    blocks = random.Random(b).sample(range(192 // b), 192 // b - 2)
    sample.in_index = torch.tensor([b * block + c for block in blocks for c in range(b)], dtype=torch.int32)
    poison(sample)
    assert_close(run(sample, "cuda"), reference.gathered_conv2d(*sample.args), dtype, sample.depth)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_unlisted_channels_never_reach_the_output(layout: str, value: float) -> None:
    for case in (BASE.but(layout=layout), POINTWISE.but(layout=layout)):
        expected = reference.gathered_conv2d(*make_tensors(case).args)
        sample = poison(make_tensors(case), value)
        assert_close(run(sample, "cuda"), expected, case.dtype, sample.depth)


@pytest.mark.parametrize(
    "case", [BASE.but(layout="channels_last", in_list="null"), BASE.but(in_list="shuffled")], ids=["direct", "halo"]
)
def test_float32_is_tf32_where_torch_allows_it_and_refused_elsewhere(case: Case) -> None:
    sample = make_tensors(case.but(in_channels=64))
    exact = reference.gathered_conv2d(*sample.args)
    rounded = (run(sample, "cuda").double() - exact).abs().max()
    # Both operands keep 11 bits: what 576 products of about 1 then miss.
    assert 1e-3 < rounded < 6 * 576**0.5 * 2**-11
    torch.backends.cudnn.allow_tf32 = False
    with pytest.raises(NotImplementedError, match=r"no CUDA kernel for float32 unless .*allow_tf32"):
        run(sample, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_in_listed_channels(dtype: torch.dtype) -> None:
    sample = make_tensors(POINTWISE.but(layout="channels_last", in_list="null", dtype=dtype))
    sample.input[0, 3, 2, 2] = torch.inf
    y = run(sample, "cuda")
    reached = y.isfinite().logical_not()
    assert bool(reached[0, :, 2, 2].all())
    assert int(reached.sum()) == y.shape[1]
    assert bool(y[0, :, 2, 2].isinf().all())


def test_the_packed_weight_is_kept_and_follows_changes() -> None:
    sample = make_tensors(BASE.but(layout="channels_last"))
    bap_kernels.clear_packed_cache()
    first = run(sample, "cuda", cache_packed=True)
    assert bap_kernels.packed_cache_info()["entries"] == 1
    sample.weight.mul_(2)
    if sample.bias is not None:
        sample.bias.mul_(2)
    assert torch.equal(run(sample, "cuda", cache_packed=True), 2 * first)


def test_lists_that_change_in_place_are_read_again() -> None:
    sample = make_tensors(POINTWISE.but(in_channels=32, layout="channels_last", in_list="null"))
    sample.in_index = torch.arange(16, dtype=torch.int32)
    run(sample, "cuda")
    sample.in_index.copy_(torch.arange(1, 17))
    assert_close(run(sample, "cuda"), reference.gathered_conv2d(*sample.args), torch.float32, sample.depth)
