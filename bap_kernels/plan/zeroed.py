"""The channels that a network's own weights leave without effect, found by following zeros through it.

A convolution need not read a channel whose slice of its weight is zero, nor one that always arrives as zeros: from
filters of zeros, through batch norms whose scale is zero, activations, pooling, sums and concatenations.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from bap_kernels._arguments import check_module
from bap_kernels._zeros import Zeros, set_zeros_finder
from bap_kernels.channels import ChannelLists
from bap_kernels.flow.graph import Op
from bap_kernels.flow.liveness import Liveness
from bap_kernels.flow.norms import folded_norm, norm_parts
from bap_kernels.flow.ops import Call
from bap_kernels.layer_kinds import PlannedModel
from bap_kernels.nn.module_copy import copy_modules
from bap_kernels.nn.swap import unswappable_reason
from bap_kernels.plan.compare import not_finite
from bap_kernels.plan.example import trace_shapes

__all__ = ["find_zeros"]

# Share of the layer's largest weight below which a slice counts as nearly zero: far above what rounding to a 16-bit
# format could make of a zero, far below what any weight does for the result.
_NEARLY = 1e-6


class _Zeros(Liveness):
    """Constants as the values of weights and of norms' scales make them, beyond what lists say."""

    def _constants(self, op: Op) -> np.ndarray | None:
        if op.kind == "norm":
            assert op.module is not None
            scale, shift = (part.cpu().numpy() for part in folded_norm(op.module))
            through = super()._constants(op)
            assert through is not None
            return np.where(scale == 0, shift, through)
        if op.kind not in ("conv", "depthwise", "grouped"):
            return super()._constants(op)
        conv = op.conv
        effective = nonzero_slices(conv) & self._arriving(op)
        bias = np.zeros(conv.out_channels) if conv.bias is None else conv.bias.detach().double().cpu().numpy()
        filters = np.where(effective.any(axis=1), np.nan, bias)
        # Filters that the layer's lists leave out are zeros.
        return np.where(op.writes < 0, 0.0, filters[op.writes]) if op.kind != "grouped" else filters

    def _arriving(self, op: Op) -> np.ndarray:
        """(C_out, C_in / groups): whether a filter's input channel is anything but zeros."""
        conv = op.conv
        known = self.constant.get(op.inputs[0])
        alive = np.ones(conv.in_channels, dtype=bool) if known is None else known != 0
        per_group = alive.reshape(conv.groups, -1)
        return np.repeat(per_group, conv.out_channels // conv.groups, axis=0)


def nonzero_slices(conv: nn.Conv2d) -> np.ndarray:
    """(C_out, C_in / groups): whether a filter's slice for an input channel has anything but zeros."""
    weight = conv.weight.detach()
    return (weight != 0).flatten(2).any(2).cpu().numpy()


@dataclass
class _Layer:
    """What is known of one convolution, over all its uses."""

    conv: nn.Conv2d
    alive: np.ndarray | None = None  # (C_in,): arrives as anything but zeros in some use; None: not followed
    constant: int = 0  # channels that arrive as one other number


def _prune_hooks(module: nn.Module) -> dict[int, prune.BasePruningMethod]:
    hooks = module._forward_pre_hooks.items()
    return {key: hook for key, hook in hooks if isinstance(hook, prune.BasePruningMethod)}


def _without_masks(module: nn.Module, copier: Any) -> nn.Module | None:
    """For a module with masks of torch.nn.utils.prune: a copy with these multiplied in, and without the hooks."""
    pruned = _prune_hooks(module)
    if not pruned:
        return None
    plain: nn.Module = copier.fresh(module)
    hooks = [(key, hook) for key, hook in module._forward_pre_hooks.items() if key not in pruned]
    plain.__dict__["_forward_pre_hooks"] = OrderedDict(hooks)
    for hook in pruned.values():
        name = hook._tensor_name
        original, mask = plain._parameters.pop(f"{name}_orig"), plain._buffers.pop(f"{name}_mask")
        assert original is not None
        assert mask is not None
        plain.__dict__.pop(name, None)
        plain._parameters[name] = nn.Parameter(original.detach() * mask, requires_grad=False)
    return plain


def _near_zero(conv: nn.Conv2d) -> np.ndarray:
    """(C_in,): whether the weight's slice for a channel is so small that it was probably meant to be zero."""
    sizes = conv.weight.detach().abs().amax(dim=(0, 2, 3)).double().cpu().numpy()
    return (sizes > 0) & (sizes < _NEARLY * sizes.max())


def _refuse_unreadable(op: str, model: nn.Module) -> None:
    """Refuses what is no network, and weights that are not there or not finite."""
    check_module(op, model)
    # Of torch.compile, by its attribute: importing its class would load the compiler.
    inner = "model" if isinstance(model, PlannedModel) else "_orig_mod" if hasattr(model, "_orig_mod") else None
    if inner is not None or isinstance(model, torch.jit.ScriptModule):
        hint = "" if inner is None else f" Hint: give its `{inner}`."
        raise TypeError(f"{op}(): expected `model` to be a network of layers, got {type(model).__name__}.{hint}")
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d) and norm_parts(module) is None:
            continue
        for key, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is None:
                continue
            what = f"{name}.{key}".removeprefix(".")
            if nn.parameter.is_lazy(tensor):
                raise ValueError(
                    f"{op}(): expected `model` to hold weights, got a lazy one: {what}. Hint: call the model once."
                )
            if tensor.is_meta:
                raise ValueError(f"{op}(): expected `model` to hold weights, got one on the meta device: {what}.")
    bad = not_finite(dict(model.named_modules()))
    if bad:
        raise ValueError(
            f"{op}(): expected `model` to hold finite numbers, got {bad}. Hint: lists could hide that its "
            "results are not finite."
        )


