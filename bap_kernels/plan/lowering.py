"""Turns a graph with its layout into a flat list of steps.

Every fused convolution becomes one step, in the order of its last operation. A convolution reads the stored input
through a list of positions, with a second list for the weight's channels; where the input is stored as exactly its
list, no list is needed. How all other steps get their channels: :mod:`bap_kernels.plan.step_writer`.

On a GPU compact tensors are wider than their lists are long, in whole vectors of 16 bytes, which cuDNN and the kernels
need to be fast: channels behind the stored ones hold any finite numbers, and whoever reads them has zeros for them in
its weight. Convolutions with such tensors get compact copies of their filters.
"""

from __future__ import annotations

import functools
from typing import Any
from typing import cast as typed

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bap_kernels.flow.graph import Channels, Graph, Op, Value, computed_groups, dense_size
from bap_kernels.flow.norms import folded_norm, norm_parts
from bap_kernels.functional import four_sided
from bap_kernels.plan import conv_steps, steps
from bap_kernels.plan.dual_store import DualStore, dual_stores, stored_reads
from bap_kernels.plan.fuse import FusedConv, fuse
from bap_kernels.plan.layout import Chain, Layout
from bap_kernels.plan.linear import linear_of
from bap_kernels.plan.pooling import pooling_of
from bap_kernels.plan.program import Program
from bap_kernels.plan.step_writer import StepWriter
from bap_kernels.plan.steps import Slot, slots_in

__all__ = ["lower", "vector_bytes"]

# Bytes of a vector that GPUs move at once.
_VECTOR = 16


def vector_bytes(device: torch.device) -> int:
    """Bytes to whose multiples a pixel of a compact tensor is rounded up on a device; 0: it is not.

    CPU kernels take any width at the same speed, and would compute more.
    """
    return _VECTOR if device.type == "cuda" else 0


