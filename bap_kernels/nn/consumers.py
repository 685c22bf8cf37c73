"""Finds which switched convolutions consume the result of another, for its backward.

A channel that all of them have switched off gets an output gradient of zeros. The backward has to find these channels;
where the consumers are known, their switches name them.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import fx, nn

from bap_kernels._arguments import check_module
from bap_kernels.flow.norms import norm_parts
from bap_kernels.flow.ops import call_rule, has_hooks, out_of_place, rule_of
from bap_kernels.nn.call_graph import record_calls
from bap_kernels.nn.domain_norms import DomainBatchNorm2d
from bap_kernels.nn.module_copy import copy_modules
from bap_kernels.nn.per_domain import PerDomain
from bap_kernels.nn.switched import SwitchedConv2d

__all__ = ["link_readers_"]

_log = logging.getLogger(__name__)

_CHANNELWISE = ("elementwise", "spatial", "identity", "binary")


def _layer_passes(layer: nn.Module) -> bool:
    """Whether a layer passes each channel's gradient on to the same channel, and zeros as zeros."""
    if has_hooks(layer):
        return False
    if isinstance(layer, DomainBatchNorm2d):
        return all(_layer_passes(norm) for norm in layer.domains.values())
    parts = norm_parts(layer)
    if parts is not None:
        return all(_layer_passes(following) for following in parts.after)
    rule = rule_of(layer)
    return rule is not None and rule.steady and rule.kind in _CHANNELWISE


def _call_passes(node: fx.Node) -> bool:
    """The same of a call of a function or method."""
    target, kwargs = out_of_place(node.target, dict(node.kwargs))
    rule = rule_of(target)
    if rule is None or not rule.steady:
        return False
    return rule.kind in _CHANNELWISE or call_rule(target, node.args[1:], kwargs) is not None


def _consumers(node: fx.Node, modules: dict[str, nn.Module], width: int) -> dict[SwitchedConv2d, None] | None:
    """The switched convolutions that read a step's result; None if anything else does."""
    consumers: dict[SwitchedConv2d, None] = {}
    seen, waiting = {node}, [node]
    while waiting:
        for user in waiting.pop().users:
            module = modules.get(str(user.target)) if user.op == "call_module" else None
            if isinstance(module, SwitchedConv2d):
                if module.in_channels != width or has_hooks(module):
                    return None
                consumers[module] = None
            elif user.op == "output" or not (_call_passes(user) if module is None else _layer_passes(module)):
                return None
            elif user not in seen:
                seen.add(user)
                waiting.append(user)
    return consumers


def link_readers_(model: nn.Module) -> nn.Module:
    """Tells every switched convolution of a model which switched convolutions consume its result, in place.

    :func:`switch_` does this. Copies and unpickled models lack the links and work without; call it for them, and after
    the model's code or layers have changed. Batch norm, activations, pooling, padding, dropout, sums and differences
    are looked through; a layer whose result anything else reads gets no links. In eager training on a CPU the backward
    of a linked layer leaves out the channels that none of its consumers has on, without searching the gradient for
    them. The links are verified: where a list of channels is new, and in every 16th step, the gradient is searched as
    well; if it contradicts the list (a hook or a loss may read a channel, too), there is a warning, the gradient
    decides, and the layer's links are not used again in that domain. Results are the same with and without links.

    Args:
        model: a model that went through :func:`switch_`. What cannot be recorded gets no links.

    Returns:
        ``model``.

    Examples:
        >>> from torch import nn
        >>> import bap_kernels as bk
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> model = bk.nn.link_readers_(bk.nn.switch_(model, ["birds"]))
        >>> model[0].consumers == (model[3],), model[3].consumers
        (True, None)
    """
    check_module("link_readers_", model)
    layers = [module for module in model.modules() if isinstance(module, SwitchedConv2d)]
    for layer in layers:
        layer.consumers = None
    try:
        root = model if list(model.children()) and not isinstance(model, PerDomain) else nn.Sequential(model)
        graph = record_calls(copy_modules(root), lambda module: isinstance(module, PerDomain))
    except Exception as error:  # whatever the model's own code raises: it then works without links
        _log.info("link_readers_: no links: %s", error)
        return model
    modules: dict[str, Any] = dict(root.named_modules(remove_duplicate=False))
    links: dict[SwitchedConv2d, dict[SwitchedConv2d, None] | None] = {}
    for node in graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(module, SwitchedConv2d):
            continue
        # The consumers of all calls of a layer are its consumers.
        consumers = None if has_hooks(module) else _consumers(node, modules, module.out_channels)
        before = links.get(module, {})
        links[module] = None if consumers is None or before is None else before | consumers
    for layer, linked in links.items():
        layer.consumers = tuple(linked) if linked else None
    return model
