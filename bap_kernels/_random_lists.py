"""Random lists for the convolutions of a network, the same on every machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np
from torch import nn

from bap_kernels._arguments import check_module
from bap_kernels.channels import ChannelLists
from bap_kernels.layer_kinds import GatheredLayer, SwitchedLayer

__all__ = ["listed_convolutions", "random_lists"]

# Layers that read fewer channels than this are stems on images; random tables let them read all.
_FEWEST_TO_PRUNE = 5


def _draw(channels: int, density: float, exact: bool, *seed: object) -> list[int]:
    """Draws channels, at least one; the same on every machine and with every library version.

    Args:
        exact: ``density * channels`` of them; else each by itself with that probability.
    """
    digest = hashlib.shake_256(json.dumps(seed).encode()).digest(8 * channels)
    numbers = np.frombuffer(digest, dtype="<u8")
    order = np.argsort(numbers, kind="stable")
    kept = int(density * channels + 0.5) if exact else int((numbers / 2.0**64 < density).sum())
    return sorted(order[: max(1, kept)].tolist())


def listed_convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """The swapped layers; where there are none yet, those that have the groups to be swapped."""
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    swapped = [name for name, conv in convs.items() if isinstance(conv, (GatheredLayer, SwitchedLayer))]
    if swapped:
        return {name: convs[name] for name in swapped}
    return {
        name: conv
        for name, conv in convs.items()
        if conv.groups == 1 or conv.groups == conv.in_channels == conv.out_channels
    }


def random_lists(
    model: nn.Module, domains: int | Sequence[str], density: float, seed: int, both: bool, exact: bool
) -> dict[str, dict[str, ChannelLists]]:
    """{domain: {layer: lists}}, as :meth:`bap_kernels.ChannelTable.random` describes them."""
    check_module("ChannelTable.random", model)
    if isinstance(domains, int):
        domains = [f"domain{number}" for number in range(domains)]
    domains = [domains] if isinstance(domains, str) else list(domains)
    if not domains or len(set(domains)) != len(domains):
        raise ValueError(
            f"ChannelTable.random(): expected `domains` to be at least one name, and each name once, got {domains!r}."
        )
    convolutions = listed_convolutions(model)
    table: dict[str, dict[str, ChannelLists]] = {}
    for domain in domains:
        layers = table[domain] = {}
        for name, conv in convolutions.items():
            read = write = None
            if conv.groups != 1:
                if both:
                    read = write = _draw(conv.in_channels, density, exact, seed, domain, name, "in")
            else:
                if conv.in_channels >= _FEWEST_TO_PRUNE:
                    read = _draw(conv.in_channels, density, exact, seed, domain, name, "in")
                if both:
                    write = _draw(conv.out_channels, density, exact, seed, domain, name, "out")
            layers[name] = ChannelLists(read, write)
    return table
