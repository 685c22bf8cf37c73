r"""Sharing losses: they make domains keep the same channels, so that what none keeps can go.

Names and the learnable weight are the authors' [P] (BAP, arXiv 2309.11464); the formulas are our reconstruction [R]:

    Int:      max(0, 1 − |∩_d θ_d| / (β M))
    Union:    max(0, |∪_d θ_d| / (β M) − 1)
    Jaccard:  1 − |∩_d θ_d| / |∪_d θ_d|

with |∩| = Σ_m a_m Π_d s_dm, |∪| = Σ_m a_m (1 − Π_d (1 − s_dm)) and M = Σ_m a_m. On binary switches the gradient of a
channel is zero unless all other domains agree on it; on relaxed ones, sigmoids of the scores, it is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bap.config import LOSSES

__all__ = ["LOSSES", "SharingWeight", "intersection", "relax", "sharing_loss", "sharing_loss_of_one", "union"]


def intersection(switches: Tensor, costs: Tensor) -> Tensor:
    """|∩|: the cost of what every domain keeps, 0-d, from (D, M) switches in [0, 1] and (M,) costs; differentiable.

    Examples:
        >>> import torch
        >>> from bap.train.sharing import intersection, union
        >>> switches = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
        >>> costs = torch.tensor([1.0, 2.0, 4.0])
        >>> intersection(switches, costs).item(), union(switches, costs).item()
        (1.0, 3.0)
    """
    return (switches.prod(0) * costs.to(switches.device, switches.dtype)).sum()


def union(switches: Tensor, costs: Tensor) -> Tensor:
    """|∪|: the cost of what at least one domain keeps, 0-d, from (D, M) switches and (M,) costs; differentiable."""
    return ((1 - (1 - switches).prod(0)) * costs.to(switches.device, switches.dtype)).sum()


def relax(scores: Tensor, threshold: float | Tensor, temperature: float = 2e-3) -> Tensor:
    """Scores as numbers between 0 and 1: sigmoid((s̃ − τ) / T), ½ at the threshold [R].

    Raises:
        ValueError: if the temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"relax(): expected `temperature` to be positive, got {temperature}.")
    return torch.sigmoid((scores - threshold) / temperature)


def sharing_loss(kind: str, switches: Tensor, costs: Tensor, beta: float) -> Tensor:
    """One of the losses above.

    Args:
        kind: ``"int"``, ``"union"`` or ``"jaccard"``.
        switches: (D, M), with the straight-through gradient, or relaxed by :func:`relax`.
        costs: (M,), a.
        beta: β, in (0, 1].

    Returns:
        0-d, at least 0. Jaccard is 0 where no domain keeps anything.

    Raises:
        ValueError: for another kind, β out of range, or shapes that do not fit.

    Examples:
        >>> import torch
        >>> from bap.train.sharing import sharing_loss
        >>> switches = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]])
        >>> [sharing_loss(kind, switches, torch.ones(4), 0.5).item() for kind in ("int", "union")]
        [0.5, 0.5]
    """
    if kind not in LOSSES:
        raise ValueError(f"sharing_loss(): expected `kind` to be one of {list(LOSSES)}, got {kind!r}.")
    if not 0 < beta <= 1:
        raise ValueError(f"sharing_loss(): expected `beta` to be in (0, 1], got {beta}.")
    if switches.dim() != 2 or costs.shape != switches.shape[1:]:
        raise ValueError(
            f"sharing_loss(): expected `switches` (D, M) and `costs` (M,), got {tuple(switches.shape)} and "
            f"{tuple(costs.shape)}."
        )
    allowed = beta * float(costs.sum())
    if kind == "int":
        return torch.relu(1 - intersection(switches, costs) / allowed)
    if kind == "union":
        return torch.relu(union(switches, costs) / allowed - 1)
    together = union(switches, costs)
    if float(together.detach()) == 0:
        return 0 * together
    return 1 - intersection(switches, costs) / together


def sharing_loss_of_one(kind: str, own: Tensor, others: Tensor, shares: Tensor, beta: float) -> Tensor:
    """:func:`sharing_loss` as a function of one domain's switches, the others' being constants; reads nothing back.

    Args:
        kind: ``"int"``, ``"union"`` or ``"jaccard"``.
        own: (M,), of the domain, in [0, 1].
        others: (D - 1, M), of the other domains.
        shares: (M,), costs that sum to 1.
        beta: β, in (0, 1].

    Returns:
        0-d, at least 0.

    Examples:
        >>> import torch
        >>> from bap.train.sharing import sharing_loss, sharing_loss_of_one
        >>> switches = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]])
        >>> shares = torch.full((4,), 0.25)
        >>> [sharing_loss_of_one(kind, switches[0], switches[1:], shares, 0.5).item() for kind in ("int", "union")]
        [0.5, 0.5]
    """
    with torch.no_grad():
        # What this domain can still change: channels that all the others keep, and those that none of them does.
        agreed = others.prod(0) * shares if kind != "union" else shares
        free = (1 - others).prod(0) * shares if kind != "int" else shares
        taken = shares.sum() - free.sum()
    if kind == "int":
        return torch.relu(1 - torch.dot(own, agreed) / beta)
    together = taken + torch.dot(own, free)
    if kind == "union":
        return torch.relu(together / beta - 1)
    apart = 1 - torch.dot(own, agreed) / together.clamp_min(torch.finfo(together.dtype).tiny)
    return torch.where(together > 0, apart, 0 * together)


@dataclass
class SharingWeight:
    """λ_PS, fixed or learnable; published fixed ones are 1, .5, .25 and .125 [Q].

    Learnable [R]: a dual variable of the constraint L_PS ≤ slack, so λ ← max(0, λ + η (L_PS − slack)).

    Args:
        value: λ_PS, to start with or for good.
        learnable: whether :meth:`update` changes it.
        rate: η.
        slack: the loss that is put up with.

    Raises:
        ValueError: for a negative value or a rate that is not positive.

    Examples:
        >>> from bap.train.sharing import SharingWeight
        >>> SharingWeight(0.5).update(0.75), SharingWeight(0.5, learnable=True, rate=1.0).update(0.75)
        (0.5, 1.25)
    """

    value: float = 1.0
    learnable: bool = False
    rate: float = 1e-2
    slack: float = 0.0

    def __post_init__(self) -> None:
        if not self.value >= 0:
            raise ValueError(f"SharingWeight(): expected `value` to be at least 0, got {self.value}.")
        if not self.rate > 0:
            raise ValueError(f"SharingWeight(): expected `rate` to be positive, got {self.rate}.")

    def update(self, loss: float) -> float:
        """One step of dual ascent if it is learnable; returns λ_PS."""
        if self.learnable:
            self.value = max(0.0, self.value + self.rate * (loss - self.slack))
        return self.value