class _Lowering(StepWriter):
    """Turns each operation into steps."""

    def __init__(
        self,
        layout: Layout,
        dual_stores: dict[Value, DualStore],
        memory_format: torch.memory_format,
        device: torch.device,
        multiple: int,
    ) -> None:
        super().__init__(layout, device, multiple)
        self.dual_stores, self.memory_format = dual_stores, memory_format
        self.dual_slots: dict[FusedConv, int] = {}  # of convolutions that read a dual store
        self.inputs: list[int] = []
        self.result: Any = None
        self.buffers: dict[Chain, int] = {}
        self.written: dict[Chain, int] = {}  # parts in the buffer

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
            self.slot[out] = self.fetch(op.inputs[0], op.reads[self.layout.stored[out]], op, wide=True)
        elif op.kind == "size":
            self.size(op)
        elif op.kind == "pad":
            # The constants are not stored, so the input already is the result.
            x, stored = op.inputs[0], self.layout.stored[out]
            self.slot[out] = self.fetch(x, stored - op.before, op, wide=True)
        else:
            stored = self.layout.stored[out]
            wide = not (op.fixed or op.args or op.kwargs)
            reads = tuple(self.fetch(x, stored, op, wide) for x in op.aligned)
            width = self.widths.get(reads[0], len(stored))
            if any(self.widths.get(slot, len(stored)) != width for slot in reads):
                reads, width = tuple(self.fetch(x, stored, op) for x in op.aligned), len(stored)
            assert op.call is not None
            if op.args or op.kwargs:
                args = (Slot(reads[0]), *self.with_slots(op, op.args))
                self.call(op, op.call, args, self.with_slots(op, op.kwargs))
            elif op.kind == "map":
                call = pooling_of(op.call) or op.call
                self.emit(steps.MapStep(call, op.act, reads[0], self.slot[out]), op, note=_call_name(op.call))
            else:
                self.emit(steps.BinaryStep(op.call, reads, self.slot[out]), op, note=_call_name(op.call))
            if width != len(stored):
                self.set_width(self.slot[out], width)

    def conv(self, fused: FusedConv) -> None:
        conv, op, source = fused.conv.conv, fused.last, fused.source
        stored = self.layout.stored[op.output]
        read, stored_positions = stored_reads(fused, self.layout)
        if fused not in self.dual_slots and stored_positions is not None:
            x, positions = self.slot[source], stored_positions
            present = self.widths.get(x, len(self.layout.stored[source]))
            positions = self.more_positions(positions, len(self.layout.stored[source]), present, source)
        else:
            x = self.dual_slots[fused] if fused in self.dual_slots else self.fetch(source, read, op, wide=True)
            present = self.widths.get(x, len(read))
            positions = np.arange(present)
        residual = None if fused.residual is None else self.fetch(fused.residual, stored, op, wide=True)
        width = self.width(len(stored), op.output)
        if residual is not None:
            width = self.widths.get(residual, len(stored))
        compact = len(positions) > len(read) or width > len(stored)
        in_index = self.index_of(positions, present)
        weight_index = self.index_of(read, conv.in_channels)
        out_index = self.index_of(fused.conv.writes[stored], conv.out_channels)
        if weight_index is None and in_index is not None:
            weight_index = torch.from_numpy(read.astype(np.int32)).to(self.device)
        if compact:
            every = torch.arange(len(positions), dtype=torch.int32, device=self.device)
            weight_index, out_index = (None if in_index is None else every), None
        before: tuple[Tensor | None, Tensor | None, bool] = (None, None, fused.in_relu)
        if fused.in_norm is not None:
            scale, shift = _vectors(fused.in_norm, read, conv.weight.dtype, len(positions))
            before = (scale, shift, fused.in_relu)
        after: tuple[Tensor | None, Tensor | None] = (None, None)
        if fused.norm is not None:
            after = _vectors(fused.norm, stored, conv.weight.dtype, width)
        reads: tuple[int, ...] = (x,) if residual is None else (x, residual)
        sides = typed("str | tuple[int, int]", conv.padding if fused.conv.padding is None else fused.conv.padding)
        padding = four_sided("plan", sides, conv.kernel_size, conv.stride, conv.dilation)
        lists = (in_index, out_index, weight_index)
        cast = None if fused.conv.output.dtype is conv.weight.dtype else fused.conv.output.dtype
        step = conv_steps.ConvStep(conv, padding, lists, before, after, fused.relu, reads, self.slot[op.output], cast)
        step.out_max = fused.out_max
        if compact:
            step.parameters = _widened(conv, fused.conv.writes[stored], read, (width, len(positions)))
        text = f"reads {len(read)}/{conv.in_channels}"
        text += f" of {len(self.layout.stored[source])} stored" if in_index is not None else ""
        dual = self.dual_stores.get(op.output)
        if dual is not None:
            self.dual_slots[dual.consumer] = step.dual_store = self.new_slot()
            again = self.more_positions(dual.positions, len(stored), width, op.output)
            step.dual_index = torch.from_numpy(again.astype(np.int32)).to(self.device)
            if len(again) > len(dual.positions):
                self.widths[step.dual_store] = len(again)
            text += f", stores {len(dual.positions)} again for {dual.consumer.conv.name}"
        self.emit(step, op, note=text)
        step.name = fused.conv.name
        if width > len(stored):
            self.set_width(self.slot[op.output], width)

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
        depthwise = fused.conv.kind == "depthwise" and groups == len(written) == len(reads)
        x = self.fetch(fused.source, reads, op, wide=depthwise)
        width = self.widths.get(x, len(reads)) if depthwise else len(stored)
        if width > len(stored):
            more = width - len(stored)
            groups, weight = groups + more, F.pad(weight, (0, 0, 0, 0, 0, 0, 0, more))
            bias = None if bias is None else F.pad(bias, (0, more))
        padding = typed("str | tuple[int, int]", conv.padding if fused.conv.padding is None else fused.conv.padding)
        options = (conv.stride, padding, conv.dilation, groups)
        note = "+norm" if fused.norm is not None else ""
        if fused.conv.kind == "depthwise":
            sides = four_sided("plan", padding, conv.kernel_size, conv.stride, conv.dilation)
            cast = None if fused.conv.output.dtype is weight.dtype else fused.conv.output.dtype
            after = (fused.relu, fused.out_max, x, self.slot[op.output], cast)
            self.emit(conv_steps.DepthwiseStep(options, sides, weight, bias, *after), op, note=note)
        else:
            step = conv_steps.GroupedStep(options, weight, bias, x, self.slot[op.output])
            kept = np.searchsorted(written, stored)
            width = self.width(len(stored), op.output)
            if width > len(stored) and len(kept) < len(written):
                kept = np.append(kept, np.repeat(kept[:1], width - len(stored)))
            else:
                width = len(stored)
            step.index = self.index_of(kept, len(written))
            note = f"{groups}/{conv.groups} groups{', ' + note if note else ''}"
            self.emit(step, op, note=note)
        self.steps[-1].name = fused.conv.name
        if width > len(stored):
            self.set_width(self.slot[op.output], width)

    def norm(self, op: Op) -> None:
        assert op.module is not None
        parts, stored = norm_parts(op.module), self.layout.stored[op.output]
        assert parts is not None
        index = torch.from_numpy(stored).to(self.device)
        vectors = (parts.weight, parts.bias, parts.running_mean, parts.running_var)
        x = self.fetch(op.inputs[0], stored, op, wide=True)
        more = self.widths.get(x, len(stored)) - len(stored)
        # A variance of 1 is no trouble to divide by.
        kept = tuple(
            None if vector is None else F.pad(vector.detach()[index], (0, more), value=value)
            for vector, value in zip(vectors, (0.0, 0.0, 0.0, 1.0), strict=True)
        )
        self.emit(steps.NormStep(kept, parts.eps, x, self.slot[op.output]), op)
        if more:
            self.set_width(self.slot[op.output], len(stored) + more)

    def cat(self, op: Op) -> None:
        chain, out = self.layout.chains[op], self.slot[op.output]
        # Shorter concatenations that nothing reads have no step.
        begin = self.written.get(chain, 0)
        parts = [
            (self.fetch(part, stored, op), chain.width(number), len(stored))
            for number, (part, stored) in enumerate(zip(op.inputs, chain.stored, strict=False))
            if number >= begin and len(stored)
        ]
        total = chain.width(len(chain.parts))
        width = self.width(total, chain.members[-1].output)
        # Under autocast parts may have several dtypes, and a shorter concatenation another one than a longer.
        dtypes = {value.dtype for value in (*chain.parts, *(member.output for member in chain.members))}
        mixed = len(dtypes) > 1
        known = [dtype for dtype in dtypes if dtype is not None]
        dtype = functools.reduce(torch.promote_types, known) if mixed else None
        if len(chain.members) == 1:
            if width == total:
                self.emit(steps.CatStep(tuple(slot for slot, _, _ in parts), out), op)
                return
            step = steps.BufferStep(parts, width, True, self.memory_format, out, dtype)
            step.zeros_from, step.fresh = total, True
            self.emit(step, op)
            self.set_width(out, width)
            return
        first = chain not in self.buffers
        if first:
            self.buffers[chain] = self.new_slot()
        if parts:
            step = steps.BufferStep(parts, width, first, self.memory_format, self.buffers[chain], dtype)
            # Shorter concatenations are read with what is behind them.
            step.zeros_from = 0 if self.multiple > 1 else None
            self.emit(step, op, total)
        self.written[chain] = len(op.inputs)
        own = op.output.dtype if mixed else None
        stored = chain.width(len(op.inputs))
        present = min(self.width(stored, op.output), width)
        self.emit(steps.ViewStep(self.buffers[chain], present, out, dtype=own), op, stored)
        if present > stored:
            self.set_width(out, present)

    def opaque(self, op: Op) -> None:
        assert op.call is not None
        args, kwargs = self.with_slots(op, op.args), self.with_slots(op, op.kwargs)
        if op.mutates and args and isinstance(args[0], Slot):
            clone = self.new_slot()
            self.emit(steps.MapStep(torch.clone, "", args[0].number, clone), op)
            args = (Slot(clone), *args[1:])
        alone = len(args) == 1 and not kwargs
        self.call(op, (linear_of(op.call) if alone else None) or op.call, args, kwargs)

    def call(self, op: Op, call: Any, args: Any, kwargs: Any) -> None:
        reads = tuple(slots_in((args, kwargs)))
        self.emit(steps.OpaqueStep(call, args, kwargs, reads, self.slot[op.output]), op, note=_call_name(call))

    def size(self, op: Op) -> None:
        assert op.call is not None
        # Any of its channels will do.
        call, args = dense_size(op) if op.tells_channels else (op.call, op.args)
        self.call(op, call, (Slot(self.slot[op.inputs[0]]), *args), {})


