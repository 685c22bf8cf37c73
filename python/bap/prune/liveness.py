"""Filters and batch-norm channels that a domain needs: those whose output is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from bap_kernels.plan.live import live_channels

__all__ = ["Liveness", "find_live", "find_live_in"]


@dataclass(frozen=True)
class Liveness:
    """What one domain needs.

    Args:
        filters: {convolution: (K,) bool}, its outputs that something reads.
        norms: {batch norm: (C,) bool}, the same.
    """

    filters: dict[str, Tensor]
    norms: dict[str, Tensor]


def find_live(model: nn.Module, example: Tensor, domain: str) -> Liveness:
    """What one domain of a model needs, with its switches as they are; the model is not changed.

    Args:
        model: a model that went through :func:`bap_kernels.nn.switch_`.
        example: (N, 3, H, W); its values do not matter.
        domain: the domain.

    Raises:
        ValueError: if the model has no such domain, or cannot be recorded.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import bap_kernels as bk
        >>> from bap.prune.liveness import find_live
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
        >>> net = bk.nn.switch_(net, ["a"], lambda module, name: name == "2")
        >>> with torch.no_grad():
        ...     net[2].domains["a"].score[1] = 0
        >>> find_live(net, torch.zeros(1, 3, 8, 8), "a").filters["0"].tolist()
        [True, False, True, True]
    """
    return find_live_in(model, example, [domain])[domain]


def find_live_in(model: nn.Module, example: Tensor, domains: Iterable[str]) -> dict[str, Liveness]:
    """What each of several domains needs, as :func:`find_live`, by one run of the model on the example."""
    device = next(model.parameters()).device
    live = {}
    for domain, layers in live_channels("find_live", model, example.to(device), domains).items():
        convs = {name for name in layers if isinstance(model.get_submodule(name), nn.Conv2d)}
        live[domain] = Liveness(
            {name: mask for name, mask in layers.items() if name in convs},
            {name: mask for name, mask in layers.items() if name not in convs},
        )
    return live
