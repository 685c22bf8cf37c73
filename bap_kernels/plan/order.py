"""Puts a network's channels in an order in which the domains' lists are long runs and whole blocks.

A list of scattered channels costs a kernel that reads blocks of 8 or 16 channels nearly all of them. The network
computes the same in any order of its channels on which all layers agree: filters, batch norms and the slices of what
reads them move together. Channels that go together are one class (`classes`); classes of one shape, each a copy of the
others moved by some channels in every value, can be exchanged. Such a group is the stream of a residual stage, or a
part of a concatenation, or what lies between two convolutions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bap_kernels._arguments import check_module
from bap_kernels.flow.classes import Classes, keep_unknown, tied_channels
from bap_kernels.flow.graph import Channels, Graph, Op, Value
from bap_kernels.nn.conv import GatheredConv2d
from bap_kernels.nn.per_domain import domain_layers
from bap_kernels.plan.cover import candidate_orders, covered, runs
from bap_kernels.plan.domain_view import lists_of
from bap_kernels.plan.example import trace_shapes
from bap_kernels.plan.features import Head, heads_of
from bap_kernels.plan.in_place import check_and_list_domains, renumber_lists_, table_of
from bap_kernels.table import ChannelTable

__all__ = ["ListOrder", "OrderReport", "order_channels_"]

_BLOCKS = (8, 16)


@dataclass(frozen=True)
class ListOrder:
    """One list before and after :func:`bap_kernels.order_channels_`.

    Attributes:
        layer: the layer's name.
        domain: whose list; None for the list of a layer that was made with it.
        side: ``"in"`` or ``"out"``.
        listed: how many channels it lists.
        channels: how many there are.
        macs: multiply-adds of the layer for each of these channels, in one call of the example.
        runs: (before, after), how many runs of consecutive channels it has.
        covered: {size of a block: (before, after)}, channels in the blocks that it touches.
    """

    layer: str
    domain: str | None
    side: str
    listed: int
    channels: int
    macs: int
    runs: tuple[int, int]
    covered: dict[int, tuple[int, int]]


@dataclass(frozen=True)
class OrderReport:
    """What :func:`bap_kernels.order_channels_` did.

    Attributes:
        lists: a :class:`ListOrder` for each list that is not None.
        moved: how many channels of convolutions' results have another place.
        table: the renumbered lists.
    """

    lists: tuple[ListOrder, ...]
    moved: int
    table: ChannelTable

    def efficiency(self, size: int, layer: str | None = None) -> tuple[float, float]:
        """(before, after): of the multiply-adds on covered channels, the share that is on listed ones.

        Args:
            size: of a block; 8, 16, or the ``block`` that was asked for.
            layer: one layer's lists only.

        Examples:
            >>> from torch import nn
            >>> import bap_kernels as bk
            >>> model = bk.swap_(nn.Sequential(nn.Conv2d(3, 32, 1), nn.Conv2d(32, 8, 1)).eval())
            >>> lists = {"birds": {"1": bk.ChannelLists(list(range(0, 32, 2)))}}
            >>> bk.order_channels_(bk.attach_(model, lists)).efficiency(16)
            (0.5, 1.0)
        """
        chosen = [lists for lists in self.lists if layer is None or lists.layer == layer]
        listed = sum(lists.listed * lists.macs for lists in chosen)
        before, after = (sum(lists.covered[size][side] * lists.macs for lists in chosen) for side in range(2))
        return listed / before if before else 1.0, listed / after if after else 1.0

    def mean_run(self, layer: str | None = None) -> tuple[float, float]:
        """(before, after): mean length of the runs of consecutive channels."""
        chosen = [lists for lists in self.lists if layer is None or lists.layer == layer]
        listed = sum(lists.listed for lists in chosen)
        before, after = (sum(lists.runs[side] for lists in chosen) for side in range(2))
        return listed / max(before, 1), listed / max(after, 1)

    def _line(self, layer: str | None) -> str:
        sizes = sorted({size for lists in self.lists for size in lists.covered})
        shares = [(size, *self.efficiency(size, layer)) for size in sizes]
        parts = [f"blocks of {size} {before:.1%} -> {after:.1%}" for size, before, after in shares]
        before, after = self.mean_run(layer)
        return ", ".join([*parts, f"mean run {before:.1f} -> {after:.1f}"])

    def __str__(self) -> str:
        lines = [f"{len(self.lists)} lists: {self._line(None)}; {self.moved} channels moved"]
        for layer in dict.fromkeys(lists.layer for lists in self.lists):
            lines.append(f"  {layer}: {self._line(layer)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _List:
    """A list as a mask over the channels of a value, numbered as they were."""

    op: Op
    domain: str | None
    side: str
    first: int  # number of the value's first element
    mask: np.ndarray
    macs: int

    def in_order(self, source: np.ndarray) -> np.ndarray:
        """The mask in an order of the elements."""
        return self.mask[source[self.first : self.first + len(self.mask)] - self.first]


def _lists(graphs: list[Graph], classes: Classes, domains: list[str | None]) -> list[_List]:
    lists = []
    for op in graphs[0].ops:
        conv, shape = op.module, op.output.shape
        if not isinstance(conv, GatheredConv2d) or shape is None:
            continue
        work = shape[0] * shape[2] * shape[3] * conv.weight[0, 0].numel()
        for domain in domains:
            host = lists_of(conv, domain)._host
            ends = (("in", op.inputs[0], conv.out_channels), ("out", op.output, conv.in_channels))
            for listed, (side, value, others) in zip(host, ends, strict=True):
                if listed is not None:
                    mask = np.zeros(value.channels or 0, dtype=bool)
                    mask[listed] = True
                    macs = work * (others if conv.groups == 1 else 1)
                    lists.append(_List(op, domain, side, classes.first[value], mask, macs))
    return lists


def _groups(classes: Classes) -> list[np.ndarray]:
    """The groups of classes that can change places: (classes, elements of each), in corresponding order."""
    leaders = classes.leaders()
    free = np.flatnonzero(~classes.kept)
    starts = np.array(list(classes.first.values()), dtype=np.int64)
    members: dict[int, list[int]] = {}
    for element in free:
        members.setdefault(int(leaders[element]), []).append(int(element))
    shapes: dict[tuple[tuple[int, int], ...], list[list[int]]] = {}
    for elements in members.values():
        values = np.searchsorted(starts, elements, side="right") - 1
        shape = tuple((int(value), element - elements[0]) for value, element in zip(values, elements, strict=True))
        shapes.setdefault(shape, []).append(elements)
    return [np.array(sorted(group)) for group in shapes.values() if len(group) > 1]


def _improved(source: np.ndarray, group: np.ndarray, lists: list[_List], sizes: list[int]) -> np.ndarray | None:
    """A better order of one group's channels, given those of all others; None if none was found."""
    touching = [its for its in lists if np.any((group[0] >= its.first) & (group[0] < its.first + len(its.mask)))]
    columns, weights, offsets = [], [], []
    for listed in touching:
        for elements in group.T:
            if listed.first <= elements[0] < listed.first + len(listed.mask):
                columns.append(listed.mask[elements - listed.first])
                weights.append(listed.macs)
                offsets.append(int(elements[0] - listed.first))
    if not columns:
        return None
    rows, costs = np.array(columns).T, np.array(weights, dtype=np.float64)
    costs /= costs.max()

    def cost(order: np.ndarray) -> tuple[list[int], int]:
        masks = [(listed.in_order(order), listed.macs) for listed in touching]
        by_size = [sum(covered(mask, size) * macs for mask, macs in masks) for size in sizes]
        return by_size, sum(runs(mask) * macs for mask, macs in masks)

    before, its_runs = cost(source)
    best, best_cost = None, (sum(before), its_runs)
    for order in candidate_orders(rows, costs, sizes, offsets[int(np.argmax(costs))]):
        candidate = source.copy()
        candidate[group] = group[order]
        cover, its_runs = cost(candidate)
        # No size may get worse for the sake of another.
        if all(new <= old for new, old in zip(cover, before, strict=True)) and (sum(cover), its_runs) < best_cost:
            best, best_cost = candidate, (sum(cover), its_runs)
    return best