def _vectors(norm: Op, channels: Channels, dtype: torch.dtype, width: int) -> tuple[Tensor, Tensor]:
    """Scale and shift of the listed channels, with zeros up to a width; float32, as the op adds, except for float64."""
    scale, shift = folded_norm(norm.module)  # type: ignore[arg-type]
    index = torch.from_numpy(channels).to(scale.device)
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    more = (0, width - len(channels))
    return F.pad(scale[index].to(accumulation), more), F.pad(shift[index].to(accumulation), more)


def _widened(
    conv: nn.Conv2d, filters: Channels, channels: Channels, shape: tuple[int, int]
) -> dict[str, Tensor | None]:
    """Weight and bias of the listed filters over the listed channels, in that order, with zeros up to a shape."""
    rows, columns = (torch.from_numpy(listed).to(conv.weight.device) for listed in (filters, channels))
    more = shape[0] - len(filters), shape[1] - len(channels)
    weight = F.pad(conv.weight.detach()[rows][:, columns], (0, 0, 0, 0, 0, more[1], 0, more[0]))
    bias = None if conv.bias is None else F.pad(conv.bias.detach()[rows], (0, more[0]))
    return {"weight": weight, "bias": bias}


def _call_name(call: Any) -> str:
    return type(call).__name__ if isinstance(call, nn.Module) else repr(call)


def lower(
    graph: Graph, layout: Layout, memory_format: torch.memory_format, device: torch.device, vector: int = 0
) -> Program:
    """The steps that compute a graph's result.

    Args:
        graph: the operations.
        layout: what each value stores.
        memory_format: of the inputs, which all results follow.
        device: of lists and vectors.
        vector: bytes to whose multiples a pixel of a compact tensor is rounded up; 0: it is not.
    """
    fused = fuse(graph, layout)
    sizes = [value.dtype.itemsize for value in graph.values if value.dtype is not None and value.channels is not None]
    multiple = max(1, vector // min(sizes, default=1))
    lowering = _Lowering(layout, dual_stores(fused, layout, memory_format), memory_format, device, multiple)
    # Tensors made in inference mode have no version, without which packed weights are not kept for them.
    with torch.inference_mode(False), torch.no_grad():
        for op in graph.ops:
            conv = fused.get(op)
            dead = op.output in layout.live and not layout.live[op.output].any()
            if (op in fused and conv is None) or (dead and op.kind not in ("input", "opaque")):
                continue
            lowering.convert(op, conv)
    return Program(lowering.steps, lowering.slots, lowering.inputs, lowering.result)
