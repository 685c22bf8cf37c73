"""Whole networks on a GPU: plans, a CUDA graph for each domain, mixed batches."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import bap_kernels as bk
from bap_kernels import reference
from bap_kernels.testing import assert_close
from tests.networks import Dense, PreActivation, Residual, masked_dense, randomise

# The CUDA C++ kernels take no inputs that hold only some of a weight's channels.
PLANNING = pytest.mark.parametrize("gpu_backend", ["auto", "aten", "triton"], indirect=True)
pytestmark = pytest.mark.gpu
DOMAINS = ("birds", "cars")


def lowered(make: Callable[[], nn.Module], x: Tensor) -> tuple[nn.Module, dict[str, Tensor]]:
    """A planned network on the GPU, and what every domain's dense network with masks gives on the CPU."""
    dense = randomise(make())
    model = bk.swap_(copy.deepcopy(dense))
    table = bk.ChannelTable.random(model, DOMAINS, 0.5, seed=1)
    bk.attach_(model, table)
    expected = {domain: masked_dense(copy.deepcopy(dense), table, domain)(x) for domain in DOMAINS}
    return bk.plan(model.cuda(), x.cuda(), DOMAINS[0], check=False), expected


@PLANNING
@pytest.mark.parametrize("make", [Residual, PreActivation, Dense])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@torch.no_grad()
def test_plans(layout: torch.memory_format, make: Callable[[], nn.Module], gpu_backend: str) -> None:
    x = torch.randn(2, 3, 16, 16).to(memory_format=layout)
    with bk.use_backend(gpu_backend):
        planned, expected = lowered(make, x)
        for domain in DOMAINS:
            bk.set_domain(planned, domain)
            torch.testing.assert_close(planned(x.cuda()).cpu(), expected[domain], rtol=1e-3, atol=1e-3)


@PLANNING
@pytest.mark.parametrize("make", [Residual, PreActivation, Dense])
@torch.no_grad()
def test_plans_as_graphs_follow_domains_shapes_and_weights(make: Callable[[], nn.Module], gpu_backend: str) -> None:
    x = torch.randn(4, 3, 16, 16).contiguous(memory_format=torch.channels_last).cuda()
    model = bk.swap_(randomise(make())).cuda()
    bk.attach_(model, bk.ChannelTable.random(model, DOMAINS, 0.5, seed=1, exact=False))
    with bk.use_backend(gpu_backend):
        graphed, plain = (bk.plan(model, x, DOMAINS[0], cuda_graph=graph) for graph in (True, False))
        for turn in range(3):
            for domain in DOMAINS:
                for planned in (graphed, plain):
                    bk.set_domain(planned, domain)
                for part in (x, x[:1], x + turn):
                    first = graphed(part)
                    torch.testing.assert_close(first, plain(part), rtol=1e-3, atol=1e-3)
            for parameter in model.parameters():
                parameter.mul_(1.05)


@pytest.mark.parametrize("make", [Residual, PreActivation, Dense])
@torch.no_grad()
def test_small_copies(make: Callable[[], nn.Module]) -> None:
    dense, x = randomise(make()), torch.randn(2, 3, 16, 16)
    model = bk.swap_(copy.deepcopy(dense))
    table = bk.ChannelTable.random(model, DOMAINS, 0.5, seed=1)
    small = bk.specialize(bk.attach_(model, table).cuda(), "birds", x.cuda())
    expected = masked_dense(dense, table, "birds")(x)
    torch.testing.assert_close(small(x.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)


@PLANNING
@torch.no_grad()
def test_capture_of_a_plan_for_each_domain(gpu_backend: str) -> None:
    x = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    graphs, results = {}, {}
    with bk.use_backend(gpu_backend):
        planned, expected = lowered(Residual, x)
        given = x.cuda()
        side = torch.cuda.Stream()
        for domain in DOMAINS:
            bk.set_domain(planned, domain)
            # The first calls compile kernels, pack weights and read lists.
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    planned(given)
            torch.cuda.current_stream().wait_stream(side)
            graphs[domain] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[domain]):
                results[domain] = planned(given)
        # What the caches drop stays with the graphs.
        bk.clear_packed_cache()
        rubbish = [torch.full((2**20,), torch.nan, device="cuda") for _ in range(8)]
        for domain in (*DOMAINS, *DOMAINS):
            graphs[domain].replay()
            torch.testing.assert_close(results[domain].cpu(), expected[domain], rtol=1e-3, atol=1e-3)
        del rubbish
        given.neg_()
        graphs["cars"].replay()
        bk.set_domain(planned, "cars")
        torch.testing.assert_close(results["cars"], planned(given), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("kernel", [1, 3])
@PLANNING
def test_mixed_batches(kernel: int, layout: torch.memory_format, dtype: torch.dtype, gpu_backend: str) -> None:
    counts = (3, 1, 0, 4)
    x = torch.randn(8, 64, 15, 14).to(dtype).contiguous(memory_format=layout)
    weight, bias = torch.randn(40, 64, kernel, kernel).to(dtype), torch.randn(40).to(dtype)
    lists = [[c for c in range(64) if c // 16 % 2], list(range(0, 64, 3)), [5], None]
    indices = [None if each is None else torch.tensor(each, dtype=torch.int32) for each in lists]
    options = ((1, 1), (kernel // 2,) * 4, (1, 1))
    parts = zip(x.split(list(counts)), indices, strict=True)
    expected = torch.cat([reference.gathered_conv2d(part, weight, bias, one, None, *options, 1) for part, one in parts])
    there = [None if each is None else each.cuda() for each in indices]
    op = torch.ops.bap_kernels._gathered_conv2d_mixed
    arguments = (x.cuda(), weight.cuda(), bias.cuda(), there, counts, *options)
    with bk.use_backend(gpu_backend):
        y = op(*arguments)
        assert_close(y, expected, dtype, 64 * kernel**2)
        assert y.is_contiguous(memory_format=layout)
        assert torch.equal(op(*arguments), y)


@PLANNING
@torch.no_grad()
def test_capture_of_a_mixed_batch(gpu_backend: str) -> None:
    model = bk.swap_(randomise(Residual()))
    bk.attach_(model, bk.ChannelTable.random(model, DOMAINS, 0.5, seed=1))
    model.cuda()
    x = torch.randn(4, 3, 16, 16, device="cuda")
    bk.set_domain(model, torch.tensor([0, 1, 1, 0]))
    with bk.use_backend(gpu_backend):
        for _ in range(3):
            expected = model(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        graph.replay()
        torch.testing.assert_close(y, expected)
