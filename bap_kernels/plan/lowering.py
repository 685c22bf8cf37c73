"""Turns a graph with its layout into a flat list of steps.

Every fused convolution becomes one step, in the order of its last operation. A convolution reads the stored input
through a list of positions, with a second list for the weight's channels; where the input is stored as exactly its
list, no list is needed. All other steps get the channels that they read by a view where these are the first ones that
are stored, else by a gather.
"""

from __future__ import annotations

import functools
from typing import Any
from typing import cast as typed

import numpy as np
import torch
from torch import Tensor, nn

from bap_kernels.flow.arguments import map_leaves
from bap_kernels.flow.graph import Channels, Graph, Op, Value, computed_groups, dense_size
from bap_kernels.flow.norms import folded_norm, norm_parts
from bap_kernels.functional import four_sided
from bap_kernels.plan import steps
from bap_kernels.plan.dual_store import DualStore, dual_stores, stored_reads
from bap_kernels.plan.fuse import FusedConv, fuse
from bap_kernels.plan.layout import Chain, Layout
from bap_kernels.plan.program import Program
from bap_kernels.plan.steps import Slot, Step, slots_in

__all__ = ["lower"]


class _Lowering:
    def __init__(
        self,
        layout: Layout,
        dual_stores: dict[Value, DualStore],
        memory_format: torch.memory_format,
        device: torch.device,
    ) -> None:
        self.layout, self.dual_stores = layout, dual_stores
        self.dual_slots: dict[FusedConv, int] = {}  # of convolutions that read a dual store
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

    def index_of(self, channels: Channels, width: int) -> Tensor | None:
        """An int32 list; None for all channels in order."""
        if np.array_equal(channels, np.arange(width)):
            return None
        return torch.from_numpy(channels.astype(np.int32)).to(self.device)

    def fetch(self, value: Value, channels: Channels, op: Op) -> int:
        """The slot of a tensor with these channels."""
        fetch = self.layout.fetch(value, channels)
        if fetch is None:
            return self.slot[value]
        key = (value, channels.tobytes())
        if key not in self.fetched:
            slot, out = self.slot[value], self.new_slot()
            stored = len(self.layout.stored[value])
            begin = fetch.begin
            if begin is not None and len(fetch.positions) < stored and fetch.order is None:
                step: Step = steps.ViewStep(slot, len(fetch.positions), out, begin)
                self.emit(step, op, len(fetch.positions))
                slot, out, index = out, (self.new_slot() if len(fetch.fill) else out), None
            else:
                index = self.index_of(fetch.positions, stored)
            if index is not None or len(fetch.fill) or fetch.order is not None:
                zeros = len(fetch.fill) if not fetch.fill.any() else None
                fill = zeros if zeros else (torch.from_numpy(fetch.fill).to(self.device) if len(fetch.fill) else None)
                order = None if fetch.order is None else self.index_of(fetch.order, len(fetch.order))
                self.emit(steps.FetchStep(index, fill, order, slot, out), op, len(channels))
            self.fetched[key] = out
        return self.fetched[key]

    def whole(self, value: Value, op: Op) -> int:
        channels = value.channels
        return self.slot[value] if channels is None else self.fetch(value, np.arange(channels), op)

    def convert(self, op: Op, fused: FusedConv | None) -> None:
        out = op.output
        if op.kind == "output":
            self.result = self.with_slots(op, op.args[0])
            return
        self.slot[out] = self.new_slot()
        if fused is not None:
            self.conv(fused) if fused.conv.kind == "conv" else self.grouped(fused)
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
                args = (Slot(reads[0]), *self.with_slots(op, op.args))
                self.call(op, op.call, args, self.with_slots(op, op.kwargs))
            elif op.kind == "map":
                self.emit(steps.MapStep(op.call, op.act, reads[0], self.slot[out]), op, note=_call_name(op.call))
            else:
                self.emit(steps.BinaryStep(op.call, reads, self.slot[out]), op, note=_call_name(op.call))

    def conv(self, fused: FusedConv) -> None:
        conv, op, source = fused.conv.conv, fused.last, fused.source
        stored = self.layout.stored[op.output]
        read, stored_positions = stored_reads(fused, self.layout)
        if fused not in self.dual_slots and stored_positions is not None:
            x, positions, width = self.slot[source], stored_positions, len(self.layout.stored[source])
        else:
            x = self.dual_slots[fused] if fused in self.dual_slots else self.fetch(source, read, op)
            positions, width = np.arange(len(read)), len(read)
        weight_index = self.index_of(read, conv.in_channels)
        in_index = self.index_of(positions, width)
        if weight_index is None and in_index is not None:
            weight_index = torch.from_numpy(read.astype(np.int32)).to(self.device)
        before: tuple[Tensor | None, Tensor | None, bool] = (None, None, fused.in_relu)
        if fused.in_norm is not None:
            before = (*_vectors(fused.in_norm, read, conv.weight.dtype), fused.in_relu)
        after: tuple[Tensor | None, Tensor | None] = (None, None)
        if fused.norm is not None:
            after = _vectors(fused.norm, stored, conv.weight.dtype)
        reads: tuple[int, ...] = (x,)
        if fused.residual is not None:
            reads = (x, self.fetch(fused.residual, stored, op))
        sides = typed("str | tuple[int, int]", conv.padding if fused.conv.padding is None else fused.conv.padding)
        padding = four_sided("plan", sides, conv.kernel_size, conv.stride, conv.dilation)
        lists = (in_index, self.index_of(fused.conv.writes[stored], conv.out_channels), weight_index)
        cast = None if fused.conv.output.dtype is conv.weight.dtype else fused.conv.output.dtype
        step = steps.ConvStep(conv, padding, lists, before, after, fused.relu, reads, self.slot[op.output], cast)
        text = f"reads {len(read)}/{conv.in_channels}" + (f" of {width} stored" if in_index is not None else "")
        dual = self.dual_stores.get(op.output)
        if dual is not None:
            self.dual_slots[dual.consumer] = step.dual_store = self.new_slot()
            step.dual_index = torch.from_numpy(dual.positions.astype(np.int32)).to(self.device)
            text += f", stores {len(dual.positions)} again for {dual.consumer.conv.name}"
        self.emit(step, op, note=text)
        step.name = fused.conv.name

    def grouped(self, fused: FusedConv) -> None:
        conv, op = fused.conv.conv, fused.last
        stored = self.layout.stored[op.output]
        written, reads, groups = computed_groups(fused.conv, stored)
        filters = torch.from_numpy(written).to(self.device)
        weight = conv.weight.detach()[filters]
        bias = None if conv.bias is None else conv.bias.detach()[filters]
        if fused.norm is not None:
            scale, shift = folded_norm(fused.norm.module)  # type: ignore[arg-type]
            index = torch.from_numpy(stored).to(self.device) if fused.conv.kind == "depthwise" else filters
            scale, shift = scale[index], shift[index]
            shift = shift if bias is None else shift + scale * bias.double()
            weight, bias = (weight.double() * scale.view(-1, 1, 1, 1)).to(weight.dtype), shift.to(weight.dtype)
        x = self.fetch(fused.source, reads, op)
        padding = conv.padding if fused.conv.padding is None else fused.conv.padding
        options = (conv.stride, padding, conv.dilation, groups)
        note = "+norm" if fused.norm is not None else ""
        if fused.conv.kind == "depthwise":
            self.emit(steps.DepthwiseStep(options, weight, bias, x, self.slot[op.output]), op, note=note)
        else:
            step = steps.GroupedStep(options, weight, bias, x, self.slot[op.output])
            step.index = self.index_of(np.searchsorted(written, stored), len(written))
            note = f"{groups}/{conv.groups} groups{', ' + note if note else ''}"
            self.emit(step, op, note=note)
        self.steps[-1].name = fused.conv.name

    def norm(self, op: Op) -> None:
        assert op.module is not None
        parts, stored = norm_parts(op.module), self.layout.stored[op.output]
        assert parts is not None
        index = torch.from_numpy(stored).to(self.device)
        vectors = (parts.weight, parts.bias, parts.running_mean, parts.running_var)
        kept = tuple(None if vector is None else vector.detach()[index] for vector in vectors)
        self.emit(steps.NormStep(kept, parts.eps, self.fetch(op.inputs[0], stored, op), self.slot[op.output]), op)

    def cat(self, op: Op) -> None:
        chain, out = self.layout.chains[op], self.slot[op.output]
        # Shorter concatenations that nothing reads have no step.
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
            known = [dtype for dtype in dtypes if dtype is not None]
            dtype = functools.reduce(torch.promote_types, known) if mixed else None
            step = steps.BufferStep(parts, width, first, self.memory_format, self.buffers[chain], dtype)
            self.emit(step, op, width)
        self.written[chain] = len(op.inputs)
        own = op.output.dtype if mixed else None
        self.emit(steps.ViewStep(self.buffers[chain], chain.width(len(op.inputs)), out, dtype=own), op)

    def with_slots(self, op: Op, part: Any) -> Any:
        """Arguments in which values are replaced by slots of all their channels, in the dense network's order."""
        return map_leaves(part, lambda leaf: Slot(self.whole(leaf, op)) if isinstance(leaf, Value) else leaf)

    def opaque(self, op: Op) -> None:
        assert op.call is not None
        args, kwargs = self.with_slots(op, op.args), self.with_slots(op, op.kwargs)
        if op.mutates and args and isinstance(args[0], Slot):
            clone = self.new_slot()
            self.emit(steps.MapStep(torch.clone, "", args[0].number, clone), op)
            args = (Slot(clone), *args[1:])
        self.call(op, op.call, args, kwargs)

    def call(self, op: Op, call: Any, args: Any, kwargs: Any) -> None:
        reads = tuple(slots_in((args, kwargs)))
        self.emit(steps.OpaqueStep(call, args, kwargs, reads, self.slot[op.output]), op, note=_call_name(call))

    def size(self, op: Op) -> None:
        assert op.call is not None
        # Any of its channels will do.
        call, args = dense_size(op) if op.tells_channels else (op.call, op.args)
        self.call(op, call, (Slot(self.slot[op.inputs[0]]), *args), {})


