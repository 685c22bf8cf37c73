"""Which channels are read and which are constant, on networks whose answer is known."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

import bap_kernels as bk
from bap_kernels.flow.graph import Graph
from bap_kernels.flow.liveness import Liveness
from bap_kernels.plan.trace import trace


def graph_of(*layers: nn.Module, lists: dict[str, bk.ChannelLists]) -> Graph:
    model = bk.swap_(nn.Sequential(*layers).eval(), layer_type=bk.nn.MaskedConv2d)
    bk.attach_(model, {"a": lists})
    return trace("plan", model, (torch.randn(1, 3, 6, 6),), "a", unread=True)


def of(graph: Graph, values: dict, name: str) -> np.ndarray:
    return values[next(op.output for op in graph.ops if op.name == name)]


def test_a_filter_is_live_where_the_next_convolution_reads_it() -> None:
    graph = graph_of(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1), lists={"2": bk.ChannelLists([0, 3])})
    live = Liveness(graph).live
    assert of(graph, live, "0").tolist() == [True, False, False, True]
    assert of(graph, live, "2").tolist() == [True, True]


def test_constants_pass_batch_norm_and_activations() -> None:
    norm = nn.BatchNorm2d(4)
    with torch.no_grad():
        norm.bias.copy_(torch.tensor([1.0, -2.0, 3.0, 4.0]))
    graph = graph_of(
        *(nn.Conv2d(3, 4, 1), norm, nn.ReLU(), nn.Conv2d(4, 2, 1)), lists={"0": bk.ChannelLists(None, [2, 3])}
    )
    known = Liveness(graph)
    assert np.array_equal(of(graph, known.constant, "0"), [0, 0, np.nan, np.nan], equal_nan=True)
    assert np.array_equal(of(graph, known.constant, "1"), [1, -2, np.nan, np.nan], equal_nan=True)
    assert np.array_equal(of(graph, known.constant, "2"), [1, 0, np.nan, np.nan], equal_nan=True)
    assert of(graph, known.live, "1").tolist() == [False, False, True, True]
    # Without constants every channel that is read is computed.
    plain = Liveness(graph, constants=False)
    assert np.isnan(of(graph, plain.constant, "1")).all()
    assert of(graph, plain.live, "1").all()


def test_one_channel_stays_for_the_size_where_asked_for() -> None:
    graph = graph_of(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), lists={"1": bk.ChannelLists([])})
    assert of(graph, Liveness(graph).live, "0").tolist() == [True, False, False, False]
    assert not of(graph, Liveness(graph, constants=False, extents=False).live, "0").any()
