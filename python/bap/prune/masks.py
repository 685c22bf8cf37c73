"""Masks: channels of every switched layer that are on for good, in a file; and scores that choose them at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bap.files import FileError, read_tensors, write_tensors
from bap.prune.layers import SwitchBank
from bap_kernels import set_domain

__all__ = ["fix_switches", "magnitude_scores", "read_masks", "saliency_scores", "write_masks"]


def write_masks(path: str | Path, bank: SwitchBank, masks: Mapping[str, Tensor]) -> None:
    """Writes {domain: (M,) bool} of the switches of a network.

    Raises:
        FileError: if the file cannot be written.
    """
    info = {"layers": bank.names, "sizes": bank.sizes}
    write_tensors(path, {name: mask.cpu().to(torch.uint8) for name, mask in masks.items()}, info)


def read_masks(path: str | Path, bank: SwitchBank, domains: Sequence[str]) -> dict[str, Tensor]:
    """The masks of some domains, {domain: (M,) bool}.

    Raises:
        FileError: if the file is damaged, of another network, or lacks a domain.
    """
    tensors, info = read_tensors(path)
    if not isinstance(info, dict) or (info.get("layers"), info.get("sizes")) != (bank.names, bank.sizes):
        raise FileError(f"read_masks(): expected {path} to hold masks of this network's layers, got others.")
    lacking = [name for name in domains if name not in tensors]
    if lacking:
        raise FileError(f"read_masks(): expected {path} to hold masks of all domains, got none of {lacking}.")
    return {name: tensors[name].bool() for name in domains}


def fix_switches(path: str | Path, bank: SwitchBank, domains: Sequence[str], initial: float) -> None:
    """Sets the switches of some domains to the masks of a file: scores ``initial``, or just below the threshold.

    Raises:
        FileError: as in :func:`read_masks`.
    """
    for name, mask in read_masks(path, bank, domains).items():
        limits = bank.thresholds(name)
        below = torch.nextafter(limits, torch.full_like(limits, -torch.inf))
        bank.write(name, torch.where(mask.to(limits.device), torch.full_like(limits, initial), below))


def saliency_scores(model: nn.Module, domain: str, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """|gradient × activation| of every input channel that has a switch, summed over batches (Molchanov et al., 2017).

    The gradient of the loss in a switch is the sum over pixels of activation times its gradient, so the switches give
    it; all of them should be on.

    Args:
        model: a model with switches; its statistics and gradients are changed.
        domain: the domain.
        batches: images (N, 3, H, W) and labels (N,).

    Returns:
        (M,), float64, at least 0.
    """
    bank = SwitchBank(model)
    device = next(model.parameters()).device
    set_domain(model, domain)
    model.train()
    total = torch.zeros(sum(bank.sizes), dtype=torch.float64, device=device)
    scores = [switch.score.requires_grad_() for switch in bank.of(domain)]
    for images, labels in batches:
        loss = F.cross_entropy(model(images.to(device)).float(), labels.to(device))
        total += torch.cat(torch.autograd.grad(loss, scores)).double().abs()
    return total


def magnitude_scores(model: nn.Module) -> Tensor:
    """The mean magnitude of the weights that read a channel, relative to that of the layer: (M,), float64."""
    parts = []
    for _, layer in SwitchBank(model).layers:
        each = layer.weight.detach().double().abs().mean((0, 2, 3))
        if layer.groups > 1:
            # A depthwise weight is (C, 1, kH, kW): a filter for each channel.
            each = layer.weight.detach().double().abs().mean((1, 2, 3))
        parts.append(each / each.mean().clamp_min(1e-30))
    return torch.cat(parts)