def _vectors(norm: Op, channels: Channels, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and shift of the listed channels; float32, as the op adds in it, except for float64."""
    scale, shift = folded_norm(norm.module)  # type: ignore[arg-type]
    index = torch.from_numpy(channels).to(scale.device)
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    return scale[index].to(accumulation), shift[index].to(accumulation)


def _call_name(call: Any) -> str:
    return type(call).__name__ if isinstance(call, nn.Module) else repr(call)


def lower(graph: Graph, layout: Layout, memory_format: torch.memory_format, device: torch.device) -> Program:
    """The steps that compute a graph's result.

    Args:
        graph: the operations.
        layout: what each value stores.
        memory_format: of the inputs, which all results follow.
        device: of lists and vectors.
    """
    fused = fuse(graph, layout)
    lowering = _Lowering(layout, dual_stores(fused, layout, memory_format), memory_format, device)
    # Tensors made in inference mode have no version, without which packed weights are not kept for them.
    with torch.inference_mode(False), torch.no_grad():
        for op in graph.ops:
            conv = fused.get(op)
            dead = op.output in layout.live and not layout.live[op.output].any()
            if (op in fused and conv is None) or (dead and op.kind not in ("input", "opaque")):
                continue
            lowering.convert(op, conv)
    return Program(lowering.steps, lowering.slots, lowering.inputs, lowering.result)
