"""Turns a plain network into one that trains switches, batch norm and classifiers for several domains."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from bap_kernels._arguments import check_module
from bap_kernels.flow.norms import depends_on_data, norm_parts
from bap_kernels.nn.consumers import link_readers_
from bap_kernels.nn.conv import GatheredConv2d
from bap_kernels.nn.domain_heads import DomainConv2d, DomainHead, DomainLinear
from bap_kernels.nn.domain_norms import DomainBatchNorm2d, DomainNorm
from bap_kernels.nn.heads import Choice, Numbers, chosen_heads
from bap_kernels.nn.per_domain import checked_names, domain_layers
from bap_kernels.nn.replaceable import OWN_FORWARD, has_own_forward, refuse_own_forward, unsupported_reason
from bap_kernels.nn.swap import replace_
from bap_kernels.nn.switched import SwitchedConv2d

__all__ = ["add_domain_", "switch_"]

_log = logging.getLogger(__name__)


def switch_(
    model: nn.Module,
    domains: Iterable[str],
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    threshold: float = 5e-3,
    initial: float = 1e-2,
    ste_every: int = 1,
    heads: Numbers | Mapping[str, Numbers] | bool | Choice | None = None,
    head: Choice | None = None,
) -> nn.Module:
    """Gives a plain model switches, batch norm and, if wanted, a classifier for every domain, in place.

    :class:`torch.nn.Conv2d` becomes :class:`~bap_kernels.nn.SwitchedConv2d` and shares its parameters with the layer
    that it replaces. A batch norm becomes a :class:`~bap_kernels.nn.DomainBatchNorm2d`, every domain starting from its
    parameters and statistics; so do SyncBatchNorm, FrozenBatchNorm2d, timm's batch norms with an activation, and
    subclasses, each domain with a copy of the module. Other layers with running statistics (BatchNorm1d, InstanceNorm
    that tracks them) become a :class:`~bap_kernels.nn.DomainNorm`. Norms without them (GroupNorm, LayerNorm) stay, with
    their scale and shift shared by all domains. A layer that is used in several places stays one. Convolutions that
    cannot be switched stay as they are; :func:`bap_kernels.nn.skipped` names them, and shared norms, with the reason.
    Convolutions learn which others read their results (:func:`link_readers_`), so the model's code is recorded by
    torch.fx once.

    A checkpoint of the plain model still loads strictly, before or after: it sets what is shared, and the batch norm of
    every domain. Choose a domain with :func:`bap_kernels.set_domain` before the first forward.

    Args:
        model: any module. If it is itself a layer to be replaced, the result is the new layer.
        domains: names of the domains.
        filter_fn: ``filter_fn(module, name) -> bool``, asked for convolutions and batch norms; False leaves that layer
            as it is, shared by all domains and without switches.
        threshold, initial, ste_every: as in :class:`~bap_kernels.nn.SwitchedConv2d`.
        heads: {domain: number of classes}: the classifier, a linear layer (also a subclass) or a 1x1 convolution,
            becomes a :class:`~bap_kernels.nn.DomainLinear` or :class:`~bap_kernels.nn.DomainConv2d`. True gives every
            domain as many classes as the layer has; so do a name, a list of names or a predicate, which choose as
            ``head`` does. {layer name: {domain: number}} serves several classifiers with different classes. None leaves
            the classifier as it is.
        head: which layers are classifiers: a name, a list of names, or ``head(module, name) -> bool``, asked for linear
            layers and 1x1 convolutions. None takes the one whose result becomes the model's result, if it is one.

    Returns:
        ``model``, or the new layer.

    Raises:
        ValueError: for names that cannot be used, for ``heads`` of other domains, if there is no classifier for them or
            several may be meant, or nothing to replace. Nothing is changed then.
        NotImplementedError: if another ``forward`` was set on a layer to be replaced, as wrappers do, or a classifier
            cannot be one per domain. Nothing is changed then.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import bap_kernels as bk
        >>> plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 10))
        >>> model = bk.nn.switch_(plain, ["birds", "cars"], heads={"birds": 200, "cars": 196})
        >>> bk.set_domain(model, "cars")
        >>> model(torch.randn(2, 3, 3, 3)).shape
        torch.Size([2, 196])
    """
    check_module("switch_", model)
    names = checked_names("switch_", domains)
    # One memo for each domain: what layers share in the plain model they share in every domain.
    memos: dict[str, dict[int, Any]] = {name: {} for name in names}
    new: dict[nn.Module, nn.Module] = {}
    classifiers = chosen_heads(model, names, heads, head)
    for module, numbers in classifiers.items():
        make: Any = DomainLinear.from_linear if isinstance(module, nn.Linear) else DomainConv2d.from_conv2d
        new[module] = make(module, numbers)
    inside = {module for _, layer in domain_layers(model) for module in layer.domains.modules()}
    # A norm's own parts, such as an activation, are copied with it.
    inside |= {part for module in model.modules() if depends_on_data(module) for part in list(module.modules())[1:]}
    for name, module in model.named_modules():
        if module in inside or module in classifiers:
            continue
        plain_conv = isinstance(module, nn.Conv2d) and not isinstance(module, (GatheredConv2d, SwitchedConv2d))
        norm = depends_on_data(module)
        if not (plain_conv or norm):
            continue
        if filter_fn is not None and not filter_fn(module, name):
            continue
        if norm:
            if has_own_forward(module):
                refuse_own_forward("switch_", name, module)
            of_images = norm_parts(module) is not None or isinstance(module, nn.BatchNorm2d)
            new[module] = (DomainBatchNorm2d if of_images else DomainNorm).from_norm(module, names, memos)
        elif (reason := unsupported_reason(module)) is None:
            assert isinstance(module, nn.Conv2d)
            new[module] = SwitchedConv2d.from_conv2d(module, names, threshold, initial, ste_every)
        elif reason == OWN_FORWARD:
            refuse_own_forward("switch_", name, module)
        else:
            _log.info("switch_: %r stays dense: %s", name, reason)
    if not new:
        raise ValueError("switch_(): expected `model` to have convolutions or batch norms to replace, got none.")
    return link_readers_(replace_(model, new))


def add_domain_(
    model: nn.Module, name: str, like: str | None = None, classes: int | Numbers | None = None
) -> nn.Module:
    """Adds a domain to every layer of a model that has domains, in place; the other domains stay as they are.

    The new parameters must be given to the optimiser; :func:`bap_kernels.nn.domain_parameters` names them.

    Args:
        model: a model that went through :func:`switch_`, or has such layers.
        name: the new domain.
        like: the domain whose scores, batch norm and statistics the new one starts from; None starts with all channels
            on and new batch norms.
        classes: outputs of the new domain's classifier, where the model has a :class:`~bap_kernels.nn.DomainLinear` or
            a :class:`~bap_kernels.nn.DomainConv2d`; with several {layer name: number}, or one number for all.

    Returns:
        ``model``.

    Raises:
        ValueError: if the name cannot be used or is taken, ``like`` is unknown, or ``classes`` is missing or useless.
            Nothing is changed then.

    Examples:
        >>> from torch import nn
        >>> import bap_kernels as bk
        >>> model = bk.nn.switch_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), ["birds"])
        >>> bk.set_domain(bk.nn.add_domain_(model, "cars", like="birds"), "cars")
    """
    check_module("add_domain_", model)
    layers = dict(domain_layers(model))
    if not layers:
        raise ValueError("add_domain_(): expected `model` to have layers with domains, got none. Hint: call switch_.")
    for layer in layers.values():
        if name in layer.domains:
            raise ValueError(f"add_domain_(): expected `name` to be new, got {name!r}, which the model has already.")
        checked_names("add_domain_", [*layer.domains, name])
        if like is not None and like not in layer.domains:
            raise ValueError(f"add_domain_(): expected `like` to be one of {list(layer.domains)}, got {like!r}.")
    heads = [path for path, layer in layers.items() if isinstance(layer, DomainHead)]
    if bool(heads) != (classes is not None):
        kind = type(layers[heads[0]]).__name__ if heads else "DomainLinear"
        expected = f"a number, as the model has a {kind}" if heads else f"None, as the model has no {kind}"
        raise ValueError(f"add_domain_(): expected `classes` to be {expected}, got {classes}.")
    numbers = dict(classes) if isinstance(classes, Mapping) else dict.fromkeys(heads, classes)
    if set(numbers) != set(heads):
        raise ValueError(f"add_domain_(): expected `classes` to name the classifiers {heads}, got {list(numbers)}.")
    # Classifiers first: they may refuse.
    for path in [*heads, *(path for path in layers if path not in heads)]:
        layer = layers[path]
        if isinstance(layer, DomainHead):
            layer.add_domain(name, numbers[path])  # type: ignore[arg-type]
        elif isinstance(layer, (SwitchedConv2d, DomainNorm)):
            layer.add_domain(name, like)
    return model
