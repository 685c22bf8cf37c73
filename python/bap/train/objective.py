r"""What a step adds to the cross entropy: L_B,d + λ_PS L_PS in one domain's switches, without waiting for the device.

The switches of the other domains are constants of the step. They stand in one matrix, of which only the rows of domains
that were trained since are built anew; λ lives on the device during an epoch.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from bap.config import Config
from bap.prune.layers import SwitchBank
from bap.train.budget import Multiplier
from bap.train.sharing import SharingWeight, relax, sharing_loss_of_one

__all__ = ["Objective", "warn_of_vanishing_gradients"]

# From so many domains on, straight-through sharing losses are warned of.
_MANY_DOMAINS = 4


class Objective:
    """Budget and sharing losses of the domains of a network.

    Args:
        config: the settings.
        bank: the network's switches.
        costs: (M,), a, float64.
        beta: β of the run.
        multipliers: {domain: λ_d}; they are read by :meth:`begin` and written by :meth:`end`.
        sharing_weight: λ_PS, read and written like them.
        without: domains that the sharing loss leaves out.
        device: of the network.

    Attributes:
        beta: β of the current epoch.
        factor: on λ_PS, of the current epoch.
    """

    def __init__(
        self,
        config: Config,
        bank: SwitchBank,
        costs: Tensor,
        beta: float,
        multipliers: Mapping[str, Multiplier],
        sharing_weight: SharingWeight,
        without: Iterable[str],
        device: torch.device,
    ) -> None:
        self.bank, self.multipliers, self.sharing_weight = bank, multipliers, sharing_weight
        self.sharing, self.rate = config.sharing, config.budget.multiplier_rate
        self.beta, self.factor = beta, 1.0
        # Sums to 1, so that no sum is read from the device.
        self.shares = (costs / costs.sum()).float().to(device)
        self.device = device
        left_out = set(without)
        self._names = [name for name in bank.domains if name not in left_out]
        self._thresholds = {name: bank.thresholds(name).to(device) for name in bank.domains}
        self._rows = torch.zeros(len(self._names), len(self.shares), device=device)
        self._others = {
            name: torch.tensor([row for row, other in enumerate(self._names) if other != name], device=device)
            for name in self._names
        }
        self._fresh: set[str] = set()
        self._lambdas: dict[str, Tensor] = {}
        self._weight = torch.tensor(0.0, dtype=torch.float64, device=device)
        self.begin()

    def begin(self, beta: float | None = None, factor: float = 1.0) -> None:
        """Starts an epoch: takes over λ, the budget and the factor on λ_PS; the switches may have been changed.

        Args:
            beta: β of the epoch; None leaves it.
            factor: on λ_PS.
        """
        self.beta, self.factor = self.beta if beta is None else beta, factor
        self._fresh.clear()
        for name, multiplier in self.multipliers.items():
            self._lambdas[name] = torch.tensor(multiplier.value, dtype=torch.float64, device=self.device)
        self._weight = torch.tensor(self.sharing_weight.value, dtype=torch.float64, device=self.device)

    def end(self) -> None:
        """Ends an epoch: writes λ back; waits for the device."""
        for name, value in self._lambdas.items():
            self.multipliers[name].value = float(value)
        self.sharing_weight.value = float(self._weight)

    def changed(self, domain: str) -> None:
        """Says that a domain's scores were changed, by a step of an optimiser."""
        self._fresh.discard(domain)

    def _row(self, domain: str, scores: Tensor) -> Tensor:
        """What the sharing loss sees of a domain: switches with the straight-through gradient, or sigmoids."""
        if self.sharing.relaxed:
            return relax(scores, self._thresholds[domain], self.sharing.temperature)
        value = scores.detach()
        return (value > self._thresholds[domain]).to(value.dtype) + (scores - value)

    @torch.no_grad()
    def _rows_of_others(self, domain: str) -> Tensor:
        for row, name in enumerate(self._names):
            if name != domain and name not in self._fresh:
                self._rows[row] = self._row(name, self.bank.scores(name).detach())
                self._fresh.add(name)
        return self._rows.index_select(0, self._others[domain])

    def penalty(self, domain: str) -> Tensor:
        """The losses of a domain, 0-d; one step of dual ascent of its λ, and of λ_PS where that is learnable."""
        scores = self.bank.scores(domain)
        value = scores.detach()
        switches = (value > self._thresholds[domain]).to(value.dtype) + (scores - value)
        used = torch.dot(switches, self.shares)
        multiplier = self._lambdas[domain]
        total = torch.relu(multiplier.float() * (used - self.beta))
        if self.sharing.loss is not None and len(self._names) > 1 and domain in self._others:
            own = self._row(domain, scores) if self.sharing.relaxed else switches
            loss = sharing_loss_of_one(self.sharing.loss, own, self._rows_of_others(domain), self.shares, self.beta)
            if self.sharing_weight.learnable:
                total = total + self._weight.float() * loss
                raised = self._weight + self.sharing_weight.rate * (loss.detach().double() - self.sharing_weight.slack)
                self._weight = raised.clamp_min(0)
            else:
                total = total + self.sharing_weight.value * self.factor * loss
        self._lambdas[domain] = (multiplier + self.rate * (used.detach().double() - self.beta)).clamp_min(0)
        return total


def warn_of_vanishing_gradients(config: Config, count: int) -> None:
    """Warns of a sharing loss that hardly moves the switches of so many domains."""
    sharing = config.sharing
    if sharing.loss is not None and not sharing.relaxed and count >= _MANY_DOMAINS:
        warnings.warn(
            f"Trainer(): sharing.loss {sharing.loss!r} of {count} domains on straight-through switches: a switch "
            "gets a gradient only where all other domains agree on its channel, which is almost nowhere. "
            "Hint: -s relaxed=true",
            stacklevel=4,
        )