def _reorder_(module: nn.Module, name: str, order: Channels, axis: int = 0) -> None:
    tensor: Tensor | None = module._parameters.get(name, module._buffers.get(name))
    if tensor is not None:
        # In place: whoever shares the parameter, an optimiser or the model that was swapped, goes on with it.
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            tensor.copy_(tensor.index_select(axis, torch.from_numpy(order).to(tensor.device)))


def _reorder_conv_(conv: nn.Conv2d, reads: Channels, writes: Channels) -> None:
    _reorder_(conv, "weight", writes)
    _reorder_(conv, "bias", writes)
    if conv.groups == 1:
        _reorder_(conv, "weight", reads, 1)
    if isinstance(conv, GatheredConv2d):
        renumber_lists_(
            conv,
            lambda listed: np.flatnonzero(np.isin(reads, listed)),
            lambda listed: np.flatnonzero(np.isin(writes, listed)),
        )


def _apply_(graphs: list[Graph], heads: list[list[Head]], classes: Classes, source: np.ndarray) -> int:
    """Moves parameters, statistics and lists; returns how many channels of convolutions moved."""

    def order(value: Value) -> Channels:
        first = classes.first[value]
        return source[first : first + (value.channels or 0)] - first

    done: set[nn.Module] = set()
    moved = 0
    for number, op in enumerate(graphs[0].ops):
        # A batch norm per domain is another module in each domain's recording.
        modules: dict[Any, None] = dict.fromkeys(graph.ops[number].module for graph in graphs)
        for module in modules:
            if module is None or module in done or op.fixed:
                continue
            done.add(module)
            writes = order(op.output)
            if isinstance(module, nn.Conv2d):
                moved += int((writes != np.arange(len(writes))).sum())
                _reorder_conv_(module, order(op.inputs[0]), writes)
            else:
                for name in ("weight", "bias", "running_mean", "running_var"):
                    _reorder_(module, name, writes)
    # Values of other domains' recordings have the same names.
    values = {value.name: value for value in classes.first}
    for head in (head for its_heads in heads for head in its_heads):
        if head.linear not in done:
            done.add(head.linear)
            _reorder_(head.linear, "weight", head.columns(order(values[head.value.name])), 1)
    return moved


