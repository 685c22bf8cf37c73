"""Turns a graph with its layout into a flat list of steps.

Every group of `fuse` becomes one step at the place of its last operation. A convolution reads the stored input through
a list of places, with a second list for the weight's channels; where the input is stored as exactly its list, no list
is left. All others are given the channels they want, by a view where these are the first ones that are stored, else by
a gather.
"""

from __future__ import annotations

import functools
from typing import Any
from typing import cast as typed

import numpy as np
import torch
from torch import Tensor, nn

from bap_kernels.functional import four_sided
from bap_kernels.nn.norms import norm_parts
from bap_kernels.plan import steps
from bap_kernels.plan.copies import Copy, copies, stored_reads
from bap_kernels.plan.fuse import Group, fuse
from bap_kernels.plan.graph import Channels, Graph, Op, Value, folded_norm, groups_of, members
from bap_kernels.plan.layout import Chain, Layout
from bap_kernels.plan.operations import dense_size
from bap_kernels.plan.program import Program
from bap_kernels.plan.steps import Slot, Step

__all__ = ["lower"]


def _list(channels: Channels, all_of: int, device: torch.device) -> Tensor | None:
    """An int32 list; None for all channels in order."""
    if np.array_equal(channels, np.arange(all_of)):
        return None
    return torch.from_numpy(channels.astype(np.int32)).to(device)


