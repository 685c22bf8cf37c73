"""Removes what no domain uses, and checks that no output of any domain changes.

Here the weights that go are set to zero, and a checkpoint leaves them out; the counting is exact. Taking them out of
the layers themselves, so that tensors get narrower, is the work of ``bap_kernels``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
    """The outputs of a domain changed."""


@dataclass(frozen=True)
class Pruned:
    """The result of :func:`prune_`.

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
        rows: list[dict[str, float | str]] = []
        for name, cost in self.after.domains.items():
            rows.append(
                {
                    "domain": name,
                    "weights": cost.weights,
                    "norm": cost.norm_params,
                    "switch bits": cost.switches,
                    "macs": cost.macs,
                    "macs exact": cost.exact_macs,
                    "macs relative": cost.macs / self.after.backbone_macs,
                }
            )
        rows.append(
            {
                "domain": "union",
                "weights": self.after.weights,
                "norm": sum(cost.norm_params for cost in self.after.domains.values()),
                "switch bits": sum(cost.switches for cost in self.after.domains.values()),
                "macs": round(self.after.flop * self.after.backbone_macs),
                "macs exact": round(self.after.exact_flop * self.after.backbone_macs),
                "macs relative": self.after.flop,
            }
        )
        return rows


def kept_of(model: nn.Module, example: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Filters and input slices of every convolution that at least one domain uses, as in :class:`Pruned`."""
    bank = SwitchBank(model)
    live = find_live_in(model, example, bank.domains).values()
    on = bank.by_layer(bank.masks().any(0).cpu())
    bk.set_domain(model, bank.domains[0])
    specs = conv_specs(model, example)
    rows = {name: torch.stack([needs.filters[name] for needs in live]).any(0) for name in specs}
    columns = {name: on.get(name, torch.ones(specs[name].in_channels, dtype=torch.bool)) for name in specs}
    return rows, columns


def check_inputs(
    domains: Iterable[str], example: Tensor, inputs: Mapping[str, Tensor] | None, device: torch.device
) -> dict[str, Tensor]:
    """Images of every domain on a device: ``inputs``, or random ones of the example's size."""
    if inputs is None:
        generator = torch.Generator().manual_seed(0)
        inputs = {name: torch.randn(4, *example.shape[1:], generator=generator) for name in domains}
    return {name: x.to(device) for name, x in inputs.items()}


def relative_change(actual: Tensor, expected: Tensor) -> float:
    """The largest change of an output, relative to the largest output."""
    return float((actual.float() - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def _outputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    outputs = {}
    # Direct convolutions round least.
    with evaluating(model), bk.use_winograd(False):
        for name, x in inputs.items():
            bk.set_domain(model, name)
            outputs[name] = model(x).float().clone()
    return outputs


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
        >>> pruned = prune_(model, torch.zeros(1, 3, 32, 32))
        >>> pruned.after.weights < pruned.before.weights, pruned.largest_change
        (True, 0.0)
    """
    domains = SwitchBank(model).domains
    device = next(model.parameters()).device
    inputs = check_inputs(domains, example, inputs, device)
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
    outputs = _outputs(model, inputs)
    worst = 0.0
    for name, value in outputs.items():
        change = relative_change(value, expected[name])
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
