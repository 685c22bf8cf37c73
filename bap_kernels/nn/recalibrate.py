"""Running statistics of one domain, computed anew with its current switches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bap_kernels._arguments import check_module
from bap_kernels.layer_kinds import DomainLayer
from bap_kernels.nn.domain_norms import DomainNorm
from bap_kernels.nn.domains import set_domain

__all__ = ["recalibrate_bn"]


def _input_of(batch: Any) -> Any:
    return batch[0] if isinstance(batch, (list, tuple)) else batch


@torch.no_grad()
def recalibrate_bn(model: nn.Module, loader: Iterable[Any], domain: str, batches: int | None = None) -> None:
    """Computes the batch norms' running statistics of one domain anew, as means over the batches of ``loader``.

    After training or projecting the switches, the statistics still follow those of earlier steps. Everything else in
    the model is in eval mode meanwhile; parameters, the statistics of other domains and of batch norms that domains
    share stay, and so do modes, the active domain, and what is fixed, as in FrozenBatchNorm2d. A batch norm that no
    batch reaches keeps its statistics. Every batch counts alike, so leave out one that is much smaller than the others.

    Args:
        model: a model with :class:`~bap_kernels.nn.DomainBatchNorm2d` layers.
        loader: gives batches: tensors (N, C, H, W), or tuples and lists that begin with one; they are moved to the
            device of the model's parameters.
        domain: the domain.
        batches: most batches to use; None uses all.

    Raises:
        ValueError: if the model has no such layer or domain, none that computes statistics, or there is no batch.
            Nothing is changed if an error is raised, be it by ``loader`` or the model.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import bap_kernels as bk
        >>> model = bk.nn.switch_(nn.Sequential(nn.BatchNorm2d(2)), ["birds"])
        >>> bk.nn.recalibrate_bn(model, [torch.ones(4, 2, 3, 3), 3 * torch.ones(4, 2, 3, 3)], "birds")
        >>> model[0].domains["birds"].running_mean
        tensor([2., 2.])
    """
    check_module("recalibrate_bn", model)
    modules = list(model.modules())
    layers = [module for module in modules if isinstance(module, DomainNorm)]
    if not layers:
        raise ValueError(
            "recalibrate_bn(): expected `model` to have DomainBatchNorm2d layers, got none. Hint: call nn.switch_."
        )
    known = [name for name in layers[0].domains if all(name in layer.domains for layer in layers)]
    if domain not in known:
        raise ValueError(f"recalibrate_bn(): expected `domain` to be one of {known}, got {domain!r}.")
    modes = [(module, module.training) for module in modules]
    active = [(layer, layer._state) for layer in modules if isinstance(layer, DomainLayer)]
    # A layer without the domain is for set_domain to refuse.
    held = [layer.domains[domain] for layer in layers if domain in layer.domains]
    norms = [norm for module in held for norm in module.modules() if isinstance(norm, _BatchNorm)]
    norms = [norm for norm in dict.fromkeys(norms) if norm.track_running_stats]
    if held and not norms:
        raise ValueError(
            "recalibrate_bn(): expected `model` to have running statistics to compute, got norms whose statistics are "
            "fixed, or that have none."
        )
    set_domain(model, domain)
    momenta = [norm.momentum for norm in norms]
    before = [{name: value.clone() for name, value in norm.named_buffers()} for norm in norms]
    done = False
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            # None is the cumulative mean.
            norm.momentum = None
            norm.train()
        used = _run(model, loader, batches)
        if used == 0:
            raise ValueError("recalibrate_bn(): expected `loader` to give at least one batch, got none.")
        done = True
    finally:
        for norm, momentum, values in zip(norms, momenta, before, strict=True):
            norm.momentum = momentum
            if not done or not norm.num_batches_tracked:
                for name, value in norm.named_buffers():
                    value.copy_(values[name])
        for module, training in modes:
            module.training = training
        for layer, state in active:
            layer.__dict__[layer._state_name] = state


def _run(model: nn.Module, loader: Iterable[Any], batches: int | None) -> int:
    first = next(model.parameters(), None)
    used = 0
    if batches is not None and batches <= 0:
        return used
    for batch in loader:
        input = _input_of(batch)
        if isinstance(input, Tensor) and first is not None:
            input = input.to(first.device)
        model(input)
        used += 1
        if used == batches:
            break
    return used
