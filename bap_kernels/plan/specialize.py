"""A small network of PyTorch's own layers for one domain.

It has the plan's layout without its fusion: every convolution keeps the listed filters and slices, every batch norm the
stored channels, and where a tensor has several consumers each takes its channels by a slice or by index_select.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bap_kernels._arguments import check_module
from bap_kernels.flow.arguments import map_leaves
from bap_kernels.flow.graph import Channels, Graph, Op, Value, computed_groups, dense_size
from bap_kernels.flow.liveness import Liveness
from bap_kernels.flow.norms import norm_parts
from bap_kernels.flow.ops import Call
from bap_kernels.nn.conv import GatheredConv2d, MaskedConv2d
from bap_kernels.nn.replaceable import has_own_forward
from bap_kernels.plan.compare import largest_error, tolerance_of
from bap_kernels.plan.domain_view import InDomain
from bap_kernels.plan.effective_conv import conv_of
from bap_kernels.plan.example import trace_shapes
from bap_kernels.plan.fx_calls import WriteCall
from bap_kernels.plan.layout import Fetch, Layout
from bap_kernels.plan.trace import call_copied, check_reach, run_masked

__all__ = ["specialize"]

_IN_PLACE = {"relu": nn.ReLU, "relu6": nn.ReLU6}


def _plain(module: nn.Module) -> nn.Module:
    """A copy without the package's layers; unlisted slices are zero, as the code around them expects full width."""
    for part in module.modules():
        if isinstance(part, InDomain) or (isinstance(part, GatheredConv2d) and has_own_forward(part)):
            name = type(part.module if isinstance(part, InDomain) else part).__name__
            raise NotImplementedError(
                f"specialize(): expected layers with lists to be called by their class's forward, got a {name} with "
                "another function in its place. Hint: delattr(layer, 'forward')."
            )
    copied = copy.deepcopy(module)
    for name, layer in list(copied.named_modules()):
        if isinstance(layer, GatheredConv2d):
            parent, _, child = name.rpartition(".")
            conv = _dense(layer)
            if not name:
                return conv
            setattr(copied.get_submodule(parent), child, conv)
    return copied


def _dense(layer: GatheredConv2d) -> nn.Conv2d:
    lists = layer.channels
    weight, bias = layer.weight.detach().clone(), layer.bias
    bias = None if bias is None else bias.detach().clone()
    if lists.in_index is not None and layer.groups == 1:
        unread = torch.ones(layer.in_channels, dtype=torch.bool, device=weight.device)
        unread[lists.in_index.long()] = False
        weight[:, unread] = 0
    if lists.out_index is not None:
        listed = lists.out_index.long()
        if isinstance(layer, MaskedConv2d):
            unwritten = torch.ones(layer.out_channels, dtype=torch.bool, device=weight.device)
            unwritten[listed] = False
            weight[unwritten] = 0
            if bias is not None:
                bias[unwritten] = 0
        else:
            weight, bias = weight[listed], None if bias is None else bias[listed]
    return _conv_like(layer, weight, bias, layer.groups)


def _conv_like(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None, groups: int, padding: Any = None) -> nn.Conv2d:
    mode = conv.padding_mode if padding is None else "zeros"
    padding = conv.padding if padding is None else padding
    return conv_of(weight, bias, (conv.stride, padding, conv.dilation, groups), mode)


