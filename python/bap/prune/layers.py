"""Sizes and costs of convolutions, and the switches of a whole network as one vector."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bap.models import evaluating
from bap_kernels.nn import ChannelSwitch, SwitchedConv2d

__all__ = ["ConvSpec", "SwitchBank", "conv_specs", "switched_layers"]


@dataclass(frozen=True)
class ConvSpec:
    """Sizes of one convolution on one input size.

    Args:
        in_channels: C.
        out_channels: K.
        taps: kH kW.
        groups: 1, or C for a depthwise layer.
        positions: output pixels of one image, oH oW, summed over the calls if the layer is used more than once.
    """

    in_channels: int
    out_channels: int
    taps: int
    groups: int
    positions: int

    @property
    def params_per_channel(self) -> int:
        """Weights that read one input channel."""
        return self.out_channels * self.taps // self.groups

    @property
    def macs_per_channel(self) -> int:
        """Multiply-adds of one image that read one input channel."""
        return self.params_per_channel * self.positions

    @property
    def params(self) -> int:
        """Weights of the layer."""
        return self.in_channels * self.params_per_channel

    @property
    def macs(self) -> int:
        """Multiply-adds of one image."""
        return self.in_channels * self.macs_per_channel


def switched_layers(model: nn.Module) -> Iterator[tuple[str, SwitchedConv2d]]:
    """The convolutions of a model that have switches, as (name, layer), in the model's order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, SwitchedConv2d))


def conv_specs(model: nn.Module, example: Tensor) -> dict[str, ConvSpec]:
    """Sizes of every :class:`torch.nn.Conv2d` of a model that an input reaches, in the order of the model.

    Args:
        model: any module, on the device of ``example``, with an active domain if it has domains. Its modes and
            statistics stay as they are.
        example: (N, 3, H, W).

    Raises:
        ValueError: if the input reaches no convolution.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from bap.prune.layers import conv_specs
        >>> specs = conv_specs(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)), torch.zeros(1, 3, 4, 4))
        >>> specs["0"].macs, specs["0"].params_per_channel
        (3456, 72)
    """
    positions: dict[nn.Module, int] = {}
    handles = []

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        positions[module] = positions.get(module, 0) + output.shape[-2] * output.shape[-1]

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(count))
    try:
        with evaluating(model):
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    if not positions:
        raise ValueError("conv_specs(): expected `model` to have convolutions that `example` reaches, got none.")
    return {
        name: ConvSpec(m.in_channels, m.out_channels, m.kernel_size[0] * m.kernel_size[1], m.groups, positions[m])
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d) and m in positions
    }


class SwitchBank:
    """All switches of a model: one vector of M per domain, layer after layer.

    The vectors are built from the layers' scores in every call, so that they follow training and loading.

    Args:
        model: a model that went through :func:`bap_kernels.nn.switch_`.

    Raises:
        ValueError: if the model has no switches.

    Examples:
        >>> from torch import nn
        >>> import bap_kernels as bk
        >>> from bap.prune.layers import SwitchBank
        >>> model = bk.nn.switch_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)), ["birds", "cars"])
        >>> bank = SwitchBank(model)
        >>> bank.sizes, bank.masks().shape
        ([3, 8], torch.Size([2, 11]))
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = list(switched_layers(model))
        if not self.layers:
            raise ValueError("SwitchBank(): expected `model` to have switches, got none. Hint: call bk.nn.switch_.")
        self.names = [name for name, _ in self.layers]
        self.sizes = [layer.in_channels for _, layer in self.layers]

    @property
    def domains(self) -> list[str]:
        """Names of the domains, in the layers' order."""
        return list(self.layers[0][1].domains)

    def of(self, domain: str) -> list[ChannelSwitch]:
        """The layers' switches of one domain."""
        switches = [layer.domains[domain] for _, layer in self.layers]
        return [switch for switch in switches if isinstance(switch, ChannelSwitch)]

    def thresholds(self, domain: str) -> Tensor:
        """τ of every switch, (M,), float32."""
        return torch.cat([torch.full_like(switch.score.detach(), switch.threshold) for switch in self.of(domain)])

    def scores(self, domain: str) -> Tensor:
        """The scores of one domain, (M,), differentiable."""
        return torch.cat([switch.score for switch in self.of(domain)])

    def switches(self, domain: str) -> Tensor:
        """The switches of one domain, (M,), zeros and ones with the straight-through gradient."""
        scores = self.scores(domain)
        value = scores.detach()
        return (value > self.thresholds(domain)).to(value.dtype) + (scores - value)

    @torch.no_grad()
    def mask(self, domain: str) -> Tensor:
        """The channels that are on in one domain, (M,), bool."""
        return self.scores(domain) > self.thresholds(domain)

    def masks(self) -> Tensor:
        """The channels that are on, (D, M), bool."""
        return torch.stack([self.mask(domain) for domain in self.domains])

    @torch.no_grad()
    def write(self, domain: str, scores: Tensor) -> None:
        """Replaces the scores of one domain by (M,) others."""
        for switch, part in zip(self.of(domain), scores.split(self.sizes), strict=True):
            switch.score.copy_(part)

    def by_layer(self, vector: Tensor) -> dict[str, Tensor]:
        """Parts of an (..., M) tensor by layer name."""
        return dict(zip(self.names, vector.split(self.sizes, dim=-1), strict=True))