def order_channels_(
    model: nn.Module, example_input: Tensor | tuple[object, ...] | None = None, block: int = 16
) -> OrderReport:
    """Puts the channels of a network, in place, in an order in which the domains' lists are long runs and whole blocks.

    Every domain's result stays as it was, up to the rounding of sums in another order: filters, biases, batch norms (of
    every domain), what reads them, also classifiers behind a flattening or a mean, and all lists move together, through
    sums and concatenations. Channels of inputs, of results and around operations that are not known keep their place.
    Channels that are in the same lists, of all domains and of all layers that read a stream, go side by side; where no
    order was found that leaves fewer multiply-adds on covered channels, a group of channels stays as it is.

    Call it once, when lists are final, before :func:`bap_kernels.plan`: plans made earlier must be made anew
    (``planned.remake()``), and a checkpoint or a table from before no longer fits. Parameters stay the same objects;
    what optimisers keep for them does not move along.

    Args:
        model: a swapped network in eval mode, with the lists of all domains attached.
        example_input: what the model is called with; only shapes matter. None tries square images.
        block: channels that a kernel reads at once. Blocks of 8 and 16 are considered and reported in any case.

    Returns:
        An :class:`OrderReport`, which prints cover and runs before and after; its ``table`` holds the new lists.

    Raises:
        TypeError: if ``block`` is no integer.
        ValueError: if ``block`` is not positive, no layer was swapped, or a mixed batch is set, and as
            :func:`bap_kernels.plan`. Nothing is changed if an error is raised.
        NotImplementedError: as :func:`bap_kernels.prune_unused_`.

    Examples:
        >>> from torch import nn
        >>> import bap_kernels as bk
        >>> model = bk.swap_(nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 4, 1)).eval())
        >>> lists = {"birds": {"2": bk.ChannelLists([1, 9, 17, 30])}, "cars": {"2": bk.ChannelLists([1, 17, 30])}}
        >>> print(bk.order_channels_(bk.attach_(model, lists)))
        2 lists: blocks of 8 12.5% -> 43.8%, blocks of 16 10.9% -> 21.9%, mean run 1.0 -> 3.5; 32 channels moved
          2: blocks of 8 12.5% -> 43.8%, blocks of 16 10.9% -> 21.9%, mean run 1.0 -> 3.5
        >>> model[2].lists["cars"]
        ChannelLists(in_index=[1, 2, 3], out_index=None)
    """
    check_module("order_channels_", model)
    if not isinstance(block, int) or isinstance(block, bool):
        raise TypeError(f"order_channels_(): expected `block` to be an int, got {type(block).__name__}.")
    if block < 1:
        raise ValueError(f"order_channels_(): expected `block` to be positive, got {block}. Hint: 8 or 16.")
    domains = check_and_list_domains("order_channels_", model)
    # Recordings differ only in the modules that layers hold for each domain.
    recorded = domains if any(domain_layers(model)) else domains[:1]
    graphs = [trace_shapes("order_channels_", model, example_input, domain, unread=True) for domain in recorded]
    classes = tied_channels(graphs[0])
    heads = [heads_of(graph) for graph in graphs]
    keep_unknown(classes, graphs[0], {op for head in heads[0] for op in head.steps})
    classes.keep_whole_classes()
    lists = _lists(graphs, classes, domains)
    sizes = sorted({*_BLOCKS, block})
    start = np.arange(len(classes.kept))
    source = start
    for group in _groups(classes):
        better = _improved(source, group, lists, sizes)
        source = source if better is None else better
    reports = []
    for listed in lists:
        old, new = listed.in_order(start), listed.in_order(source)
        cover = {size: (covered(old, size), covered(new, size)) for size in sizes}
        of = (listed.op.name, listed.domain, listed.side, int(old.sum()), len(old), listed.macs)
        reports.append(ListOrder(*of, (runs(old), runs(new)), cover))
    moved = _apply_(graphs, heads, classes, source)
    return OrderReport(tuple(reports), moved, table_of(model, domains))
