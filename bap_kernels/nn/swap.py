"""Replaces the dense convolutions of a model by gathered ones, in place."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from torch import nn
from torch.nn.modules.conv import _ConvNd

from bap_kernels._arguments import check_module
from bap_kernels._warn import warn
from bap_kernels.flow.graph import first_reasons
from bap_kernels.flow.norms import depends_on_data, is_norm
from bap_kernels.nn.conv import GatheredConv2d
from bap_kernels.nn.domain_heads import DomainHead
from bap_kernels.nn.heads import shared_classifiers
from bap_kernels.nn.per_domain import domain_layers
from bap_kernels.nn.replaceable import OWN_FORWARD, refuse_own_forward, unsupported_reason
from bap_kernels.nn.switched import SwitchedConv2d

__all__ = ["replace_", "skipped", "swap_", "unswappable_reason"]

_log = logging.getLogger(__name__)


def swap_(
    model: nn.Module,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    layer_type: type[GatheredConv2d] | None = None,
) -> nn.Module:
    """Replaces every :class:`torch.nn.Conv2d` of a model, in place, by a layer that can work on listed channels.

    The new layers share the parameters of the old ones, with their mode, device, dtype and hooks, so state dicts and
    optimisers stay as they are; until lists are chosen they compute the same. A convolution that is used in several
    places stays one layer. A :class:`~bap_kernels.nn.SwitchedConv2d` becomes a layer with the lists of all its domains,
    as its scores are now, so that a trained model needs no :func:`bap_kernels.attach_`. Left as they are: subclasses
    with methods of their own, such as another ``forward`` (a subclass that is only made or shown in another way is
    replaced), layers whose weight is computed (``weight_norm``, pruning and the like) and groups that are not
    supported; :func:`bap_kernels.nn.skipped` and :func:`bap_kernels.report` name them with the reason, which is also
    logged.

    Args:
        model: any module. If it is a convolution itself, the result is the new layer.
        filter_fn: ``filter_fn(module, name) -> bool``; False leaves that convolution as it is.
        layer_type: :class:`~bap_kernels.nn.GatheredConv2d`, or :class:`~bap_kernels.nn.MaskedConv2d` where out-lists
            are to be used in a network that expects full width. If given, layers that were swapped before change to it
            and keep their lists; None leaves them, and swaps to GatheredConv2d.

    Returns:
        ``model``, or the new layer.

    Raises:
        TypeError: for another ``layer_type``.
        NotImplementedError: if another ``forward`` was set on a layer to be replaced, as wrappers do: it would hide the
            lists. Nothing is changed then.

    Warns:
        UserWarning: if there are convolutions, and none can be replaced.

    Examples:
        >>> from torch import nn
        >>> import bap_kernels as bk
        >>> bk.swap_(nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), lambda module, name: name != "0")
        Sequential(
          (0): Conv2d(8, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): ReLU()
          (2): GatheredConv2d(8, 4, kernel_size=(1, 1), stride=(1, 1))
        )
    """
    check_module("swap_", model)
    kind = GatheredConv2d if layer_type is None else layer_type
    if not (isinstance(kind, type) and issubclass(kind, GatheredConv2d)):
        raise TypeError(f"swap_(): expected `layer_type` to be GatheredConv2d or MaskedConv2d, got {layer_type!r}.")
    new: dict[nn.Module, nn.Module] = {}
    dense: dict[str, str] = {}
    for name, module in model.named_modules():
        swapped = isinstance(module, GatheredConv2d) and (layer_type is None or type(module) is layer_type)
        if swapped or not isinstance(module, nn.Conv2d):
            continue
        if filter_fn is not None and not filter_fn(module, name):
            continue
        reason = unswappable_reason(module)
        if reason is None and isinstance(module, SwitchedConv2d):
            new[module] = module.to_gathered(kind)
        elif reason is None:
            new[module] = kind.from_conv2d(module)
        elif reason == OWN_FORWARD:
            refuse_own_forward("swap_", name, module)
        else:
            _log.info("swap_: %r stays dense: %s", name, reason)
            dense[name] = reason
    if dense and not new and not any(isinstance(module, GatheredConv2d) for module in model.modules()):
        warn(f"swap_(): no convolution was replaced. {first_reasons(dense)}")
    return replace_(model, new)


def replace_(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Replaces modules, {old: new}, wherever they occur in a model.

    Returns:
        ``model``, or what replaces it.
    """
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is not None and child in new:
                setattr(parent, key, new[child])
    return new.get(model, model)


def unswappable_reason(conv: nn.Module) -> str | None:
    """Why :func:`swap_` leaves a module as it is; None if it replaces it."""
    if isinstance(conv, SwitchedConv2d):
        return conv.why_not_gathered()
    return unsupported_reason(conv)


def _unserved_reason(module: nn.Module, domains: bool) -> str | None:
    if isinstance(module, GatheredConv2d):
        return None
    if isinstance(module, nn.Conv2d):
        return unswappable_reason(module)
    if isinstance(module, _ConvNd):
        return f"{type(module).__name__} is no torch.nn.Conv2d"
    if domains and depends_on_data(module):
        return "its statistics are shared by all domains: switch_ was told to leave it"
    if domains and is_norm(module) and next(module.parameters(), None) is not None:
        return f"{type(module).__name__}: its scale and shift are shared by all domains"
    return None


def skipped(model: nn.Module) -> dict[str, str]:
    """The layers that work on all channels or serve all domains alike, {layer name: reason}.

    They are the convolutions that :func:`bap_kernels.swap_` cannot replace, one-dimensional, three-dimensional and
    transposed ones among them; in a model that went through :func:`bap_kernels.nn.switch_` also norms and a classifier
    that all domains share.

    Examples:
        >>> from torch import nn
        >>> import bap_kernels as bk
        >>> bk.nn.skipped(nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=2)))
        {'1': 'groups=2 with 8 -> 8 channels: only 1 and depthwise (C_in == C_out) are supported'}
    """
    check_module("skipped", model)
    own = [layer for _, layer in domain_layers(model)]
    inside = {module for layer in own for module in layer.domains.modules()}
    reasons = {}
    for name, module in model.named_modules():
        reason = None if module in inside else _unserved_reason(module, bool(own))
        if reason is not None:
            reasons[name] = reason
    if own and not any(isinstance(layer, DomainHead) for layer in own):
        reasons.update(dict.fromkeys(shared_classifiers(model), "it is shared by all domains: see `heads` of switch_"))
    return reasons
