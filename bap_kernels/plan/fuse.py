"""Which operations are fused into a convolution.

After it: a batch norm, a sum with another value, a ReLU or ReLU6, each the only consumer of what comes before. Before
it: a batch norm, or a batch norm and a ReLU, whose result only convolutions read (networks that normalise before they
convolve); each of these convolutions then does that work while it reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from bap_kernels.flow.graph import Graph, Op, Value
from bap_kernels.plan.layout import Layout

__all__ = ["FusedConv", "fuse"]

# Each convolution repeats the work before it.
_MOST_CONSUMERS = 2
# The largest result of each activation.
_LARGEST: dict[str, float | None] = {"relu": None, "relu6": 6.0}


@dataclass(eq=False)
class FusedConv:
    """A convolution with the operations that it absorbs; the result is that of the last one."""

    conv: Op
    source: Value  # what it reads, before `in_norm`
    last: Op
    in_norm: Op | None = None
    in_relu: bool = False
    norm: Op | None = None
    residual: Value | None = None
    relu: bool = False
    out_max: float | None = None  # the largest result of the ReLU
    absorbed: list[Op] = field(default_factory=list)

    def absorb(self, op: Op) -> None:
        """Adds an operation after the last one."""
        self.last = op
        self.absorbed.append(op)


def _only_consumer(value: Value) -> Op | None:
    return value.consumers[0] if len(value.consumers) == 1 else None


def _is_relu(op: Op | None) -> bool:
    return op is not None and op.kind == "map" and op.act == "relu"


def _fuse_after(fused: FusedConv, layout: Layout, absorbed: set[Op]) -> None:
    following = _only_consumer(fused.last.output)
    if following is not None and following.kind == "norm" and following.output.dtype is fused.last.output.dtype:
        fused.norm = following
        fused.absorb(following)
        following = _only_consumer(following.output)
    if fused.conv.kind == "grouped":
        return
    is_sum = following is not None and following.kind == "binary" and following.act == "add"
    if following is not None and is_sum and fused.conv.kind == "conv" and following not in absorbed:
        first, second = following.inputs if len(following.inputs) == 2 else (following.inputs[0],) * 2
        stored = layout.stored[following.output]
        # Under autocast the terms may have several dtypes.
        same_dtype = first.dtype is second.dtype is following.output.dtype
        # Where this term is a constant, it is not computed: the sum needs a step of its own.
        if same_dtype and first is not second and np.isnan(layout.constant[fused.last.output][stored]).all():
            fused.residual = second if first is fused.last.output else first
            fused.absorb(following)
            following = _only_consumer(following.output)
    if following is not None and following.kind == "map" and following.act in _LARGEST:
        fused.relu, fused.out_max = True, _LARGEST[following.act]
        fused.absorb(following)


def _fuse_before(convs: dict[Op, FusedConv], producer: dict[Value, Op], layout: Layout, absorbed: set[Op]) -> None:
    consumers: dict[Value, list[FusedConv]] = {}
    for fused in convs.values():
        consumers.setdefault(fused.source, []).append(fused)
    for value, its in consumers.items():
        if len(its) != len(value.consumers) or len(its) > _MOST_CONSUMERS:
            continue
        if any(fused.conv.kind != "conv" or fused.conv.output.dtype is not value.dtype for fused in its):
            continue
        relu = producer[value] if _is_relu(producer[value]) else None
        norm = producer[relu.inputs[0]] if relu is not None else producer[value]
        if norm.kind != "norm" or norm in absorbed or (relu is not None and (_only_consumer(norm.output) is not relu)):
            continue
        if relu in absorbed or not np.isnan(layout.constant[value]).all():
            continue
        for fused in its:
            fused.source, fused.in_norm, fused.in_relu = norm.inputs[0], norm, relu is not None
            fused.absorbed.extend(op for op in (norm, relu) if op is not None)


def fuse(graph: Graph, layout: Layout) -> dict[Op, FusedConv | None]:
    """The convolution whose fused result an operation is, or None for operations that are absorbed otherwise.

    Operations that are not in the result stand alone.
    """
    convs: dict[Op, FusedConv] = {}
    absorbed: set[Op] = set()
    for op in graph.ops:
        if op.kind in ("conv", "depthwise", "grouped"):
            fused = convs[op] = FusedConv(op, op.inputs[0], op)
            _fuse_after(fused, layout, absorbed)
            absorbed.update(fused.absorbed)
    _fuse_before(convs, graph.producer(), layout, absorbed)
    result: dict[Op, FusedConv | None] = {}
    for fused in convs.values():
        result.update(dict.fromkeys([fused.conv, *fused.absorbed]))
    for fused in convs.values():
        result[fused.last] = fused
    return result
