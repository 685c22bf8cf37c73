"""Mixed batches on the CUDA kernels: one launch for all domains, and every sample gets what it gets alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bap_kernels
from bap_kernels.testing import assert_close, lay_out
from tests.ptx.cuda import device
from tests.ptx.cuda.device import CONV, PACK

op = torch.ops.bap_kernels._gathered_conv2d_mixed
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Options = tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int]]
SAME: Options = ((1, 1), (1, 1, 1, 1), (1, 1))
NONE: Options = ((1, 1), (0, 0, 0, 0), (1, 1))


def expected(
    x: Tensor, weight: Tensor, bias: Tensor | None, lists: list[Tensor | None], counts: list[int], options: Options
) -> Tensor:
    """Each run by the loops over its own channels in float64."""
    stride, padding, dilation = options
    parts = []
    for part, one in zip(x.split(counts), lists, strict=True):
        which = torch.arange(x.shape[1]) if one is None else one.long()
        top, bottom, left, right = padding
        padded = nn.functional.pad(part[:, which].double(), (left, right, top, bottom))
        if len(which) == 0:
            size = [
                (padded.shape[d + 2] - dilation[d] * (weight.shape[d + 2] - 1) - 1) // stride[d] + 1 for d in (0, 1)
            ]
            parts.append(torch.zeros(len(part), len(weight), *size, dtype=torch.float64))
        else:
            parts.append(nn.functional.conv2d(padded, weight[:, which].double(), None, stride, 0, dilation))
    y = torch.cat(parts)
    return y if bias is None else y + bias.double().view(1, -1, 1, 1)


def random_list(channels: int, kept: int) -> Tensor:
    return torch.randperm(channels)[:kept].sort().values.int()


def runs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lists: list[Tensor | None],
    counts: list[int],
    options: Options,
    launches: list[str],
) -> None:
    wanted = expected(x, weight, bias, lists, counts, options)
    # What no list of its run names is poisoned, sample by sample.
    first = 0
    for one, count in zip(lists, counts, strict=True):
        off = torch.ones(x.shape[1], dtype=torch.bool)
        off[slice(None) if one is None else one.long()] = False
        x[first : first + count, off] = torch.nan
        first += count
    with bap_kernels.use_backend("cuda"), device.launches() as names:
        y = op(x, weight, bias, lists, counts, *options)
    assert_close(y, wanted, x.dtype, x.shape[1] * weight[0, 0].numel())
    assert [name for name in names if name in (CONV, PACK)] == launches


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_halos(layout: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x = lay_out(torch.randn(8, 70, 9, 16).to(dtype), layout)
    weight, bias = torch.randn(66, 70, 3, 3).to(dtype), torch.randn(66).to(dtype)
    lists = [random_list(70, 33), None, random_list(70, 1), random_list(70, 68), random_list(70, 0)]
    runs(x, weight, bias, lists, [2, 1, 3, 1, 1], SAME, [CONV])
    x = lay_out(torch.randn(2, 70, 9, 16).to(dtype), layout)
    runs(x, weight, None, [random_list(70, 5), random_list(70, 66)], [1, 1], ((2, 1), (1, 0, 2, 1), (1, 2)), [CONV])


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("dtype", DTYPES)
def test_planes(dtype: torch.dtype) -> None:
    x = torch.randn(6, 80, 8, 12).to(dtype)
    weight, bias = torch.randn(70, 80, 1, 1).to(dtype), torch.randn(70).to(dtype)
    lists = [random_list(80, 3), random_list(80, 75), None]
    runs(x, weight, bias, lists, [3, 1, 2], NONE, [CONV])


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [1, 3])
def test_blocks_of_channels(kernel: int, dtype: torch.dtype) -> None:
    x = lay_out(torch.randn(6, 96, 7, 13).to(dtype), "channels_last")
    weight = torch.randn(140, 96, kernel, kernel).to(dtype)
    lists: list[Tensor | None] = [
        torch.tensor([c for c in range(96) if c // size % 2], dtype=torch.int32) for size in (8, 32)
    ]
    options = SAME if kernel == 3 else NONE
    runs(x, weight, torch.randn(140).to(dtype), [*lists, None], [1, 3, 2], options, [CONV])


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_compact_copies(layout: str, dtype: torch.dtype) -> None:
    # Two launches for all domains where channels are copied first: planes of 7 x 9, strided pixels.
    x = lay_out(torch.randn(7, 70, 7, 9).to(dtype), layout)
    weight, bias = torch.randn(34, 70, 1, 1).to(dtype), torch.randn(34).to(dtype)
    lists = [random_list(70, 33), random_list(70, 0), None, random_list(70, 17)]
    runs(x, weight, bias, lists, [2, 1, 1, 3], NONE, [PACK, CONV])
    x = lay_out(torch.randn(7, 70, 7, 9).to(dtype), layout)
    runs(x, weight, bias, lists, [2, 1, 1, 3], ((2, 3), (0, 0, 0, 0), (1, 1)), [PACK, CONV])


def test_lists_without_channels_leave_the_bias() -> None:
    for kernel in (1, 3):
        weight, bias = torch.randn(5, 8, kernel, kernel), torch.randn(5)
        x = torch.randn(3, 8, 7, 7)
        with bap_kernels.use_backend("cuda"):
            y = op(x, weight, bias, [random_list(8, 0)] * 2, [1, 2], (1, 1), (kernel // 2,) * 4, (1, 1))
        assert torch.equal(y, bias.view(1, 5, 1, 1).expand(3, 5, 7, 7))


def test_many_runs_take_several_launches() -> None:
    x, weight = torch.randn(40, 16, 4, 8), torch.randn(9, 16, 3, 3)
    lists: list[Tensor | None] = [random_list(16, 1 + i % 16) for i in range(35)]
    counts = [1 + (i % 7 == 0) for i in range(35)]
    runs(x, weight, None, lists, counts, SAME, [CONV] * 3)


def test_empty_batches_and_runs() -> None:
    weight = torch.randn(4, 6, 3, 3)
    with bap_kernels.use_backend("cuda"):
        assert op(torch.randn(0, 6, 7, 8), weight, None, [], [], *SAME).shape == (0, 4, 7, 8)
    runs(torch.randn(3, 6, 7, 8), weight, None, [random_list(6, 3), random_list(6, 1)], [0, 3], SAME, [CONV])


def test_refusals() -> None:
    x, weight = torch.randn(3, 6, 7, 8, dtype=torch.float64), torch.randn(4, 6, 3, 3, dtype=torch.float64)
    with (
        pytest.raises(NotImplementedError, match=r"_gathered_conv2d_mixed\(\): .* no CUDA kernel for Double"),
        bap_kernels.use_backend("cuda"),
    ):
        op(x, weight, None, [None], [3], *SAME)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_network(layout: str) -> None:
    torch.manual_seed(3)
    model = bap_kernels.swap_(
        nn.Sequential(nn.Conv2d(12, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 20, 3), nn.Conv2d(20, 9, 1))
    )
    domains = ["birds", "cars", "signs"]
    bap_kernels.attach_(model, bap_kernels.ChannelTable.random(model, domains, 0.5, seed=3)).eval()
    x = lay_out(torch.randn(7, 12, 9, 8), layout)
    numbers = torch.tensor([2, 0, 2, 1, 0, 2, 2])
    with torch.no_grad(), bap_kernels.use_backend("cuda"):
        alone = []
        for sample, number in zip(x, numbers.tolist(), strict=True):
            bap_kernels.set_domain(model, domains[number])
            alone.append(model(sample.unsqueeze(0))[0])
        bap_kernels.set_domain(model, numbers)
        with device.launches() as names:
            y = model(x)
        torch.testing.assert_close(y, torch.stack(alone))
        # The packed weights of every domain are kept.
        assert torch.equal(model(x), y)
    assert names.count(CONV) == 3
