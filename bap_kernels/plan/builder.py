"""Says what each recorded step does to channels: the rules by which a recording becomes operations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from bap_kernels.channels import ChannelLists
from bap_kernels.nn.conv import GatheredConv2d, MaskedConv2d
from bap_kernels.nn.recording import Facts
from bap_kernels.plan.domain_view import frozen, lists_of
from bap_kernels.plan.graph import Channels, Op, Value
from bap_kernels.plan.operations import (
    Call,
    has_hooks,
    in_place,
    known_binary,
    known_layer,
    known_map,
    only_passes,
    out_of_place,
    spatial_slice,
)

__all__ = ["Builder", "Facts", "why_not_lowered"]


class Builder:
    """Turns recorded steps into operations, in order."""

    def __init__(
        self, root: nn.Module, facts: Facts, domain: str | None, given: int, constants: dict[str, Tensor] | None = None
    ) -> None:
        self.constants = constants or {}
        self.given = given
        self.root = root
        self.facts = facts
        self.domain = domain
        self.now: dict[fx.Node, Value] = {}
        self.ops: list[Op] = []
        # {convolution: why it is run as it is}.
        self.not_lowered: dict[str, str] = {}

    def build(self, nodes: Iterable[fx.Node]) -> list[Op]:
        """The operations of a recording's steps."""
        for node in nodes:
            self._convert(node)
        return self.ops

    def _add(self, node: fx.Node, **fields: Any) -> Value:
        shape, dtype = self.facts[node] if node.op != "output" else (None, None)
        value = Value(node.name, shape, dtype)
        op = Op(output=value, **{"name": node.name, **fields})
        for read in dict.fromkeys(op.inputs):
            read.consumers.append(op)
        self.ops.append(op)
        self.now[node] = value
        return value

    def _values_in(self, *arguments: Any) -> list[Value]:
        found: list[Value] = []
        fx.node.map_arg(arguments, lambda node: found.append(self.now[node]))
        return list(dict.fromkeys(found))

    def _convert(self, node: fx.Node) -> None:
        if node.op == "placeholder" and self.given > 0:
            self.given -= 1
            self._add(node, kind="input", inputs=[])
        elif node.op == "placeholder":
            # An argument that was left out keeps its default.
            self._add(node, kind="opaque", inputs=[], call=Call(_itself, node.args))
        elif node.op == "output":
            self._opaque(node, "output", None)
        elif node.op == "get_attr":
            value: Any = self.constants.get(str(node.target))
            if value is None:
                value = self.root
                for part in str(node.target).split("."):
                    value = getattr(value, part)
            self._add(node, kind="opaque", inputs=[], call=Call(_itself, (value,)))
        else:
            module = self.root.get_submodule(str(node.target)) if node.op == "call_module" else None
            target: Any = str(node.target) if node.op == "call_method" else node.target
            written = in_place(target, node.kwargs, module) or node.meta.get("writes", False)
            name = str(node.target) if module is not None else node.name
            known = self._known(node, target, module, name)
            if not known:
                self._opaque(node, name, module if module is not None else target, written)

    def _opaque(self, node: fx.Node, name: str, target: Any, mutates: bool = False) -> None:
        def replaced(part: Any) -> Any:
            return fx.node.map_arg(part, lambda one: self.now[one])  # type: ignore[arg-type,return-value]

        call = Call(frozen(target, self.domain) if isinstance(target, nn.Module) else target) if target else None
        args, kwargs = tuple(_plain(replaced(node.args))), dict(_plain(replaced(node.kwargs)))
        kind = "output" if node.op == "output" else "opaque"
        inputs = self._values_in(node.args, node.kwargs)
        self._note_convolutions(name, target)
        self._add(node, kind=kind, inputs=inputs, call=call, args=args, kwargs=kwargs, name=name, mutates=mutates)

    def _note_convolutions(self, name: str, target: Any) -> None:
        """Says of each convolution in a step without a rule why it has none."""
        if isinstance(target, nn.Conv2d):
            self.not_lowered[name] = why_not_lowered(target)
        elif isinstance(target, nn.Module):
            for inner, module in target.named_modules():
                if isinstance(module, nn.Conv2d):
                    reason = f"inside {name!r} ({type(target).__name__}), which is run as one step"
                    self.not_lowered[f"{name}.{inner}"] = reason
        elif target in (torch.conv2d, nn.functional.conv2d):
            self.not_lowered[name] = "a call of F.conv2d, not of a layer"

    def _known(self, node: fx.Node, target: Any, module: nn.Module | None, name: str) -> bool:
        """Adds the step if there is a rule for it."""
        if target in (torch.cat, torch.concat):
            return self._cat(node)
        tensors = [self.now[one] for one in node.args[:2] if isinstance(one, fx.Node)]
        x = tensors[0] if tensors and isinstance(node.args[0], fx.Node) else None
        if x is None or (module is not None and (has_hooks(module) or "forward" in module.__dict__)):
            return False
        rest, kwargs = tuple(node.args[1:]), dict(node.kwargs)
        constant = not self._values_in(rest, kwargs)
        if constant and only_passes(target, rest, kwargs, module):
            self.now[node] = x
            return True
        if x.channels is None or len(self.facts[node][0] or ()) != 4:
            return False
        if module is not None:
            return constant and not rest and not kwargs and self._layer(node, x, module, name)
        target, kwargs = out_of_place(target, kwargs)
        if not constant:
            return self._binary(node, target, tensors, rest, kwargs)
        if target is nn.functional.pad:
            return self._pad(node, x, rest, kwargs)
        if spatial_slice(target, rest):
            self._add(node, kind="map", inputs=[x], call=Call(target, rest))
            return True
        found = known_map(target, rest, kwargs)
        if found is None and rest and not kwargs and isinstance(rest[0], (int, float)):
            # A number on the other side; not for x.pow and the like, where it is known to be a sum or a product only.
            arithmetic = known_binary(target, rest[1:], kwargs)
            found = (Call(target, rest), "", True) if arithmetic is not None else None
        if found is None or self.facts[node][0][1] != x.channels:  # type: ignore[index]
            return False
        call, act, elementwise = found
        self._add(node, kind="map", inputs=[x], call=call, act=act, elementwise=elementwise)
        return True

    def _cat(self, node: fx.Node) -> bool:
        parts = node.args[0] if node.args else None
        axis = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        if not isinstance(parts, (list, tuple)) or axis not in (1, -3):
            return False
        values = [self.now[one] for one in parts if isinstance(one, fx.Node)]
        if len(values) != len(parts) or any(value.channels is None for value in values):
            return False
        self._add(node, kind="cat", inputs=values)
        return True

    def _layer(self, node: fx.Node, x: Value, module: nn.Module, name: str) -> bool:
        if type(module) is nn.BatchNorm2d and module.running_mean is not None and module.running_var is not None:
            self._add(node, kind="norm", inputs=[x], module=module, name=name)
            return True
        if type(module) in (nn.Conv2d, GatheredConv2d, MaskedConv2d):
            return self._conv(node, x, module, name)  # type: ignore[arg-type]
        found = known_layer(module)
        if found is None:
            return False
        call, act, elementwise = found
        self._add(node, kind="map", inputs=[x], call=call, name=name, act=act, elementwise=elementwise)
        return True

    def _conv(self, node: fx.Node, x: Value, conv: nn.Conv2d, name: str) -> bool:
        computed = conv._parameters.get("weight") is None or nn.utils.parametrize.is_parametrized(conv)
        depthwise = conv.groups == conv.in_channels == conv.out_channels and conv.groups != 1
        if computed or conv.padding_mode != "zeros" or not (conv.groups == 1 or depthwise):
            return False
        lists = lists_of(conv, self.domain) if isinstance(conv, GatheredConv2d) else ChannelLists()
        listed_in, listed_out = lists._host
        sources = _numbers(listed_in, conv.in_channels)
        filters = _numbers(listed_out, conv.out_channels)
        if isinstance(conv, MaskedConv2d):
            listed = filters
            filters = np.full(conv.out_channels, -1)
            filters[listed] = listed
        if depthwise:
            sources = np.arange(conv.in_channels) if isinstance(conv, MaskedConv2d) else filters
        if not (filters >= 0).any():
            return False
        kind = "depthwise" if depthwise else "conv"
        self._add(node, kind=kind, inputs=[x], module=conv, name=name, sources=sources, filters=filters)
        return True

    def _binary(self, node: fx.Node, target: Any, tensors: list[Value], rest: Any, kwargs: dict[str, Any]) -> bool:
        if len(tensors) != 2 or self._values_in(rest[1:], kwargs) or tensors[1].channels is None:
            return False
        found = known_binary(target, rest[1:], kwargs)
        if found is None or tensors[0].channels != tensors[1].channels:
            return False
        act = found[1] if tensors[0].shape == tensors[1].shape else ""
        self._add(node, kind="binary", inputs=tensors, call=found[0], act=act)
        return True

    def _pad(self, node: fx.Node, x: Value, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        given = dict(zip(("pad", "mode", "value"), rest, strict=False)) | kwargs
        sides, mode, fill = given.get("pad"), given.get("mode", "constant"), given.get("value") or 0.0
        if not isinstance(sides, (list, tuple)) or any(not isinstance(side, int) for side in sides):
            return False
        if len(sides) <= 4 and (mode != "constant" or fill == 0):
            self._add(node, kind="map", inputs=[x], call=Call(nn.functional.pad, (list(sides), mode, fill)))
            return True
        if len(sides) != 6 or any(sides[:4]) or mode != "constant" or min(sides[4:]) < 0:
            return False
        self._add(node, kind="pad", inputs=[x], fill=float(fill), before=sides[4])
        return True


def why_not_lowered(conv: nn.Conv2d) -> str:
    """Why a plan has no rule for a convolution."""
    if has_hooks(conv):
        return "it has hooks"
    if type(conv) not in (nn.Conv2d, GatheredConv2d, MaskedConv2d):
        return f"{type(conv).__name__} is a subclass of torch.nn.Conv2d and may compute something else"
    if conv._parameters.get("weight") is None or nn.utils.parametrize.is_parametrized(conv):
        return "its weight is computed"
    if conv.groups != 1:
        return f"groups={conv.groups} with {conv.in_channels} -> {conv.out_channels} channels"
    return "its input has no batch axis, or it writes no channel"


def _itself(value: Any) -> Any:
    return value


def _plain(part: Any) -> Any:
    """The same without torch.fx's own kinds of list and dictionary."""
    if isinstance(part, (list, tuple)):
        kept = [_plain(one) for one in part]
        return kept if isinstance(part, list) else tuple(kept)
    if isinstance(part, dict):
        return {key: _plain(one) for key, one in part.items()}
    return part


def _numbers(listed: np.ndarray | None, channels: int) -> Channels:
    return np.arange(channels) if listed is None else listed.astype(np.int64)