class _SmallNetwork:
    def __init__(self, graph: Graph, layout: Layout, device: torch.device | None, round_to: int) -> None:
        self.layout, self.device = layout, device
        self.round_to = round_to
        self.widths: dict[Any, int] = {}  # of nodes whose tensor has channels behind the stored ones: all of them
        self.producer = graph.producer()
        self.module = fx.GraphModule(nn.Module(), fx.Graph(), "Specialized")
        self.graph = self.module.graph
        self.node: dict[Value, Any] = {}
        self.fetched: dict[tuple[Value, bytes, bool], Any] = {}
        self.writing: set[fx.Node] = set()  # nodes that write, though nothing reads what they return

    def call_layer(self, name: str, layer: nn.Module, *args: Any, **kwargs: Any) -> fx.Node:
        """A node that calls a layer, under its name in the model where that is free."""
        used = {known for known, _ in self.module.named_modules()}
        free, number = name, 2
        while free in used:
            free, number = f"{name}_{number}", number + 1
        self.module.add_submodule(free, layer)
        return self.graph.call_module(free, args, kwargs)

    def call(self, name: str, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
        """A node that calls what an operation calls."""
        kwargs = kwargs or {}
        if isinstance(call, Call):
            args, kwargs, call = (*args, *call.args), {**call.kwargs, **kwargs}, call.target
        if isinstance(call, WriteCall):
            return self.write(name, call, args, kwargs)
        if isinstance(call, nn.Module):
            return self.call_layer(name, _plain(call), *args, **kwargs)
        if isinstance(call, str):
            return self.graph.call_method(call, args, kwargs)
        return self.graph.call_function(call, args, kwargs)

    def write(self, name: str, call: WriteCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        """A node that writes to a copy of one of its arguments; the copy is what is read afterwards."""
        clone, args, kwargs = call.with_argument(
            args, kwargs, lambda written: self.graph.call_function(torch.clone, (written,))
        )
        self.writing.add(self.call(name, call.target, args, kwargs))
        return clone

    def constant(self, tensor: Tensor) -> fx.Node:
        name = f"_constant{len(list(self.module.named_buffers()))}"
        self.module.register_buffer(name, tensor.to(self.device))
        return self.graph.get_attr(name)

    def select(self, x: Any, channels: Channels) -> fx.Node:
        return self.graph.call_function(torch.index_select, (x, 1, self.constant(torch.from_numpy(channels))))

    def width(self, count: int, value: Value) -> int:
        """Channels that a tensor with so many channels of a value has."""
        return count if count == value.channels else -(-count // self.round_to) * self.round_to

    def with_width(self, x: Any, count: int, width: int) -> Any:
        if width != count:
            self.widths[x] = width
        return x

    def fetch(self, value: Value, channels: Channels, wide: bool = False) -> Any:
        """A node with these channels; with ``wide`` there may be others behind them, up to a rounded number."""
        fetch = self.layout.fetch(value, channels)
        x, stored = self.node[value], len(self.layout.stored[value])
        present, count = self.widths.get(x, stored), len(channels)
        width = self.width(count, value) if wide else count
        if fetch is None and present == width:
            return x
        key = (value, channels.tobytes(), wide)
        if key not in self.fetched:
            fetch = fetch or Fetch(np.arange(stored), np.zeros(0), None)
            self.fetched[key] = self.with_width(self._fetched(x, fetch, present, width, value), count, width)
        return self.fetched[key]

    def _fetched(self, x: Any, fetch: Fetch, present: int, width: int, value: Value) -> Any:
        positions, fill, order, begin = fetch.positions, fetch.fill, fetch.order, fetch.begin
        more = width - len(positions) - len(fill)
        view = more if order is None and not len(fill) and begin is not None else 0
        if view and begin + len(positions) + view > present:  # type: ignore[operator]
            view = 0
        count = len(positions) + view
        if begin is None:
            x = self.select(x, positions)
        elif count < present:
            x = self.graph.call_function(operator.getitem, (x, (slice(None), slice(begin, begin + count))))
        more -= view
        if order is not None:
            order, more = np.append(order, np.repeat(order[:1], more)), 0
        if len(fill) + more:
            x = self.graph.call_function(F.pad, (x, (0, 0, 0, 0, 0, len(fill) + more)))
        if fill.any():
            added = torch.zeros(1, count + len(fill) + more, 1, 1, dtype=value.dtype)
            added[0, count : count + len(fill), 0, 0] = torch.from_numpy(fill).to(added.dtype)
            x = self.graph.call_function(operator.add, (x, self.constant(added)))
        return x if order is None else self.select(x, order)

    def whole(self, value: Value) -> Any:
        return self.node[value] if value.channels is None else self.fetch(value, np.arange(value.channels))

    def with_nodes(self, part: Any) -> Any:
        """Arguments in which values are replaced by nodes of all their channels, in the dense network's order."""
        return map_leaves(part, lambda leaf: self.whole(leaf) if isinstance(leaf, Value) else leaf)

    def convert(self, op: Op) -> Any:
        stored = self.layout.stored.get(op.output, np.arange(0))
        if op.kind == "input":
            return self.graph.placeholder(op.name)
        if op.kind == "output":
            return self.graph.output(self.with_nodes(op.args[0]))
        if op.kind == "opaque":
            assert isinstance(op.call, Call)
            if not op.inputs and op.call.args and isinstance(op.call.args[0], Tensor):
                return self.constant(op.call.args[0].detach().clone())
            args, kwargs = self.with_nodes(op.args), self.with_nodes(op.kwargs)
            if op.mutates:
                args = (self.graph.call_function(torch.clone, (args[0],)), *args[1:])
            return self.call(op.name, op.call, args, kwargs)
        if op.kind == "size":
            call, args = dense_size(op) if op.tells_channels else (op.call, op.args)
            return self.call(op.name, call, (self.node[op.inputs[0]], *args))
        if op.kind == "conv":
            return self.conv(op, stored)
        if op.kind in ("depthwise", "grouped"):
            return self.grouped(op, stored)
        if op.kind == "take":
            return self.fetch(op.inputs[0], op.reads[stored], wide=True)
        if op.kind == "cat":
            chain = self.layout.chains[op]
            pairs = zip(op.inputs, chain.stored, strict=False)
            x = self.graph.call_function(torch.cat, ([self.fetch(*pair) for pair in pairs if len(pair[1])], 1))
            width = self.width(len(stored), op.output)
            if width > len(stored):
                x = self.graph.call_function(F.pad, (x, (0, 0, 0, 0, 0, width - len(stored))))
            return self.with_width(x, len(stored), width)
        if op.kind == "pad":
            return self.fetch(op.inputs[0], stored - op.before, wide=True)
        wide = not (op.fixed or op.args or op.kwargs)
        reads = tuple(self.fetch(value, stored, wide) for value in op.aligned)
        width = self.widths.get(reads[0], len(stored))
        if any(self.widths.get(x, len(stored)) != width for x in reads):
            reads, width = tuple(self.fetch(value, stored) for value in op.aligned), len(stored)
        return self.with_width(self.aligned(op, reads, stored, width), len(stored), width)

    def aligned(self, op: Op, reads: tuple[Any, ...], stored: Channels, width: int) -> Any:
        """A node of norm, map or binary."""
        if op.kind == "norm":
            return self.call_layer(op.name, _norm_like(op.module, stored, width), reads[0])
        if op.act in _IN_PLACE and op.kind == "map":
            alone = len(op.inputs[0].consumers) == 1 and reads[0] is self.node[op.inputs[0]]
            if alone and self.producer[op.inputs[0]].kind in ("conv", "depthwise", "norm", "binary"):
                return self.call_layer(op.name, _IN_PLACE[op.act](inplace=True), reads[0])
        if op.args or op.kwargs:
            return self.call(op.name, op.call, (*reads, *self.with_nodes(op.args)), self.with_nodes(op.kwargs))
        return self.call(op.name, op.call, reads if len(reads) > 1 or op.kind == "map" else reads * 2)

    def grouped(self, op: Op, stored: Channels) -> fx.Node:
        conv = op.conv
        written, reads, groups = computed_groups(op, stored)
        filters = torch.from_numpy(written)
        weight = conv.weight.detach()[filters]
        bias = None if conv.bias is None else conv.bias.detach()[filters]
        depthwise = op.kind == "depthwise" and groups == len(written) == len(reads)
        x = self.fetch(op.inputs[0], reads, wide=depthwise)
        width = self.widths.get(x, len(reads)) if depthwise else len(stored)
        if depthwise:
            weight, bias = _padded(weight, width), None if bias is None else _padded(bias, width)
            groups = width
        y = self.call_layer(op.name, _conv_like(conv, weight, bias, groups, op.padding), x)
        kept = np.searchsorted(written, stored)
        if op.kind != "depthwise" and not np.array_equal(kept, np.arange(len(written))):
            width = self.width(len(stored), op.output)
            y = self.select(y, np.append(kept, np.repeat(kept[:1], width - len(stored))))
        return self.with_width(y, len(stored), width)

    def conv(self, op: Op, stored: Channels) -> fx.Node:
        conv, source = op.conv, op.inputs[0]
        constant, available = self.layout.constant[source], self.layout.stored[source]
        # In the order in which they are stored; constants other than zero last.
        is_read = np.zeros(len(constant), dtype=bool)
        is_read[op.reads[~(constant[op.reads] == 0)]] = True
        read = np.concatenate([available[is_read[available]], np.flatnonzero(is_read & ~np.isnan(constant))])
        empty = len(read) == 0
        read = available[:1] if empty else read
        weight = conv.weight.detach()[torch.from_numpy(op.writes[stored])][:, torch.from_numpy(read)]
        bias = None if conv.bias is None else conv.bias.detach()[torch.from_numpy(op.writes[stored])]
        x, width = self.fetch(source, read, wide=True), self.width(len(stored), op.output)
        present = self.widths.get(x, len(read))
        # Zeros for what is behind the listed channels, and zeros there in the result.
        weight = F.pad(weight * 0 if empty else weight, (0, 0, 0, 0, 0, present - len(read)))
        bias = None if bias is None else _padded(bias, width)
        y = self.call_layer(op.name, _conv_like(conv, _padded(weight, width), bias, 1, op.padding), x)
        return self.with_width(y, len(stored), width)


def _padded(tensor: Tensor, length: int, value: float = 0.0) -> Tensor:
    """The tensor with constants behind it along its first axis."""
    more = length - len(tensor)
    return torch.cat([tensor, tensor.new_full((more, *tensor.shape[1:]), value)]) if more else tensor


def _norm_like(norm: nn.Module | None, channels: Channels, width: int) -> nn.BatchNorm2d:
    parts = None if norm is None else norm_parts(norm)
    assert parts is not None
    small = parts.plain()
    if isinstance(norm, nn.BatchNorm2d):
        small.momentum = norm.momentum
    index = torch.from_numpy(channels)
    small.num_features = width
    for name, parameter in list(small._parameters.items()):
        if parameter is not None:
            small._parameters[name] = nn.Parameter(_padded(parameter.detach()[index], width, float(name == "weight")))
    for name, buffer in list(small._buffers.items()):
        if buffer is not None and buffer.dim():
            small._buffers[name] = _padded(buffer[index].clone(), width, float(name == "running_var"))
    return small


def _check(model: nn.Module, domain: str | None, graph: Graph, small: fx.GraphModule, example: Any) -> None:
    """Compares with the masked dense network, on the example or on random images of the graph's size."""
    expected = graph.expected
    if example is None:
        if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
            return
        (value,) = (op.output for op in graph.ops if op.kind == "input")
        weight = next(model.parameters())
        numbers = torch.randn(value.shape or (), generator=torch.Generator().manual_seed(0))
        example = (numbers.to(weight.device, value.dtype),)
        check_reach("specialize", model, domain, graph.recording, example, graph.draws)
        expected = run_masked(model, domain, example, graph.draws)
    example = example if isinstance(example, tuple) else (example,)
    share, error, dtype = largest_error(call_copied(small, example, graph.draws), expected)
    limit = tolerance_of(dtype)
    if not share <= limit:
        raise RuntimeError(
            f"specialize(): expected the small network to equal the masked dense network to {limit:.1e} of its largest "
            f"result, got {share:.1e} (an error of {error:.3g}). Hint: give an `example_input` as in use. "
            "`check=False` leaves this comparison out. Else it is a defect: please report the network."
        )


def _refuse_hooked(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if any(isinstance(module.__dict__.get(tensor), Tensor) for tensor in ("weight", "bias")):
            raise NotImplementedError(
                f"specialize(): expected weights that are parameters, got {name!r}, a {type(module).__name__} whose "
                "weight a hook computes in every forward. Hint: torch.nn.utils.prune.remove(layer, 'weight'), or "
                "remove_weight_norm or remove_spectral_norm, makes it a parameter."
            )


def specialize(
    model: nn.Module,
    domain: str | None = None,
    example_input: Tensor | tuple[Any, ...] | None = None,
    *,
    check: bool = True,
    round_to: int = 1,
) -> fx.GraphModule:
    """Makes a small network of PyTorch's own layers that computes what one domain computes.

    For other engines, for ``torch.export``, ONNX and ``torch.compile``. Weights are copies of the slices that are used;
    layers keep their names. Where the plan of :func:`bap_kernels.plan` reads a tensor through a list, this network has
    an ``index_select``.

    It has the model's steps in eval mode: dropout and what else passes its input on is left out, and is not there after
    ``.train()`` either. Nothing is frozen: parameters are new ones that need gradients, batch norms would learn in
    training mode. Flags, and the dtypes that the model's code asks tensors for, are those of the example.

    Args:
        model: a network in eval mode, swapped and with lists.
        domain: whose lists; None keeps all channels.
        example_input: what the model is called with: a tensor, or a tuple of all arguments. None tries square images.
        check: compare with the masked dense network on the example, or on random numbers where none was given.
        round_to: round the channels of compact tensors up to multiples of this, with zeros in the weights that write
            and read the ones added. Fast kernels of GPUs want 8 for 16-bit dtypes and 4 for float32.

    Returns:
        A ``torch.fx.GraphModule`` in eval mode.

    Raises:
        ValueError: as :func:`bap_kernels.plan`, and if ``round_to`` is less than 1.
        RuntimeError: if the result differs from the masked dense network.
        NotImplementedError: for layers with lists that are called through a function set on the instance, and for
            weights that a hook computes, as those of :mod:`torch.nn.utils.prune`.

    Examples:
        >>> import torch, bap_kernels as bk
        >>> from torch import nn
        >>> model = bk.swap_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)).eval())
        >>> model = bk.attach_(model, bk.ChannelTable({"birds": {"2": bk.ChannelLists([1, 4, 5])}}))
        >>> small = bk.specialize(model, "birds")
        >>> [tuple(p.shape) for p in small.parameters() if p.dim() == 4]
        [(3, 3, 3, 3), (4, 3, 1, 1)]
        >>> [tuple(p.shape) for p in bk.specialize(model, "birds", round_to=4).parameters() if p.dim() == 4]
        [(4, 3, 3, 3), (4, 4, 1, 1)]
    """
    check_module("specialize", model)
    if round_to < 1:
        raise ValueError(f"specialize(): expected `round_to` to be at least 1, got {round_to}.")
    _refuse_hooked(model)
    graph = trace_shapes("specialize", model, example_input, domain)
    graph.warn_if_nothing("specialize")
    layout = Layout(graph, Liveness(graph))
    builder = _SmallNetwork(graph, layout, next((p.device for p in model.parameters()), None), round_to)
    with torch.no_grad():
        for op in graph.ops:
            live = layout.live.get(op.output)
            if op.kind in ("input", "opaque") or live is None or live.any():
                builder.node[op.output] = builder.convert(op)
    builder.graph.eliminate_dead_code(lambda node: node in builder.writing or node.is_impure())
    builder.module.delete_all_unused_submodules()
    builder.module.recompile()
    small = builder.module.eval()
    if check:
        _check(model, domain, graph, small, example_input)
    return small