class _Lowering:
    def __init__(
        self,
        graph: Graph,
        layout: Layout,
        copies: dict[Value, Copy],
        memory_format: torch.memory_format,
        device: torch.device,
    ) -> None:
        self.graph, self.layout, self.copies = graph, layout, copies
        self.copied: dict[Group, int] = {}  # readers of copies, and their slots
        self.memory_format, self.device = memory_format, device
        self.steps: list[Step] = []
        self.inputs: list[int] = []
        self.result: Any = None
        self.slots = 0
        self.slot: dict[Value, int] = {}
        self.buffers: dict[Chain, int] = {}
        self.written: dict[Chain, int] = {}  # parts in the buffer
        self.fetched: dict[tuple[Value, bytes], int] = {}

    def new_slot(self) -> int:
        self.slots += 1
        return self.slots - 1

    def emit(self, step: Step, op: Op, stored: int | None = None, note: str = "") -> None:
        step.name, step.note = op.name, note
        total = op.output.channels
        count = stored if stored is not None else len(self.layout.stored.get(op.output, ()))
        step.kept = "" if total is None else f"{count}/{total}"
        self.steps.append(step)

    def lists(self, channels: Channels, all_of: int) -> Tensor | None:
        return _list(channels, all_of, self.device)

    def fetch(self, value: Value, wanted: Channels, op: Op) -> int:
        """The slot of a tensor with these channels."""
        found = self.layout.fetch(value, wanted)
        if found is None:
            return self.slot[value]
        key = (value, wanted.tobytes())
        if key not in self.fetched:
            slot, out = self.slot[value], self.new_slot()
            stored = len(self.layout.stored[value])
            begin = found.begin
            if begin is not None and len(found.positions) < stored and found.order is None:
                step: Step = steps.ViewStep(slot, len(found.positions), out, begin)
                self.emit(step, op, len(found.positions))
                slot, out, index = out, (self.new_slot() if len(found.fill) else out), None
            else:
                index = self.lists(found.positions, stored)
            if index is not None or len(found.fill) or found.order is not None:
                zeros = len(found.fill) if not found.fill.any() else None
                fill = zeros if zeros else (torch.from_numpy(found.fill).to(self.device) if len(found.fill) else None)
                order = None if found.order is None else self.lists(found.order, len(found.order))
                self.emit(steps.FetchStep(index, fill, order, slot, out), op, len(wanted))
            self.fetched[key] = out
        return self.fetched[key]

    def whole(self, value: Value, op: Op) -> int:
        channels = value.channels
        return self.slot[value] if channels is None else self.fetch(value, np.arange(channels), op)

    def convert(self, op: Op, group: Group | None) -> None:
        out = op.output
        if op.kind == "output":
            self.result = self.handed(op, op.args[0])
            return
        self.slot[out] = self.new_slot()
        if group is not None:
            self.conv(group) if group.conv.kind == "conv" else self.grouped(group)
        elif op.kind == "input":
            self.inputs.append(self.slot[out])
            if out.channels is not None and out.dtype is not None and out.dtype.is_floating_point:
                self.emit(steps.InputStep(self.slot[out], self.memory_format), op)
        elif op.kind == "opaque":
            self.opaque(op)
        elif op.kind == "norm":
            self.norm(op)
        elif op.kind == "cat":
            self.cat(op)
        elif op.kind == "take":
            self.slot[out] = self.fetch(op.inputs[0], op.reads[self.layout.stored[out]], op)
        elif op.kind == "size":
            self.size(op)
        elif op.kind == "pad":
            # The constants are not stored, so the input already is the result.
            x, stored = op.inputs[0], self.layout.stored[out]
            self.slot[out] = self.fetch(x, stored - op.before, op)
        else:
            reads = tuple(self.fetch(x, self.layout.stored[out], op) for x in op.aligned)
            assert op.call is not None
            if op.args or op.kwargs:
                args = (Slot(reads[0]), *self.handed(op, op.args))
                self.call(op, op.call, args, self.handed(op, op.kwargs))
            elif op.kind == "map":
                self.emit(steps.MapStep(op.call, op.act, reads[0], self.slot[out]), op, note=_named(op.call))
            else:
                self.emit(steps.BinaryStep(op.call, reads, self.slot[out]), op, note=_named(op.call))

    def conv(self, group: Group) -> None:
        conv, op = group.conv.module, group.last
        assert isinstance(conv, nn.Conv2d)
        read, places = stored_reads(group, self.layout)
        if group in self.copied:
            x, positions, width = self.copied[group], np.arange(len(read)), len(read)
        elif places is not None:
            x, positions, width = self.slot[group.source], places, len(self.layout.stored[group.source])
        else:
            x = self.fetch(group.source, read, op)
            positions, width = np.arange(len(read)), len(read)
        written = group.conv.writes[self.layout.stored[op.output]]
        weight_index = self.lists(read, conv.in_channels)
        in_index = self.lists(positions, width)
        if weight_index is None and in_index is not None:
            weight_index = torch.from_numpy(read.astype(np.int32)).to(self.device)
        before: tuple[Tensor | None, Tensor | None, bool] = (None, None, group.in_relu)
        if group.in_norm is not None:
            before = (*_vectors(group.in_norm, read, conv.weight.dtype), group.in_relu)
        after: tuple[Tensor | None, Tensor | None] = (None, None)
        if group.norm is not None:
            after = _vectors(group.norm, self.layout.stored[op.output], conv.weight.dtype)
        reads: tuple[int, ...] = (x,)
        if group.residual is not None:
            reads = (x, self.fetch(group.residual, self.layout.stored[op.output], op))
        sides = typed("str | tuple[int, int]", conv.padding if group.conv.padding is None else group.conv.padding)
        padding = four_sided("plan", sides, conv.kernel_size, conv.stride, conv.dilation)
        lists = (in_index, self.lists(written, conv.out_channels), weight_index)
        cast = None if group.conv.output.dtype is conv.weight.dtype else group.conv.output.dtype
        step = steps.ConvStep(conv, padding, lists, before, after, group.relu, reads, self.slot[op.output], cast)
        text = f"reads {len(read)}/{conv.in_channels}" + (f" of {width} stored" if in_index is not None else "")
        copy = self.copies.get(op.output)
        if copy is not None:
            self.copied[copy.reader] = step.copy = self.new_slot()
            step.copy_index = torch.from_numpy(copy.positions.astype(np.int32)).to(self.device)
            text += f", stores {len(copy.positions)} again for {copy.reader.conv.name}"
        self.emit(step, op, note=text)
        step.name = group.conv.name

    def grouped(self, group: Group) -> None:
        conv, op = group.conv.conv, group.last
        stored = self.layout.stored[op.output]
        if group.conv.kind == "depthwise":
            written, reads, groups = group.conv.writes[stored], group.conv.reads[stored], len(stored)
        else:
            # Whole groups are computed.
            live = groups_of(group.conv, stored)
            written, groups = members(live, conv.out_channels // conv.groups), len(live)
            reads = members(live, conv.in_channels // conv.groups)
        filters = torch.from_numpy(written).to(self.device)
        weight = conv.weight.detach()[filters]
        bias = None if conv.bias is None else conv.bias.detach()[filters]
        if group.norm is not None:
            scale, shift = folded_norm(group.norm.module)  # type: ignore[arg-type]
            index = torch.from_numpy(stored).to(self.device) if group.conv.kind == "depthwise" else filters
            scale, shift = scale[index], shift[index]
            shift = shift if bias is None else shift + scale * bias.double()
            weight, bias = (weight.double() * scale.view(-1, 1, 1, 1)).to(weight.dtype), shift.to(weight.dtype)
        x = self.fetch(group.source, reads, op)
        padding = conv.padding if group.conv.padding is None else group.conv.padding
        options = (conv.stride, padding, conv.dilation, groups)
        note = "+norm" if group.norm is not None else ""
        if group.conv.kind == "depthwise":
            self.emit(steps.DepthwiseStep(options, weight, bias, x, self.slot[op.output]), op, note=note)
        else:
            step = steps.GroupedStep(options, weight, bias, x, self.slot[op.output])
            step.index = self.lists(np.searchsorted(written, stored), len(written))
            note = f"{groups}/{conv.groups} groups{', ' + note if note else ''}"
            self.emit(step, op, note=note)
        self.steps[-1].name = group.conv.name

    def norm(self, op: Op) -> None:
        assert op.module is not None
        parts, stored = norm_parts(op.module), self.layout.stored[op.output]
        assert parts is not None
        index = torch.from_numpy(stored).to(self.device)
        vectors = (parts.weight, parts.bias, parts.running_mean, parts.running_var)
        kept = tuple(None if one is None else one.detach()[index] for one in vectors)
        self.emit(steps.NormStep(kept, parts.eps, self.fetch(op.inputs[0], stored, op), self.slot[op.output]), op)

    def cat(self, op: Op) -> None:
        chain, out = self.layout.chains[op], self.slot[op.output]
        # Shorter concatenations that nothing reads were left out.
        begin = self.written.get(chain, 0)
        parts = [
            (self.fetch(part, stored, op), chain.width(number), len(stored))
            for number, (part, stored) in enumerate(zip(op.inputs, chain.stored, strict=False))
            if number >= begin and len(stored)
        ]
        if len(chain.members) == 1:
            self.emit(steps.CatStep(tuple(slot for slot, _, _ in parts), out), op)
            return
        width = chain.width(len(chain.parts))
        first = chain not in self.buffers
        if first:
            self.buffers[chain] = self.new_slot()
        # Under autocast parts may have several dtypes, and a shorter concatenation another one than a longer.
        dtypes = {value.dtype for value in (*chain.parts, *(member.output for member in chain.members))}
        mixed = len(dtypes) > 1
        if parts:
            dtype = functools.reduce(torch.promote_types, [one for one in dtypes if one is not None]) if mixed else None
            step = steps.BufferStep(parts, width, first, self.memory_format, self.buffers[chain], dtype)
            self.emit(step, op, width)
        self.written[chain] = len(op.inputs)
        own = op.output.dtype if mixed else None
        self.emit(steps.ViewStep(self.buffers[chain], chain.width(len(op.inputs)), out, dtype=own), op)

    def handed(self, op: Op, part: Any) -> Any:
        """Arguments with slots in the places of values, all channels in the dense network's order."""
        if isinstance(part, Value):
            return Slot(self.whole(part, op))
        if isinstance(part, (list, tuple)):
            return type(part)([self.handed(op, one) for one in part])
        if isinstance(part, dict):
            return {key: self.handed(op, one) for key, one in part.items()}
        if isinstance(part, slice):
            return slice(*(self.handed(op, one) for one in (part.start, part.stop, part.step)))
        return part

    def opaque(self, op: Op) -> None:
        assert op.call is not None
        args, kwargs = self.handed(op, op.args), self.handed(op, op.kwargs)
        if op.mutates and args and isinstance(args[0], Slot):
            copied = self.new_slot()
            self.emit(steps.MapStep(torch.clone, "", args[0].number, copied), op)
            args = (Slot(copied), *args[1:])
        self.call(op, op.call, args, kwargs)

    def call(self, op: Op, call: Any, args: Any, kwargs: Any) -> None:
        reads = tuple(_slots_in((args, kwargs)))
        self.emit(steps.OpaqueStep(call, args, kwargs, reads, self.slot[op.output]), op, note=_named(call))

    def size(self, op: Op) -> None:
        assert op.call is not None
        # Any of its channels will do.
        call, args = dense_size(op) if op.tells_channels else (op.call, op.args)
        self.call(op, call, (Slot(self.slot[op.inputs[0]]), *args), {})


def _vectors(norm: Op, channels: Channels, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and shift of the listed channels; float32, as the op adds in it, except for float64."""
    scale, shift = folded_norm(norm.module)  # type: ignore[arg-type]
    index = torch.from_numpy(channels).to(scale.device)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    return scale[index].to(wanted), shift[index].to(wanted)


def _named(call: Any) -> str:
    return type(call).__name__ if isinstance(call, nn.Module) else repr(call)


def _slots_in(part: Any) -> list[int]:
    if isinstance(part, Slot):
        return [part.number]
    if isinstance(part, dict):
        part = list(part.values())
    if isinstance(part, slice):
        part = [part.start, part.stop, part.step]
    return [slot for one in part for slot in _slots_in(one)] if isinstance(part, (list, tuple)) else []


def lower(graph: Graph, layout: Layout, memory_format: torch.memory_format, device: torch.device) -> Program:
    """The steps that compute a graph's result.

    Args:
        graph: the operations.
        layout: what each value stores.
        memory_format: of the inputs, which all results follow.
        device: of lists and vectors.
    """
    fused = fuse(graph, layout)
    lowering = _Lowering(graph, layout, copies(fused, layout, memory_format), memory_format, device)
    # Ordinary tensors: packed weights are kept for lists whose changes could be seen.
    with torch.inference_mode(False), torch.no_grad():
        for op in graph.ops:
            group = fused.get(op)
            dead = op.output in layout.live and not layout.live[op.output].any()
            if (op in fused and group is None) or (dead and op.kind not in ("input", "opaque")):
                continue
            lowering.convert(op, group)
    return Program(lowering.steps, lowering.slots, lowering.inputs, lowering.result, _slots_in(lowering.result))
