"""Channels that must go together are one class; values that share an order are one group."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bap_kernels.flow.classes import Classes, UnionFind, keep_unknown, tied_channels, tied_values, unknown
from bap_kernels.flow.graph import Graph
from bap_kernels.plan.trace import trace


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        y = x + self.b(x)
        return self.c(torch.cat([x, y], 1))


def graph_of(model: nn.Module, channels: int = 3) -> Graph:
    return trace("plan", model.eval(), (torch.randn(1, channels, 6, 6),), None)


def result(graph: Graph, name: str) -> object:
    return next(op.output for op in graph.ops if op.name == name)


def test_union_find_joins_what_is_tied_and_nothing_else() -> None:
    sets = UnionFind(6)
    for a, b in ((0, 1), (3, 4), (1, 4)):
        sets.union(a, b)
    leaders = sets.leaders().tolist()
    assert [leaders[i] == leaders[0] for i in range(6)] == [True, True, False, True, True, False]
    assert sets.find(0) == 4


def test_sums_and_concatenations_tie_channels() -> None:
    graph = graph_of(Network())
    classes = tied_channels(graph)
    leaders = classes.leaders()
    a, b, c = (classes.leaders_of(result(graph, name), leaders) for name in "abc")
    assert np.array_equal(a, b)
    assert not set(a) & set(c)
    assert len(set(a)) == 4
    # The concatenation has each channel twice.
    (cat,) = (op for op in graph.ops if op.kind == "cat")
    assert np.array_equal(classes.leaders_of(cat.output, leaders), np.concatenate([a, a]))


def test_kept_channels_keep_their_classes() -> None:
    graph = graph_of(Network())
    classes = tied_channels(graph)
    classes.keep(result(graph, "b"), np.array([2]))
    assert classes.kept_of(result(graph, "a")).tolist() == []
    classes.keep_whole_classes()
    assert classes.kept_of(result(graph, "a")).tolist() == [2]
    (cat,) = (op for op in graph.ops if op.kind == "cat")
    assert classes.kept_of(cat.output).tolist() == [2, 6]


def test_groups_go_as_a_whole() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 2, 1))
    graph = graph_of(model)
    classes = tied_channels(graph)
    leaders = classes.leaders()
    assert len(set(classes.leaders_of(result(graph, "1"), leaders))) == 2
    classes.keep(result(graph, "1"), np.array([5]))
    classes.keep_whole_classes()
    assert classes.kept_of(result(graph, "0")).tolist() == [2, 3]


def test_values_of_a_stream_are_one_group() -> None:
    graph = graph_of(Network())
    (group,) = (values for values in tied_values(graph) if result(graph, "a") in values)
    assert result(graph, "b") in group
    assert result(graph, "c") not in group
    assert not any(op.output in group for op in graph.ops if op.kind == "cat")


def test_channels_around_steps_without_a_rule_stay() -> None:
    class Flipped(Network):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).flip(1))

    graph = graph_of(Flipped())
    assert "flip" in {op.name: why for op, _, why in unknown(graph)}
    classes: Classes = tied_channels(graph)
    keep_unknown(classes, graph)
    assert classes.kept_of(result(graph, "a")).tolist() == [0, 1, 2, 3]
