"""The optimisers of a run: which parameters go with which, and at what rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import bap_kernels as bk
from bap.config import Config

__all__ = ["optimizers_of", "parameters_by_kind"]


def parameters_by_kind(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters of switches (``switch``), of batch norm (``norm``), of classifiers (``head``) and of the backbone.

    Args:
        model: a model with switches, batch norm and classifiers for every domain.
    """
    kinds: dict[str, list[nn.Parameter]] = {"switch": [], "norm": [], "head": [], "backbone": []}
    heads = {p for m in model.modules() if isinstance(m, bk.nn.DomainLinear) for p in m.parameters()}
    own = {parameter for _, parameter in bk.nn.domain_parameters(model)}
    for name, parameter in model.named_parameters():
        if name.endswith(".score"):
            kinds["switch"].append(parameter)
        elif parameter in heads:
            kinds["head"].append(parameter)
        else:
            kinds["norm" if parameter in own else "backbone"].append(parameter)
    return kinds


def optimizers_of(model: nn.Module, config: Config) -> dict[str, torch.optim.Optimizer]:
    """Adam for switches (and batch norm), SGD for classifiers, the backbone (and batch norm), by name.

    Each group has ``base``, its rate before any schedule. The steps are fused: one kernel for many parameters.

    Args:
        model: a model with switches, batch norm and classifiers for every domain.
        config: the settings; the backbone is left out where it is not trained.
    """
    rates, kinds = config.optimiser, parameters_by_kind(model)

    def group(kind: str, rate: float) -> dict[str, Any]:
        return {"params": kinds[kind], "lr": rate, "base": rate}

    adam, sgd = [group("switch", rates.lr_switch)], [group("head", rates.lr_head)]
    (sgd if rates.norm == "sgd" else adam).append(group("norm", rates.lr_norm))
    if rates.train_backbone:
        sgd.append(group("backbone", rates.lr_backbone))
    return {
        "adam": torch.optim.Adam(adam, fused=True),
        "sgd": torch.optim.SGD(sgd, momentum=rates.momentum, weight_decay=rates.weight_decay, fused=True),
    }
