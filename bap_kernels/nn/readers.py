"""Finds which switched convolutions read the result of another, for its backward.

A channel that all of them have switched off gets an output gradient of zeros. The backward has to find these channels;
with the readers known, their switches name them.
"""

from __future__ import annotations

import logging
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from bap_kernels.nn.domain_layers import DomainBatchNorm2d
from bap_kernels.nn.module_copy import copy_modules
from bap_kernels.nn.norms import norm_parts
from bap_kernels.nn.per_domain import PerDomain
from bap_kernels.nn.recording import has_hooks, record_calls
from bap_kernels.nn.switched import SwitchedConv2d

__all__ = ["link_readers_"]

_log = logging.getLogger(__name__)

# What hands each channel's gradient on to the same channel, zeros as zeros.
_LAYERS = (
    nn.BatchNorm2d,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
    nn.MaxPool2d,
    nn.AvgPool2d,
)
_FUNCTIONS = (
    torch.relu,
    torch.relu_,
    F.relu,
    F.relu_,
    F.relu6,
    F.leaky_relu,
    F.elu,
    F.gelu,
    F.silu,
    F.hardswish,
    F.hardtanh,
    F.dropout,
    F.dropout2d,
    F.max_pool2d,
    F.avg_pool2d,
    operator.add,
    operator.iadd,
    torch.add,
)
_METHODS = ("relu", "relu_", "add", "add_", "contiguous")


def _passes_norm(norm: nn.Module) -> bool:
    """Whether a domain's batch norm, and what it applies afterwards, keeps channels apart."""
    parts = norm_parts(norm)
    return parts is not None and not has_hooks(norm) and all(type(one) in _LAYERS for one in parts.after)


def _passes(node: fx.Node, module: nn.Module | None) -> bool:
    if isinstance(module, DomainBatchNorm2d):
        return not has_hooks(module) and all(_passes_norm(one) for one in module.domains.values())
    if module is not None:
        return type(module) in _LAYERS and not has_hooks(module)
    return node.target in (_METHODS if node.op == "call_method" else _FUNCTIONS)


def _readers(node: fx.Node, modules: dict[str, nn.Module], width: int) -> dict[SwitchedConv2d, None] | None:
    """The switched convolutions that read a step's result; None if anything else does."""
    found: dict[SwitchedConv2d, None] = {}
    seen, waiting = {node}, [node]
    while waiting:
        for user in waiting.pop().users:
            module = modules.get(str(user.target)) if user.op == "call_module" else None
            if isinstance(module, SwitchedConv2d):
                if module.in_channels != width or has_hooks(module):
                    return None
                found[module] = None
            elif user.op == "output" or not _passes(user, module):
                return None
            elif user not in seen:
                seen.add(user)
                waiting.append(user)
    return found


def link_readers_(model: nn.Module) -> nn.Module:
    """Tells every switched convolution of a model which switched convolutions read its result, in place.

    :func:`switch_` does this. It is needed again for copies and unpickled models, which work without: links are not
    carried over; and after the model's code or layers have changed. A layer whose result anything else reads gets none:
    batch norm, ReLU and the like, pooling, dropout and sums are looked through. In eager training on a CPU the backward
    of a linked layer leaves out the channels that none of its readers has on, without searching the gradient for them.
    Links are not trusted blindly: where a list of channels is new, and in every 16th step, the gradient is searched as
    well; if it contradicts the list (a hook or a loss may read a channel as well), there is a warning, the gradient
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
        >>> model[0].readers == (model[3],), model[3].readers
        (True, None)
    """
    layers = [module for module in model.modules() if isinstance(module, SwitchedConv2d)]
    for layer in layers:
        layer.readers = None
    try:
        root = model if list(model.children()) and not isinstance(model, PerDomain) else nn.Sequential(model)
        graph = record_calls(copy_modules(root), lambda module: isinstance(module, PerDomain))
    except Exception as error:  # whatever the model's own code raises: it then works without links
        _log.info("link_readers_: no links: %s", error)
        return model
    modules: dict[str, Any] = dict(root.named_modules(remove_duplicate=False))
    found: dict[SwitchedConv2d, dict[SwitchedConv2d, None] | None] = {}
    for node in graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(module, SwitchedConv2d):
            continue
        # A layer that is used twice is read by the readers of both results.
        mine = None if has_hooks(module) else _readers(node, modules, module.out_channels)
        before = found.get(module, {})
        found[module] = None if mine is None or before is None else before | mine
    for layer, readers in found.items():
        layer.readers = tuple(readers) if readers else None
    return model
