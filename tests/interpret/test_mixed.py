"""Mixed batches in one launch, and planned networks, whose tensors hold only some of a weight's channels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import bap_kernels as bk
from bap_kernels import reference
from bap_kernels.testing import assert_close, lay_out
from tests.networks import Dense, PreActivation, Residual, masked_dense, randomise

op = torch.ops.bap_kernels._gathered_conv2d_mixed
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
COUNTS = (2, 1, 0, 3)
RANDOM = ([1, 4, 5, 30], list(range(1, 40, 2)), [7], None)
BLOCKS = (list(range(8, 16)), [*range(24, 32), *range(0, 8)], [3], [*range(16, 40)])
LONG_BLOCKS = (list(range(16)), None, [3], list(range(32)))


def ints(channels: Sequence[int] | None) -> Tensor | None:
    return None if channels is None else torch.tensor(channels, dtype=torch.int32)


def check(
    lists: Sequence[Sequence[int] | None],
    layout: str,
    dtype: torch.dtype = torch.float32,
    kernel: tuple[int, int] = (3, 2),
    stride: tuple[int, int] = (1, 1),
    route: str | None = None,
    channels: int = 40,
) -> None:
    padding = (1, 0, 1, 1) if kernel != (1, 1) else (0, 0, 0, 0)
    x = lay_out(torch.randn(sum(COUNTS), channels, 5, 6).to(dtype), layout)
    weight, bias = torch.randn(18, channels, *kernel).to(dtype), torch.randn(18).to(dtype)
    indices, options = [ints(each) for each in lists], (stride, padding, (1, 1))
    parts = zip(x.split(list(COUNTS)), indices, strict=True)
    expected = torch.cat([reference.gathered_conv2d(part, weight, bias, one, None, *options, 1) for part, one in parts])
    # What no list of a run names reaches none of its results.
    first = 0
    for count, channels_on in zip(COUNTS, lists, strict=True):
        off = [c for c in range(channels) if channels_on is not None and c not in channels_on]
        x[first : first + count, off] = torch.nan
        first += count
    if route is None:
        with bk.use_backend("triton"):
            y = op(x, weight, bias, indices, COUNTS, *options)
    else:
        from bap_kernels.triton import mixed

        y = torch.full(expected.shape, torch.nan, dtype=dtype)
        y = y.contiguous(memory_format=torch.channels_last if x.stride(1) == 1 else torch.contiguous_format)
        mixed.gathered_conv2d_mixed(y, x, weight, bias, indices, COUNTS, *options, route=route)
    assert_close(y, expected, dtype, channels * 6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 2)])
def test_random_lists(kernel: tuple[int, int], layout: str, dtype: torch.dtype) -> None:
    check(RANDOM, layout, dtype, kernel)


@pytest.mark.parametrize("lists", [BLOCKS, LONG_BLOCKS], ids=["8", "8 of 16 and 32"])
@pytest.mark.parametrize("route", ["direct", "packed"])
def test_blocks(lists: Sequence[Sequence[int] | None], route: str) -> None:
    check(lists, "channels_last", route=route)
    check(lists, "channels_last", kernel=(1, 1), route=route)


@pytest.mark.parametrize("route", ["direct", "packed"])
def test_strides(route: str) -> None:
    check(RANDOM, "contiguous", stride=(2, 1), route=route)
    check(RANDOM, "channels_last", kernel=(1, 1), stride=(2, 2), route=route)


def test_empty_lists_and_runs_without_a_list() -> None:
    for layout in ("contiguous", "channels_last"):
        for kernel in ((1, 1), (3, 2)):
            check(([], [1, 2], None, []), layout, kernel=kernel)
            check(([], [], [], []), layout, kernel=kernel)
            check((None, None, None, None), layout, kernel=kernel)


def test_the_table_of_a_batch_is_made_once() -> None:
    from bap_kernels.triton import mixed

    x, weight = torch.randn(6, 40, 5, 6), torch.randn(18, 40, 3, 3)
    indices = [ints(each) for each in RANDOM]
    mixed._kept_table.cache_clear()
    with bk.use_backend("triton"):
        first = op(x, weight, None, indices, COUNTS, (1, 1), (1, 1, 1, 1), (1, 1), True)
        made = mixed._kept_table.cache_info().misses
        assert torch.equal(op(x, weight, None, indices, COUNTS, (1, 1), (1, 1, 1, 1), (1, 1), True), first)
    assert mixed._kept_table.cache_info().misses == made > 0


def test_the_longest_lists_begin() -> None:
    from bap_kernels.triton.mixed import _Run, _tiles

    runs = [_Run(0, 2, 5, 0, 0), _Run(2, 1, 9, 0, 0)]
    assert list(_tiles(runs, 10, 0)) == [(2, 1), (0, 0), (1, 0)]
    assert list(_tiles(runs, 10, 16)) == [(20, 1), (0, 0), (16, 0)]


@pytest.mark.parametrize("make", [Residual, PreActivation, Dense])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_planned_networks(layout: torch.memory_format, make: Callable[[], nn.Module]) -> None:
    dense = randomise(make())
    model = bk.swap_(copy.deepcopy(dense))
    table = bk.ChannelTable.random(model, ["birds", "cars"], 0.5, seed=1)
    bk.attach_(model, table)
    x = torch.randn(2, 3, 8, 8).to(memory_format=layout)
    with torch.no_grad(), bk.use_backend("triton"):
        planned = bk.plan(model, x, "birds", check=False)
        for domain in ("birds", "cars"):
            bk.set_domain(planned, domain)
            expected = masked_dense(copy.deepcopy(dense), table, domain)(x)
            torch.testing.assert_close(planned(x), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_copies_of_streams_spare_the_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    from bap_kernels.triton import launch, ops

    routes, stored = [], []
    real, forward = ops.route_of, launch.forward
    monkeypatch.setattr(ops, "route_of", lambda *a: routes.append(real(*a)) or routes[-1])
    monkeypatch.setattr(launch, "forward", lambda *a, **k: stored.append(k.get("epilogue") or a[8]) or forward(*a, **k))
    dense = randomise(Residual())
    model = bk.swap_(copy.deepcopy(dense))
    table = bk.ChannelTable.random(model, ["birds", "cars"], 0.5, seed=1)
    bk.attach_(model, table)
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    gathered = []
    for wanted in (False, True):
        with bk.use_backend("triton" if wanted else "aten"):
            planned = bk.plan(model, x, "birds", check=False)
        routes.clear()
        stored.clear()
        with bk.use_backend("triton"):
            y = planned(x)
        torch.testing.assert_close(y, masked_dense(copy.deepcopy(dense), table, "birds")(x), rtol=1e-4, atol=1e-4)
        assert sum(epilogue.dual is not None for epilogue in stored) == wanted
        gathered.append(routes.count("packed"))
    assert gathered[1] == gathered[0] - 1


@torch.no_grad()
def test_mixed_batches_of_networks() -> None:
    model = bk.swap_(randomise(Residual()))
    bk.attach_(model, bk.ChannelTable.random(model, ["birds", "cars"], 0.5, seed=1))
    x, numbers = torch.randn(3, 3, 8, 8), torch.tensor([1, 0, 1])
    with bk.use_backend("aten"):
        bk.set_domain(model, numbers)
        expected = model(x)
    with bk.use_backend("triton"):
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
        planned = bk.plan(model, x[:1], "birds", check=False)
        bk.set_domain(planned, numbers)
        torch.testing.assert_close(planned(x), expected, rtol=1e-4, atol=1e-4)


def test_refusal() -> None:
    x, weight = torch.randn(2, 4, 5, 5, dtype=torch.float64), torch.randn(3, 4, 3, 3, dtype=torch.float64)
    message = r"_gathered_conv2d_mixed\(\): expected a call that backend `triton` can run, got .* torch\.float64"
    with bk.use_backend("triton"), pytest.raises(NotImplementedError, match=message):
        op(x, weight, None, [ints([1]), None], [1, 1], (1, 1), (0, 0, 0, 0), (1, 1))
