"""Drops what no domain uses, checks that every domain answers as before, and says what is left.

Here the weights that go are set to zero, and a checkpoint leaves them out; the counting is exact. Taking them out of
the layers themselves, so that tensors get narrower, is the work of ``bap_kernels``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import bap_kernels as bk
from bap.models import evaluating
from bap.prune.counting import Cost, count
from bap.prune.layers import SwitchBank, conv_specs
from bap.prune.liveness import find_live_in

__all__ = ["PruneError", "Pruned", "kept_of", "prune_"]


class PruneError(RuntimeError):
    """A domain's outputs are not what they were."""


@dataclass(frozen=True)
class Pruned:
    """What :func:`prune_` did.

    Args:
        before, after: costs, in numbers and relative to the backbone.
        rows: {convolution: (K,) bool}, filters that are left.
        columns: {convolution: (C,) bool}, input slices that are left.
        largest_change: of any output of any domain, relative to its largest output.
    """

    before: Cost
    after: Cost
    rows: dict[str, Tensor]
    columns: dict[str, Tensor]
    largest_change: float

    def as_rows(self) -> list[dict[str, float | str]]:
        """The table: for every domain and their union, parameters and MACs before and after."""
        made: list[dict[str, float | str]] = []
        for name, one in self.after.domains.items():
            made.append(
                {
                    "domain": name,
                    "weights": one.weights,
                    "norm": one.norm_params,
                    "switch bits": one.switches,
                    "macs": one.macs,
                    "macs exact": one.exact_macs,
                    "macs relative": one.macs / self.after.backbone_macs,
                }
            )
        made.append(
            {
                "domain": "union",
                "weights": self.after.weights,
                "norm": sum(one.norm_params for one in self.after.domains.values()),
                "switch bits": sum(one.switches for one in self.after.domains.values()),
                "macs": round(self.after.flop * self.after.backbone_macs),
                "macs exact": round(self.after.exact_flop * self.after.backbone_macs),
                "macs relative": self.after.flop,
            }
        )
        return made


def kept_of(model: nn.Module, example: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Filters and input slices of every convolution that at least one domain uses, as in :class:`Pruned`."""
    bank = SwitchBank(model)
    live = find_live_in(model, example, bank.domains).values()
    on = bank.by_layer(bank.masks().any(0).cpu())
    bk.set_domain(model, bank.domains[0])
    facts = conv_specs(model, example)
    rows = {name: torch.stack([one.filters[name] for one in live]).any(0) for name in facts}
    columns = {name: on.get(name, torch.ones(facts[name].in_channels, dtype=torch.bool)) for name in facts}
    return rows, columns


def _outputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    made = {}
    with evaluating(model):
        for name, x in inputs.items():
            bk.set_domain(model, name)
            made[name] = model(x).float().clone()
    return made


@torch.no_grad()
def prune_(
    model: nn.Module, example: Tensor, inputs: Mapping[str, Tensor] | None = None, tolerance: float = 1e-5
) -> Pruned:
    """Sets to zero, in place, every filter and input slice that no domain uses.

    Args:
        model: a model with switches, as training left it.
        example: (1, 3, H, W): the input size.
        inputs: {domain: images (N, 3, H, W)} to compare outputs on; None draws random ones.
        tolerance: largest change that rounding explains, relative to the domain's largest output.

    Raises:
        PruneError: if an output changes by more; the model is as before then.

    Examples:
        >>> import torch
        >>> from bap.config import Config
        >>> from bap.prune.layers import SwitchBank
        >>> from bap.train.network import switched_network
        >>> from bap.prune.prune import prune_
        >>> config = Config(model_options={"widths": [4, 8, 8], "blocks": [1, 1, 1]})
        >>> model = switched_network(config, {"a": 3, "b": 2}).eval()
        >>> bank = SwitchBank(model)
        >>> for name in bank.domains:
        ...     bank.write(name, torch.full((sum(bank.sizes),), 1e-2).index_fill(0, torch.arange(0, 20, 2), 0.0))
        >>> made = prune_(model, torch.zeros(1, 3, 32, 32))
        >>> made.after.weights < made.before.weights, made.largest_change
        (True, 0.0)
    """
    domains = SwitchBank(model).domains
    device = next(model.parameters()).device
    if inputs is None:
        generator = torch.Generator().manual_seed(0)
        inputs = {name: torch.randn(4, *example.shape[1:], generator=generator) for name in domains}
    inputs = {name: x.to(device) for name, x in inputs.items()}
    example = example.to(device)
    live = find_live_in(model, example, domains)
    before = count(model, example, prune=False, live=live)
    after = count(model, example, prune=True, live=live)
    rows, columns = kept_of(model, example)
    expected = _outputs(model, inputs)
    saved = {}
    for name in rows:
        conv = model.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        saved[conv] = (conv.weight.detach().clone(), None if conv.bias is None else conv.bias.detach().clone())
        conv.weight[~rows[name].to(device)] = 0
        if conv.groups == 1:
            conv.weight[:, ~columns[name].to(device)] = 0
        if conv.bias is not None:
            conv.bias[~rows[name].to(device)] = 0
    found = _outputs(model, inputs)
    worst = 0.0
    for name, value in found.items():
        change = float((value - expected[name]).abs().max() / expected[name].abs().max().clamp_min(1e-12))
        worst = max(worst, change)
        if not change <= tolerance:
            for conv, (weight, bias) in saved.items():
                conv.weight.copy_(weight)
                if conv.bias is not None and bias is not None:
                    conv.bias.copy_(bias)
            raise PruneError(
                f"prune_(): expected the outputs of every domain to stay within {tolerance:g}, got {change:.3g} for "
                f"{name!r}; nothing was changed."
            )
    return Pruned(before, after, rows, columns, worst)
