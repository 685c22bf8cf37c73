"""Turns the steps of a recording into operations on channels."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from bap_kernels.flow.graph import Channels, Op, Value
from bap_kernels.flow.norms import norm_parts
from bap_kernels.flow.ops import (
    COMMUTATIVE,
    Blur,
    Call,
    PadSame,
    Rule,
    asks_size,
    binary_rule,
    call_rule,
    has_hooks,
    is_same_padded_conv,
    is_spatial_slice,
    layer_rule,
    out_of_place,
    passes_input,
    rule_of,
    writes_to_input,
)
from bap_kernels.flow.rearrange import Labels, UnknownNumberError, moves, numbers, parts_of, sources_of
from bap_kernels.plan.domain_view import channels_of, frozen
from bap_kernels.plan.effective_conv import conv_of, effective_conv, is_plain, not_lowered_reason
from bap_kernels.plan.op_list import OpList
from bap_kernels.plan.recorded_steps import Specs

__all__ = ["Builder"]


class Builder(OpList):
    """Turns recorded steps into operations, in order.

    Args:
        root, specs, constants: as in :class:`bap_kernels.plan.op_list.OpList`.
        domain: whose lists.
        inputs: how many arguments the model is called with.

    Attributes:
        not_lowered: {convolution: why it is run as it is}.
    """

    def __init__(
        self, root: nn.Module, specs: Specs, domain: str | None, inputs: int, constants: dict[str, Tensor]
    ) -> None:
        super().__init__(root, specs, constants)
        self.domain = domain
        self.missing_inputs = inputs
        self.not_lowered: dict[str, str] = {}
        # Of results of split and the like: the tensor, and the channels of each part.
        self.parts: dict[fx.Node, tuple[Value, list[Channels]]] = {}
        self.labels: dict[fx.Node, tuple[Value, Labels]] = {}

    def build(self, nodes: Iterable[fx.Node]) -> list[Op]:
        """The operations of a recording's steps."""
        for node in nodes:
            self._convert(node)
        return self.ops

    def _convert(self, node: fx.Node) -> None:
        if node.op == "placeholder" and self.missing_inputs > 0:
            self.missing_inputs -= 1
            self._add(node, kind="input", inputs=[])
        elif node.op == "placeholder":
            # An argument that was left out keeps its default.
            self._add(node, kind="opaque", inputs=[], call=Call(_itself, node.args))
        elif node.op == "output":
            self._opaque(node, "output", None)
        elif node.op == "get_attr":
            call = Call(_itself, (self._attribute(str(node.target)),))
            self._add(node, kind="opaque", inputs=[], call=call, pure=True)
        else:
            module = self.root.get_submodule(str(node.target)) if node.op == "call_module" else None
            target: Any = module
            if module is None:
                target = str(node.target) if node.op == "call_method" else node.target
            name = str(node.target) if module is not None else node.name
            writes = writes_to_input(target, node.kwargs) or node.meta.get("writes", False)
            if not self._with_rule(node, target, module, name):
                self._opaque(node, name, target, writes)

    def _opaque(self, node: fx.Node, name: str, target: Any, mutates: bool = False) -> None:
        call = Call(frozen(target, self.domain) if isinstance(target, nn.Module) else target) if target else None
        args, kwargs = tuple(self._with_values(node.args)), dict(self._with_values(node.kwargs))
        kind = "output" if node.op == "output" else "opaque"
        inputs = self._values_in(node.args, node.kwargs)
        self._note_convolutions(name, target)
        pure = node in self.labels or bool(node.meta.get("pure"))
        self._add(
            node, kind=kind, inputs=inputs, call=call, args=args, kwargs=kwargs, name=name, mutates=mutates, pure=pure
        )

    def _note_convolutions(self, name: str, target: Any) -> None:
        """Notes why each convolution in a step without a rule has none."""
        if isinstance(target, nn.Conv2d):
            self.not_lowered[name] = not_lowered_reason(target)
        elif isinstance(target, nn.Module):
            for inner, module in target.named_modules():
                if isinstance(module, nn.Conv2d):
                    reason = f"inside {name!r} ({type(target).__name__}), which is run as one step"
                    self.not_lowered[f"{name}.{inner}"] = reason
        elif target in (torch.conv2d, nn.functional.conv2d):
            self.not_lowered[name] = "a call of F.conv2d whose weight is no parameter"

    def _with_rule(self, node: fx.Node, target: Any, module: nn.Module | None, name: str) -> bool:
        """Adds the step if there is a rule for it."""
        rule = rule_of(target)
        if rule is not None and rule.kind == "concat":
            return self._cat(node)
        args, named = node.args, node.kwargs
        if module is not None and not args and list(named) == ["input"]:
            args, named = (named["input"],), {}
        first = args[0] if args else None
        if isinstance(first, fx.Node) and first in self.parts and first not in self.values:
            # Its consumers are all of the form parts[number]: see `_parts`.
            whole, channels = self.parts[first]
            return self._take(node, whole, channels[node.args[1]])  # type: ignore[index]
        if module is None and isinstance(first, (int, float)) and len(node.args) == 2 and not node.kwargs:
            return self._number_first(node, target, first)
        x = self.values[first] if isinstance(first, fx.Node) else None
        if x is None or (module is not None and (has_hooks(module) or "forward" in module.__dict__)):
            return False
        rest, kwargs = tuple(args[1:]), dict(named)
        constant = not self._values_in(rest, kwargs)
        if constant and passes_input(target, rest, kwargs):
            self.values[node] = x
            return True
        if module is None and self._rearranged(node, x, target):
            return True
        if x.channels is None:
            return False
        if constant and not kwargs and asks_size(target, rest):
            return self._add(node, kind="size", inputs=[x], call=Call(target), args=rest)
        if module is None and self._parts(node, x, target, rest, kwargs):
            return True
        if len(self.specs[node][0] or ()) != 4:
            return False
        if module is not None:
            return constant and not rest and not kwargs and self._layer(node, x, module, name)
        target, kwargs = out_of_place(target, kwargs)
        if target in (torch.conv2d, nn.functional.conv2d):
            return self._called_conv(node, x, rest, kwargs)
        if target is nn.functional.pad and constant:
            return self._pad(node, x, rest, kwargs)
        if constant:
            return self._map(node, x, target, rest, kwargs)
        return self._binary(node, x, target, rest, kwargs) or self._map_with_values(node, x, target, rest, kwargs)

    def _number_first(self, node: fx.Node, target: Any, number: float) -> bool:
        """``2 * x``, ``1 - x`` and the like."""
        if not isinstance(node.args[1], fx.Node) or self.values[node.args[1]].channels is None:
            return False
        x = self.values[node.args[1]]
        if target in (operator.sub, torch.sub):
            call = Call(torch.rsub, (number,))
        elif target in COMMUTATIVE:
            call = Call(target, (number,))
        else:
            return False
        return self._add(node, kind="map", inputs=[x], call=call, elementwise=True)

    def _map(self, node: fx.Node, x: Value, target: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if is_spatial_slice(target, rest):
            return self._add(node, kind="map", inputs=[x], call=Call(target, rest))
        rule = call_rule(target, rest, kwargs)
        if rule is None and rest and not kwargs and isinstance(rest[0], (int, float)):
            # x + 1 and the like.
            rule = None if binary_rule(target, rest[1:], kwargs) is None else Rule("elementwise")
        if rule is None or self.specs[node][0][1] != x.channels:  # type: ignore[index]
            return False
        call = Call(target, rest, **kwargs)
        return self._add(node, kind="map", inputs=[x], call=call, act=rule.act, elementwise=rule.elementwise)

    def _map_with_values(
        self, node: fx.Node, x: Value, target: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Poolings and slices whose arguments other steps compute, such as sizes."""
        numbers_only = all(value.shape is None for value in self._values_in(rest, kwargs))
        has_rule = is_spatial_slice(target, rest) or call_rule(target, rest, kwargs) is not None
        if not has_rule or not numbers_only or self.specs[node][0][1] != x.channels:  # type: ignore[index]
            return False
        return self._add_map(node, x, target, rest, kwargs)

    def _add_map(self, node: fx.Node, x: Value, target: Any, rest: Any, kwargs: Any, zeros: bool = True) -> bool:
        args, named = tuple(self._with_values(rest)), dict(self._with_values(kwargs))
        inputs = [x, *self._values_in(rest, kwargs)]
        return self._add(node, kind="map", inputs=inputs, call=Call(target), args=args, kwargs=named, zeros=zeros)

    def _cat(self, node: fx.Node) -> bool:
        parts = node.args[0] if node.args else None
        axis = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        if not isinstance(parts, (list, tuple)) or axis not in (1, -3):
            return False
        values = [self.values[part] for part in parts if isinstance(part, fx.Node)]
        if len(values) != len(parts) or any(value.channels is None for value in values):
            return False
        return self._add(node, kind="cat", inputs=values)

    def _take(self, node: fx.Node, x: Value, reads: Channels) -> bool:
        return self._add(node, kind="take", inputs=[x], reads=reads)

    def _parts(self, node: fx.Node, x: Value, target: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Channels that the model's code takes: ``chunk``, ``split``, ``x[:, :8]``, a shuffle."""
        assert x.shape is not None
        try:
            parts = parts_of(target, x.shape[1], *numbers((rest, kwargs), self.specs))
        except UnknownNumberError:
            return False
        if parts is None:
            return False
        if isinstance(parts, np.ndarray):
            return self.specs[node][0] == (x.shape[0], len(parts), *x.shape[2:]) and self._take(node, x, parts)
        if not all(user.target is operator.getitem and isinstance(user.args[1], int) for user in node.users):
            return False
        self.parts[node] = x, parts
        return True

    def _rearranged(self, node: fx.Node, x: Value, target: Any) -> bool:
        """Channels in another order, by steps through other shapes: a channel shuffle."""
        first = node.args[0]
        source = self.labels.get(first)  # type: ignore[arg-type]
        if not moves(target):
            return False
        if source is None:
            if x.channels is None or x.shape is None:
                return False
            source = x, Labels.of(x.shape)
        try:
            labels = source[1].after(target, *numbers((node.args[1:], node.kwargs), self.specs))
        except UnknownNumberError:
            return False
        if labels is None or labels.shape != self.specs[node][0]:
            return False
        order = sources_of(labels, source[0].shape or ())
        if order is None:
            self.labels[node] = source[0], labels
            return False
        if first not in self.labels:
            return False  # a step by itself has a rule of its own, if any
        return self._take(node, source[0], order)

    def _layer(self, node: fx.Node, x: Value, module: nn.Module, name: str) -> bool:
        if isinstance(module, nn.Conv2d):
            return self._conv(node, x, module, name)
        parts = norm_parts(module)
        if parts is not None:
            if not parts.has_statistics or parts.channels != x.channels:
                return False
            return self._norm(node, x, module, parts.after, name)
        if isinstance(module, nn.ChannelShuffle):
            groups = module.groups
            return self._take(node, x, np.arange(x.channels or 0).reshape(groups, -1).T.ravel())
        known = layer_rule(module)
        if known is None:
            return isinstance(module, nn.PReLU) and self._prelu(node, x, module, name)
        call, rule = known
        # The model's own layer may have a filter for each channel.
        fixed = isinstance(call, Blur) and module.channels is not None
        fields = {"act": rule.act, "elementwise": rule.elementwise, "fixed": fixed}
        return self._add(node, kind="map", inputs=[x], call=call, name=name, **fields)

    def _norm(self, node: fx.Node, x: Value, module: nn.Module, after: Iterable[nn.Module], name: str) -> bool:
        shape, dtype = self.specs[node]
        value = self._add_op(Value(name, shape, dtype), kind="norm", inputs=[x], module=module)
        following = [layer for layer in after if has_hooks(layer) or not passes_input(layer, (), {})]
        for number, layer in enumerate(following):
            result = Value(f"{name}.after{number}", shape, dtype)
            known = None if has_hooks(layer) else layer_rule(layer)
            if known is None:
                # Whatever it does, on all channels; `mutates` makes it work on a copy.
                call = Call(layer)
                value = self._add_op(result, kind="opaque", inputs=[value], call=call, args=(value,), mutates=True)
            else:
                fields = {"call": known[0], "act": known[1].act, "elementwise": known[1].elementwise}
                value = self._add_op(result, kind="map", inputs=[value], **fields)
        self.values[node] = value
        return True

    def _prelu(self, node: fx.Node, x: Value, module: nn.PReLU, name: str) -> bool:
        """PReLU with a slope for each channel: a binary operation of the input and the slopes."""
        if module.num_parameters != x.channels or x.shape is None:
            return False
        slopes = Value(f"{name}.weight", (1, x.channels, 1, 1), x.dtype)
        weight = module.weight.detach().view(1, -1, 1, 1)
        self._add_op(slopes, kind="opaque", inputs=[], call=Call(_itself, (weight,)), pure=True)
        return self._add(node, kind="binary", inputs=[x, slopes], call=Call(_leaky), name=name)

    def _conv(self, node: fx.Node, x: Value, conv: nn.Conv2d, name: str, fixed: bool = False) -> bool:
        padding = None
        if conv.in_channels != x.channels or has_hooks(conv):
            return False
        if is_same_padded_conv(conv):
            pad = Call(PadSame(conv.kernel_size, conv.stride, conv.dilation))
            padding = (0, 0)
            x = self._add_op(Value(f"{name}.pad", x.shape, x.dtype), kind="map", inputs=[x], call=pad)
        elif not is_plain(conv):
            effective = effective_conv(conv)
            if effective is None:
                return False
            conv, fixed = effective, True
        if conv.padding_mode != "zeros":
            pad = Call(nn.functional.pad, (list(conv._reversed_padding_repeated_twice), conv.padding_mode))
            padding = (0, 0)
            x = self._add_op(Value(f"{name}.pad", x.shape, x.dtype), kind="map", inputs=[x], call=pad)
        kind, reads, writes = channels_of(conv, self.domain)
        if not (writes >= 0).any():
            return False
        fields = {"module": conv, "name": name, "reads": reads, "writes": writes}
        return self._add(node, kind=kind, inputs=[x], fixed=fixed, padding=padding, **fields)

    def _called_conv(self, node: fx.Node, x: Value, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """``F.conv2d`` with a parameter of the model."""
        given: dict[str, Any] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
        given |= dict(zip(("weight", *given), rest, strict=False)) | kwargs
        held = [given.pop("weight", None), given.pop("bias")]
        names = [arg.target if isinstance(arg, fx.Node) and arg.op == "get_attr" else None for arg in held]
        if names[0] is None or (held[1] is not None and names[1] is None) or self._values_in(given):
            return False
        weight, bias = (None if name is None else self._attribute(str(name)) for name in names)
        if not isinstance(weight, nn.Parameter) or not (bias is None or isinstance(bias, nn.Parameter)):
            return False
        layer = str(names[0]).rpartition(".")[0]
        conv = conv_of(weight, bias, tuple(given.values()))
        return self._conv(node, x, conv, layer or node.name, fixed=True)

    def _binary(self, node: fx.Node, x: Value, target: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        rule = binary_rule(target, rest[1:], kwargs)
        if rule is None or not rest or not isinstance(rest[0], fx.Node):
            return False
        other, shape = self.values[rest[0]], self.specs[node][0]
        assert shape is not None
        if other.channels is not None and other.channels == x.channels:
            act = rule.act if x.shape == other.shape else ""
            return self._add(node, kind="binary", inputs=[x, other], call=Call(target), act=act)
        channels = other.shape[-3] if other.shape is not None and len(other.shape) >= 3 else 1
        if other.shape is None or len(other.shape) > 4 or x is other:
            return False
        if channels == 1 and shape[1] == x.channels:
            # The same for every channel: a scale, or a gate for each pixel.
            return self._add_map(node, x, target, rest, kwargs, zeros=False)
        if len(other.shape) == 3 and channels == x.channels == shape[1]:
            wide = Value(f"{other.name}.wide", (1, *other.shape), other.dtype)
            call = Call(torch.unsqueeze, (0,))
            self._add_op(wide, kind="opaque", inputs=[other], call=call, args=(other,), pure=True)
            return self._add(node, kind="binary", inputs=[x, wide], call=Call(target))
        if x.channels == 1 and other.channels == shape[1] and target in COMMUTATIVE:
            return self._add_map(node, other, target, (node.args[0],), kwargs, zeros=False)
        return False

    def _pad(self, node: fx.Node, x: Value, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        given = dict(zip(("pad", "mode", "value"), rest, strict=False)) | kwargs
        sides, mode, fill = given.get("pad"), given.get("mode", "constant"), given.get("value") or 0.0
        if not isinstance(sides, (list, tuple)) or any(not isinstance(side, int) for side in sides):
            return False
        if len(sides) <= 4 and (mode != "constant" or fill == 0):
            return self._add(node, kind="map", inputs=[x], call=Call(nn.functional.pad, (list(sides), mode, fill)))
        if len(sides) != 6 or any(sides[:4]) or mode != "constant" or min(sides[4:]) < 0:
            return False
        return self._add(node, kind="pad", inputs=[x], fill=float(fill), before=sides[4])


def _leaky(x: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
    """PReLU with a slope for each channel, (1, C, 1, 1)."""
    return torch.where(x > 0, x, x * slopes)


def _itself(value: Any) -> Any:
    return value
