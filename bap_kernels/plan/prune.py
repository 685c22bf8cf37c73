"""Drops in place what no domain uses.

The model keeps its own code, so tensors that it adds must stay equally wide: a class of channels that go together stays
if any domain reads any of them. Then each convolution loses the filters of its result's classes that went and the
slices of its input's, each batch norm their entries, and every list is renumbered. An input slice that no domain of
this layer reads stays where another layer reads the same channel.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bap_kernels._arguments import check_module
from bap_kernels._warn import warn
from bap_kernels.flow.classes import Classes, keep_unknown, tied_channels, unknown
from bap_kernels.flow.graph import Channels, Graph, first_reasons
from bap_kernels.flow.liveness import Liveness
from bap_kernels.nn.conv import GatheredConv2d
from bap_kernels.plan.example import conv_macs, trace_shapes
from bap_kernels.plan.in_place import check_and_list_domains, renumber_lists_, table_of
from bap_kernels.table import ChannelTable

__all__ = ["PruneReport", "prune_unused_"]


@dataclass(frozen=True)
class PruneReport:
    """What :func:`bap_kernels.prune_unused_` dropped.

    Attributes:
        parameters: (before, after), all parameters of the model.
        macs: (before, after), multiply-adds of all convolutions, swapped or not, for one call of the example without
            lists.
        layers: {layer: ((C_out, C_in) before, (C_out, C_in) after)} of the convolutions.
        table: the renumbered lists.
        obstacles: {step: reason} of what keeps channels that no domain reads.
    """

    parameters: tuple[int, int]
    macs: tuple[int, int]
    layers: dict[str, tuple[tuple[int, int], tuple[int, int]]]
    table: ChannelTable
    obstacles: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        totals = [("parameters", self.parameters), ("MACs", self.macs)]
        lines = [f"{name}: {old:,} -> {new:,} ({new / max(old, 1):.1%})" for name, (old, new) in totals]
        for name, (old, new) in self.layers.items():
            if old != new:
                lines.append(f"  {name}: {old[1]} -> {old[0]} became {new[1]} -> {new[0]} channels")
        if self.obstacles:
            lines.append(f"  unused channels stay: {first_reasons(self.obstacles, 10)}")
        return "\n".join(lines)


def _obstacles(classes: Classes, graph: Graph) -> dict[str, str]:
    """{step: reason} of what keeps channels that no domain reads; to be called before these are marked."""
    leaders = classes.leaders()
    read = np.zeros(len(leaders), dtype=bool)
    read[leaders[classes.kept]] = True
    obstacles: dict[str, str] = {}
    for op, values, reason in unknown(graph, widths=True):
        if any(not read[classes.leaders_of(value, leaders)].all() for value in values):
            obstacles.setdefault(op.name, reason)
    return obstacles


def _kept_classes(graphs: list[Graph]) -> tuple[Classes, dict[str, str]]:
    graph = graphs[0]
    classes = tied_channels(graph)
    for op in graph.ops:
        if op.kind == "pad":
            # The model's code pads by a fixed number.
            (value,) = op.inputs
            padded = np.ones(op.output.channels or 0, dtype=bool)
            padded[op.before : op.before + (value.channels or 0)] = False
            classes.keep(op.output, np.flatnonzero(padded))
    for other in graphs:
        # All domains have the same recording, so operations correspond by number.
        live = Liveness(other, constants=False).live
        for op, theirs in zip(graph.ops, other.ops, strict=True):
            if op.output in classes.first:
                classes.keep(op.output, np.flatnonzero(live[theirs.output]))
    obstacles = _obstacles(classes, graph)
    keep_unknown(classes, graph, widths=True)
    classes.keep_whole_classes()
    for value in classes.first:
        # A layer needs at least one channel; a slice may have none.
        if len(classes.kept_of(value)) == 0:
            classes.keep(value, slice(1))
            classes.keep_whole_classes()
    return classes, obstacles


def _slice_(module: nn.Module, name: str, index: Tensor, axis: int = 0) -> None:
    stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    for store in stores:
        tensor = store.get(name)
        if tensor is None:
            continue
        sliced = tensor.detach().index_select(axis, index.to(tensor.device))
        is_parameter = isinstance(tensor, nn.Parameter)
        store[name] = nn.Parameter(sliced, tensor.requires_grad) if is_parameter else sliced


def _shrink_conv_(conv: nn.Conv2d, reads: Channels, writes: Channels) -> None:
    filters = conv.out_channels // conv.groups  # of one group
    _slice_(conv, "weight", torch.from_numpy(writes))
    _slice_(conv, "bias", torch.from_numpy(writes))
    if conv.groups == 1:
        _slice_(conv, "weight", torch.from_numpy(reads), 1)
    else:
        conv.groups = len(writes) // filters
    conv.in_channels, conv.out_channels = len(reads), len(writes)
    if isinstance(conv, GatheredConv2d):
        renumber_lists_(
            conv,
            lambda listed: np.searchsorted(reads, listed[np.isin(listed, reads)]),
            lambda listed: np.searchsorted(writes, listed[np.isin(listed, writes)]),
        )


def prune_unused_(model: nn.Module, example_input: Tensor | tuple[object, ...] | None = None) -> PruneReport:
    """Drops, in place, every filter, input slice and batch-norm entry that no domain uses, and renumbers every list.

    The pruning of *Budget-Aware Pruning* (arXiv 2309.11464): what is left serves all domains, each with the result that
    it had. It follows the channels through sums, concatenations and poolings; where an operation is not known, all
    channels around it stay. Parameters are replaced by smaller ones, so optimisers must be made anew.

    Args:
        model: a swapped network in eval mode, with the lists of all domains attached.
        example_input: what the model is called with; only shapes matter. None tries square images.

    Returns:
        A :class:`PruneReport`, which prints what went, and what kept channels that no domain reads; its ``table`` holds
        the new lists. A warning names the first obstacles if there are unused channels and none could be dropped.

    Raises:
        ValueError: if no layer was swapped, and as :func:`bap_kernels.plan`.
        NotImplementedError: for out-lists in layers whose result is compact, for parameters in two layers, and for
            switched layers, which :func:`bap_kernels.swap_` replaces.

    Examples:
        >>> from torch import nn
        >>> import bap_kernels as bk
        >>> model = bk.swap_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)).eval())
        >>> lists = {"birds": {"2": bk.ChannelLists([1, 4])}, "cars": {"2": bk.ChannelLists([4, 5])}}
        >>> print(bk.prune_unused_(bk.attach_(model, lists)))
        parameters: 276 -> 106 (38.4%)
        MACs: 12,222,432 -> 4,583,412 (37.5%)
          0: 3 -> 8 became 3 -> 3 channels
          2: 8 -> 4 became 3 -> 4 channels
        >>> model[2].lists["cars"]
        ChannelLists(in_index=[1, 2], out_index=None)
    """
    check_module("prune_unused_", model)
    domains = check_and_list_domains("prune_unused_", model)
    graphs = [trace_shapes("prune_unused_", model, example_input, domain, unread=True) for domain in domains]
    classes, obstacles = _kept_classes(graphs)
    macs = [conv_macs(model, example_input, graphs[0], domains[0])]
    before = sum(parameter.numel() for parameter in model.parameters())
    layers: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {}
    done: set[nn.Module] = set()
    for number, op in enumerate(graphs[0].ops):
        if op.module is None or op.fixed:
            continue
        reads, writes = classes.kept_of(op.inputs[0]), classes.kept_of(op.output)
        if isinstance(op.module, nn.Conv2d):
            conv = op.module
            if conv not in done:
                old = conv.out_channels, conv.in_channels
                _shrink_conv_(conv, reads, writes)
                layers[op.name] = old, (len(writes), len(reads))
        else:
            # A batch norm per domain is another module in each domain's recording.
            for norm in dict.fromkeys(graph.ops[number].module for graph in graphs):
                if norm is not None and norm not in done:
                    for name in ("weight", "bias", "running_mean", "running_var"):
                        _slice_(norm, name, torch.from_numpy(writes))
                    norm.num_features = len(writes)  # type: ignore[assignment]
                    done.add(norm)
        done.add(op.module)
    after = sum(parameter.numel() for parameter in model.parameters())
    macs.append(conv_macs(model, example_input, graphs[0], domains[0]))
    if obstacles and after == before:
        warn(f"prune_unused_(): no channel was dropped, though some are read in no domain. {first_reasons(obstacles)}")
    return PruneReport((before, after), (macs[0], macs[1]), layers, table_of(model, domains), obstacles)