def _zeros(layer: _Layer) -> Zeros:
    used = nonzero_slices(layer.conv).any(axis=0)
    alive = np.ones_like(used) if layer.alive is None else layer.alive
    reads = used & alive
    parts = []
    if not used.all():
        parts.append(f"zero slices of the weight: {np.count_nonzero(~used)}")
    if (used & ~alive).any():
        parts.append(f"other channels that arrive as zeros: {np.count_nonzero(used & ~alive)}")
    near = int(np.count_nonzero(_near_zero(layer.conv) & reads))
    if near:
        parts.append(f"nearly zero slices of the weight, which are read: {near}")
    if layer.constant:
        parts.append(f"channels that are constant but not zero, and read: {layer.constant}")
    if layer.alive is None:
        parts.append("its input was not followed")
    reason = None if nn.utils.parametrize.is_parametrized(layer.conv) else unswappable_reason(layer.conv)
    if reason is not None and not reads.all():
        parts.append(f"reads all, as it cannot be swapped: {reason}")
        reads[:] = True
    note = f"reads {np.count_nonzero(reads)} of {len(reads)}" + (f"; {'; '.join(parts)}" if parts else "")
    lists = ChannelLists() if reads.all() else ChannelLists(np.flatnonzero(reads))
    weight = layer.conv.weight
    return Zeros(lists, note, int((weight == 0).sum()), weight.numel(), near, reason is None)


def find_zeros(op: str, model: nn.Module, example: Tensor | tuple[Any, ...] | None) -> dict[str, Zeros]:
    """The in-list that each convolution's weights and inputs leave, {layer name: Zeros}.

    Convolutions with groups have no list of their own and are followed only.

    Args:
        op: the caller's name, for messages.
        model: any network.
        example: what it is called with; None: an image is made up.

    Raises:
        TypeError: for anything else than a network of layers.
        ValueError: if it has no convolution, or its weights are on the meta device or not finite.
    """
    _refuse_unreadable(op, model)
    copied = copy_modules(model, replaced=_without_masks).eval()
    layers = {
        name: _Layer(module)
        for name, module in copied.named_modules()
        if isinstance(module, nn.Conv2d) and module.groups == 1
    }
    if not layers:
        raise ValueError(f"{op}(): expected `model` to have convolutions with groups=1, got none.")
    by_module = {layer.conv: layer for layer in layers.values()}
    names = dict(copied.named_modules(remove_duplicate=False))
    with torch.no_grad():
        try:
            graph = trace_shapes(op, copied, example, None, unread=True)
        except ValueError as error:
            if example is not None:
                raise
            # Each layer's own weight still tells.
            return {
                name: _with_reason(_zeros(layer), f"the network was not followed: {error}")
                for name, layer in layers.items()
            }
        known = _Zeros(graph, extents=False).constant
        # What is run as it is may call a layer that is followed elsewhere, on anything.
        unfollowed = set(graph.not_lowered)
        for operation in graph.ops:
            if isinstance(operation.call, Call) and isinstance(operation.call.target, nn.Module):
                unfollowed.update(
                    name
                    for name, _ in operation.call.target.named_modules(prefix=operation.name, remove_duplicate=False)
                )
        for operation in graph.ops:
            layer = by_module.get(names.get(operation.name))  # type: ignore[arg-type]
            if operation.kind != "conv" or layer is None:
                continue
            arriving = known.get(operation.inputs[0])
            alive = np.ones(layer.conv.in_channels, dtype=bool) if arriving is None else arriving != 0
            layer.alive = alive if layer.alive is None else layer.alive | alive
            if arriving is not None:
                layer.constant = int(np.count_nonzero(~np.isnan(arriving) & (arriving != 0)))
        for name in unfollowed:
            layer = by_module.get(names.get(name))  # type: ignore[arg-type]
            if layer is not None:
                layer.alive = None
        return {name: _zeros(layer) for name, layer in layers.items()}


def _with_reason(zeros: Zeros, reason: str) -> Zeros:
    return zeros._replace(note=f"{zeros.note} ({reason})")


set_zeros_finder(find_zeros)
