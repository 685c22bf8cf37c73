r"""The budget: how much of the network a domain uses, the multiplier that bounds it, and the projection at the end.

The share of domain d over all switches m with costs a, and the loss that bounds it by β (BA², arXiv 1905.06242):

    θ̄_d = Σ_m a_m s_dm / Σ_m a_m                         [Q] for a = 1, [R] for the other measures
    L_B,d = max(0, λ_d (θ̄_d − β)),   λ_d ≥ 0              [Q]
    λ_d ← max(0, λ_d + η (θ̄_d − β))                       [R] dual ascent, which has these KKT semantics

The final projection is this project's own: after it θ̄_d ≤ β holds exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bap.config import MEASURES
from bap.config.groups import Budget
from bap.prune.layers import ConvSpec

__all__ = ["MEASURES", "Multiplier", "Projection", "beta_of", "check_room", "project", "share", "switch_costs"]


def switch_costs(
    measure: str, specs: Mapping[str, ConvSpec], milliseconds: Mapping[str, float] | None = None
) -> Tensor:
    """The cost a_m of every switch, layer after layer.

    ``switch`` counts channels; ``layer`` is the mean of the layers' own shares; ``param`` and ``mac`` count the weights
    and the multiply-adds behind the switch; ``time`` takes milliseconds that were measured on this machine.

    Args:
        measure: one of :data:`MEASURES`.
        specs: {layer name: sizes} of the switched layers, in order.
        milliseconds: {layer name: milliseconds of one input channel}, for ``time``; see
            :func:`bap.train.layer_times.measure_layers`.

    Returns:
        (M,), float64. Costs of ``switch``, ``param`` and ``mac`` are whole numbers.

    Raises:
        ValueError: for other measures, no layers, or missing milliseconds.

    Examples:
        >>> from bap.train.budget import switch_costs
        >>> from bap.prune.layers import ConvSpec
        >>> specs = {"a": ConvSpec(2, 4, 9, 1, 16), "b": ConvSpec(1, 2, 1, 1, 16)}
        >>> switch_costs("param", specs).tolist(), switch_costs("layer", specs).tolist()
        ([36.0, 36.0, 2.0], [0.25, 0.25, 0.5])
    """
    if measure not in MEASURES:
        raise ValueError(f"switch_costs(): expected `measure` to be one of {list(MEASURES)}, got {measure!r}.")
    if not specs:
        raise ValueError("switch_costs(): expected `specs` to have at least one layer, got none.")
    if measure == "time" and (milliseconds is None or set(specs) - set(milliseconds)):
        lacking = sorted(set(specs) - set(milliseconds or ()))
        raise ValueError(
            f"switch_costs(): expected `milliseconds` of every layer for the measure 'time', got none of {lacking}. "
            "Hint: bap.train.layer_times.measure_layers makes them."
        )
    costs = []
    for name, spec in specs.items():
        if measure == "switch":
            cost = 1.0
        elif measure == "layer":
            cost = 1.0 / (len(specs) * spec.in_channels)
        elif measure == "param":
            cost = float(spec.params_per_channel)
        elif measure == "mac":
            cost = float(spec.macs_per_channel)
        else:
            assert milliseconds is not None
            cost = float(milliseconds[name])
        costs.append(torch.full((spec.in_channels,), cost, dtype=torch.float64))
    return torch.cat(costs)


def beta_of(budget: Budget, costs: Tensor, fixed: float) -> float:
    """β of a run, which ``budget.milliseconds`` sets where it is given.

    Args:
        budget: the settings.
        costs: (M,), a, in milliseconds where ``budget.milliseconds`` is given.
        fixed: milliseconds that the layers take without channels.

    Raises:
        ValueError: if these leave no time for channels.
    """
    if budget.milliseconds is None:
        return budget.beta
    beta = min(1.0, (budget.milliseconds - fixed) / float(costs.sum()))
    if beta <= 0:
        raise ValueError(
            f"Trainer(): expected `budget.milliseconds` to be above {fixed:.3f} ms, which the layers take "
            f"without channels, got {budget.milliseconds}."
        )
    return beta


def share(switches: Tensor, costs: Tensor) -> Tensor:
    """θ̄: the part of all costs that is switched on, a 0-d tensor for (M,), (D,) for (D, M); differentiable.

    Examples:
        >>> import torch
        >>> from bap.train.budget import share
        >>> share(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1.0, 2.0, 1.0])).item()
        0.5
    """
    costs = costs.to(switches.device, switches.dtype if switches.is_floating_point() else costs.dtype)
    return (switches.to(costs.dtype) * costs).sum(-1) / costs.sum()


@dataclass
class Multiplier:
    """λ of one domain's budget: grows while the budget is exceeded, falls to 0 when there is slack [Q].

    Args:
        beta: β, in (0, 1].
        rate: η of the dual ascent [R].
        value: λ to start with.

    Raises:
        ValueError: for β outside (0, 1], a rate that is not positive or a negative value.

    Examples:
        >>> from bap.train.budget import Multiplier
        >>> multiplier = Multiplier(beta=0.5, rate=1.0)
        >>> multiplier.update(0.75), multiplier.update(0.75), multiplier.update(0.25), multiplier.update(0.0)
        (0.25, 0.5, 0.25, 0.0)
    """

    beta: float
    rate: float = 0.1
    value: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.beta <= 1:
            raise ValueError(f"Multiplier(): expected `beta` to be in (0, 1], got {self.beta}.")
        if not self.rate > 0:
            raise ValueError(f"Multiplier(): expected `rate` to be positive, got {self.rate}.")
        if not self.value >= 0:
            raise ValueError(f"Multiplier(): expected `value` to be at least 0, got {self.value}.")

    def loss(self, used: Tensor) -> Tensor:
        """L_B = max(0, λ (θ̄ − β)), differentiable in θ̄, 0-d."""
        return torch.relu(self.value * (used - self.beta))

    def update(self, used: float) -> float:
        """One step of dual ascent from θ̄; returns the new λ."""
        self.value = max(0.0, self.value + self.rate * (used - self.beta))
        return self.value


@dataclass(frozen=True)
class Projection:
    """The result of :func:`project`.

    Args:
        scores: (M,), the new scores.
        turned_off: switches that it turned off.
        before: θ̄ before.
        after: θ̄ after, at most β.
        turned_on: switches that it turned on, if room is given back.
    """

    scores: Tensor
    turned_off: int
    before: float
    after: float
    turned_on: int = 0


@torch.no_grad()
def check_room(costs: Tensor, beta: float, sizes: Sequence[int], keep_at_least: int) -> None:
    """Refuses a budget that `project` could not make hold, before anything is trained.

    Args:
        costs, beta, sizes, keep_at_least: as in :func:`project`.

    Raises:
        ValueError: if what must be kept exceeds β.
    """
    kept = sum(float(layer.sort(descending=True).values[:keep_at_least].sum()) for layer in costs.cpu().split(sizes))
    _check_kept(kept, costs, beta, keep_at_least)


def _check_kept(kept: float, costs: Tensor, beta: float, keep_at_least: int) -> None:
    total = float(costs.sum())
    if kept > beta * total:
        raise ValueError(
            f"project(): expected `beta` to leave room for {keep_at_least} channels of every layer, which take "
            f"{kept / total:.4f}, got {beta}. Hint: a lower `keep_at_least`."
        )


def project(
    scores: Tensor,
    threshold: float | Tensor,
    costs: Tensor,
    beta: float,
    sizes: Sequence[int] | None = None,
    keep_at_least: int = 0,
    give_back: bool = False,
) -> Projection:
    """Switches off the weakest scores until θ̄ ≤ β holds exactly; does nothing else where it holds already.

    Channels go in the order of their scores, lower numbers first among equals. One whose removal the budget does not
    need any more, because a dearer one went after it, comes back, strongest first.

    Args:
        scores: (M,), float32.
        threshold: τ, or (M,) of them; a switch is on where its score is greater.
        costs: (M,), float64, not negative; see :func:`switch_costs`.
        beta: β, in (0, 1].
        sizes: channels of each layer, for ``keep_at_least``.
        keep_at_least: the strongest so many of each layer's channels that are on stay on.
        give_back: whether channels that are off come back while θ̄ ≤ β holds, strongest first: the multiplier may have
            overshot, and left a domain far below its budget.

    Raises:
        ValueError: if β is out of range, or what must be kept exceeds it.

    Examples:
        >>> import torch
        >>> from bap.train.budget import project
        >>> projection = project(torch.tensor([0.3, 0.1, 0.2, 0.0]), 0.05, torch.ones(4, dtype=torch.float64), 0.5)
        >>> (projection.scores > 0.05).tolist(), projection.turned_off, projection.before, projection.after
        ([True, False, True, False], 1, 0.75, 0.5)
    """
    if not 0 < beta <= 1:
        raise ValueError(f"project(): expected `beta` to be in (0, 1], got {beta}.")
    device = scores.device
    values = scores.detach().cpu()
    limits = torch.as_tensor(threshold, dtype=values.dtype).cpu().expand_as(values)
    costs = costs.detach().cpu().double()
    on = values > limits
    total = float(costs.sum())
    allowed = beta * total
    before = float(costs[on].sum()) / total
    if float(costs[on].sum()) <= allowed and not give_back:
        return Projection(scores.detach().clone(), 0, before, before)
    protected = torch.zeros_like(on)
    if keep_at_least:
        if sizes is None:
            raise ValueError("project(): expected `sizes` for `keep_at_least`, got None.")
        start = 0
        for size in sizes:
            part = torch.where(on[start : start + size], values[start : start + size], torch.tensor(-torch.inf))
            best = part.argsort(descending=True, stable=True)[:keep_at_least]
            protected[start + best] = on[start + best]
            start += size
    _check_kept(float(costs[protected].sum()), costs, beta, keep_at_least)
    # A margin that a switch has over its threshold is comparable between layers; the score alone is not.
    margin = values - limits
    weakest = [i for i in margin.argsort(stable=True).tolist() if on[i] and not protected[i]]
    kept = on.clone()
    used = float(costs[on].sum())
    removed = []
    for index in weakest:
        if used <= allowed:
            break
        kept[index] = False
        removed.append(index)
        # Summed in full: a running difference would round, and the bound is exact.
        used = float(costs[kept].sum())
    for index in reversed(removed):
        kept[index] = True
        again = float(costs[kept].sum())
        if again > allowed:
            kept[index] = False
    if give_back:
        for index in margin.argsort(descending=True, stable=True).tolist():
            if not kept[index]:
                kept[index] = True
                if float(costs[kept].sum()) > allowed:
                    kept[index] = False
    off, back = on & ~kept, kept & ~on
    below = torch.nextafter(limits, torch.full_like(limits, -torch.inf))
    above = torch.nextafter(limits, torch.full_like(limits, torch.inf))
    projected = torch.where(off, below, torch.where(back, above, values)).to(device)
    return Projection(projected, int(off.sum()), before, float(costs[kept].sum()) / total, int(back.sum()))
