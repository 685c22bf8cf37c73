"""Params × and FLOP ×: costs of a multi-domain network relative to its backbone, as the published tables count.

Params = shared weights left + for each domain its batch norm (affine and statistics) and one bit, 1/32 parameter, for
each switch; heads excluded. So Piggyback's nine masks of one bit per weight give 1 + 9/32 = 1.28 [P].
FLOP = mean over domains of the multiply-adds of the channels that are on; ``exact`` also leaves out filters that
nothing reads, and is lower than what the papers count. FLOPs are two per multiply-add (MAC).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bap.prune.layers import SwitchBank, conv_specs
from bap.prune.liveness import Liveness, find_live_in
from bap_kernels import set_domain
from bap_kernels.nn import DomainBatchNorm2d

__all__ = ["Cost", "DomainCost", "adapters_params", "count", "masks_params"]


def masks_params(masks: int, bits: float = 1.0) -> float:
    """Params × of a backbone with so many masks of some bits for each weight, as Piggyback has.

    Examples:
        >>> from bap.prune.counting import masks_params
        >>> masks_params(9)
        1.28125
    """
    return 1 + masks * bits / 32


def adapters_params(model: nn.Module, domains: int) -> float:
    """Params × of residual adapters: for each further domain a 1×1 beside every 3×3 convolution, and batch norm.

    Args:
        model: the plain backbone.
        domains: those beyond the source.

    Examples:
        >>> from bap.prune.counting import adapters_params
        >>> from bap.models import ResNet26
        >>> round(adapters_params(ResNet26(), 9), 1)
        2.0
    """
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    each = sum(m.in_channels * m.out_channels // m.groups for m in convs if m.in_channels > 3)
    each += sum(4 * m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    return 1 + domains * each / backbone_params(model)


def backbone_params(model: nn.Module) -> int:
    """Weights of the convolutions, and affine parameters and statistics of the batch norms, of one domain.

    Args:
        model: plain or with domains; of batch norms with domains one is counted. Linear layers are heads.
    """
    total = 0
    inside = {m for layer in model.modules() if isinstance(layer, DomainBatchNorm2d) for m in layer.domains.modules()}
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            total += module.weight.numel() + (0 if module.bias is None else module.bias.numel())
        elif isinstance(module, DomainBatchNorm2d):
            norm = next(iter(module.domains.values()))
            assert isinstance(norm, nn.BatchNorm2d)
            total += 4 * norm.num_features
        elif isinstance(module, nn.BatchNorm2d) and module not in inside:
            total += 4 * module.num_features
    return total


@dataclass(frozen=True)
class DomainCost:
    """Cost of one domain.

    Args:
        macs: of the channels that are on, all filters computed, as the papers count.
        exact_macs: the same without filters that nothing reads.
        weights: shared weights that the domain needs, filters that nothing reads left out.
        norm_params: of its batch norms, for the channels left after pruning.
        switches: their number after pruning; each is one bit.
    """

    macs: int
    exact_macs: int
    weights: int
    norm_params: int
    switches: int


@dataclass(frozen=True)
class Cost:
    """Cost of a network, absolute and relative to its backbone.

    Args:
        backbone_params, backbone_macs: of the plain network, heads excluded; MACs of one image.
        weights: shared weights left after pruning.
        domains: {domain: its cost}.
    """

    backbone_params: int
    backbone_macs: int
    weights: int
    domains: dict[str, DomainCost]

    @property
    def params(self) -> float:
        """Params ×."""
        own = sum(cost.norm_params + cost.switches / 32 for cost in self.domains.values())
        return (self.weights + own) / self.backbone_params

    @property
    def flop(self) -> float:
        """FLOP ×, as the papers count."""
        return sum(cost.macs for cost in self.domains.values()) / len(self.domains) / self.backbone_macs

    @property
    def exact_flop(self) -> float:
        """FLOP × with dead filters left out."""
        return sum(cost.exact_macs for cost in self.domains.values()) / len(self.domains) / self.backbone_macs

    def as_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return {**asdict(self), "params": self.params, "flop": self.flop, "exact_flop": self.exact_flop}


@torch.no_grad()
def count(model: nn.Module, example: Tensor, prune: bool = True, live: dict[str, Liveness] | None = None) -> Cost:
    """Counts a model with switches.

    Args:
        model: a model that went through :func:`bap_kernels.nn.switch_`.
        example: (1, 3, H, W): the input size.
        prune: leave out what no domain uses; False counts all shared weights.
        live: {domain: what it needs}, if :func:`bap.prune.liveness.find_live_in` has been called already.

    Examples:
        >>> import torch
        >>> import bap_kernels as bk
        >>> from bap.prune.counting import count
        >>> from bap.models import ResNet26
        >>> net = bk.nn.switch_(ResNet26(10, (8, 16, 32), (1, 1, 1)), ["a", "b"], heads={"a": 10, "b": 4})
        >>> cost = count(net, torch.zeros(1, 3, 32, 32))
        >>> cost.flop, round(cost.params, 3)
        (1.0, 1.025)
    """
    bank = SwitchBank(model)
    if live is None:
        live = find_live_in(model, example, bank.domains)
    set_domain(model, bank.domains[0])
    specs = conv_specs(model, example)
    on = {name: bank.by_layer(bank.mask(name)) for name in bank.domains}
    all_on = {name: torch.ones(spec.in_channels, dtype=torch.bool) for name, spec in specs.items()}

    def reads(domain: str, layer: str) -> Tensor:
        return on[domain].get(layer, all_on[layer]).cpu()

    weights = 0
    for layer, spec in specs.items():
        rows = torch.stack([live[name].filters[layer] for name in live]).any(0)
        columns = torch.stack([reads(name, layer) for name in live]).any(0)
        bias = model.get_submodule(layer).bias is not None
        if not prune:
            rows, columns = torch.ones_like(rows), torch.ones_like(columns)
        kept = int(rows.sum())
        weights += kept * spec.taps * (int(columns.sum()) if spec.groups == 1 else 1) + kept * bias
    # Batch norm is kept where any domain needs the channel: the domains' tensors have one shape.
    norms = {
        layer: torch.stack([live[name].norms[layer] for name in live]).any(0) for layer in live[bank.domains[0]].norms
    }
    own_norm = {layer: isinstance(model.get_submodule(layer), DomainBatchNorm2d) for layer in norms}
    norm_width = {layer: int(kept.sum()) if prune else kept.numel() for layer, kept in norms.items()}
    weights += sum(4 * width for layer, width in norm_width.items() if not own_norm[layer])
    domains = {}
    for name in bank.domains:
        macs = exact = needed = switches = 0
        for layer, spec in specs.items():
            read = int(reads(name, layer).sum())
            written = int(live[name].filters[layer].sum())
            macs += read * spec.macs_per_channel
            each = written * spec.taps * (read if spec.groups == 1 else 1)
            exact += each * spec.positions
            needed += each
            if layer in on[name]:
                union = torch.stack([reads(other, layer) for other in live]).any(0)
                switches += int(union.sum()) if prune else spec.in_channels
        norm = sum(4 * width for layer, width in norm_width.items() if own_norm[layer])
        domains[name] = DomainCost(macs, exact, needed, norm, switches)
    return Cost(backbone_params(model), sum(spec.macs for spec in specs.values()), weights, domains)
