r"""Distillation: a trained network, such as the dense one, teaches the pruned one by its logits (Hinton et al., 2015).

    L_KD = T² KL(softmax(t / T) ‖ softmax(z / T)),   the mean over the images, z the logits and t the teacher's

A domain whose cross entropy is small beside it would be trained for the teacher's answers alone, and one that has not
learned anything yet may never start. The guard bounds what it adds: w L_KD ≤ g CE, the factor being a constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import bap_kernels as bk
from bap.config import Config
from bap.data import Domain
from bap.files import digest_of, read_bytes
from bap.train.checkpoint import load_checkpoint

__all__ = ["DENSE", "Teacher", "dense_settings", "distillation_loss", "guarded", "learns_from_dense", "teacher_digest"]


# Name of the teacher that is the dense network of the same settings and seed, which is trained first.
DENSE = "dense"


def learns_from_dense(config: Config) -> bool:
    """Whether the dense network of the same settings teaches."""
    return config.distill.teacher == DENSE and config.distill.weight > 0


def dense_settings(config: Config) -> Config:
    """Settings of the network with every channel on: β = 1, and switches that do not move."""
    return config.replace(
        beta=1.0,
        sharing=None,
        anneal=None,
        give_back=False,
        measure="mac",
        budget_ms=None,
        teacher=None,
        distill_weight=0.0,
        fixed=None,
        lr_switch=0.0,
    )


def distillation_loss(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """L_KD, 0-d, at least 0.

    Args:
        logits: (N, classes), of the network that is trained.
        teacher: (N, classes), constants.
        temperature: T, positive.

    Raises:
        ValueError: if T is not positive, or the shapes differ.

    Examples:
        >>> import torch
        >>> from bap.train.distill import distillation_loss
        >>> distillation_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]), 4.0).item()
        0.0
    """
    if not temperature > 0:
        raise ValueError(f"distillation_loss(): expected `temperature` to be positive, got {temperature}.")
    if logits.shape != teacher.shape:
        raise ValueError(
            f"distillation_loss(): expected `teacher` to have the shape of `logits`, {tuple(logits.shape)}, got "
            f"{tuple(teacher.shape)}."
        )
    of_student, of_teacher = F.log_softmax(logits / temperature, 1), F.log_softmax(teacher / temperature, 1)
    return temperature**2 * F.kl_div(of_student, of_teacher, reduction="batchmean", log_target=True)


def guarded(term: Tensor, loss: Tensor, guard: float | None) -> Tensor:
    """The term, scaled by a constant so that it is at most ``guard`` times the loss; reads nothing back.

    Args:
        term: 0-d, w L_KD.
        loss: 0-d, the cross entropy.
        guard: g; None leaves the term as it is.

    Examples:
        >>> import torch
        >>> from bap.train.distill import guarded
        >>> [guarded(torch.tensor(3.0), torch.tensor(2.0), guard).item() for guard in (0.5, 2.0, None)]
        [1.0, 3.0, 3.0]
    """
    if guard is None:
        return term
    value = term.detach()
    return term * (guard * loss.detach() / value.clamp_min(torch.finfo(value.dtype).tiny)).clamp_max(1)


def teacher_digest(path: str | Path | None) -> str | None:
    """Identifies a checkpoint: a digest of its descriptions, which hold those of its tensors."""
    if path is None:
        return None
    files = [Path(path, "config.json"), *sorted(Path(path).glob("domains/*/domain_config.json"))]
    return digest_of(b"".join(read_bytes(file) for file in files))


class Teacher:
    """A trained network whose logits are targets.

    Args:
        path: folder of its checkpoint.
        domains: the data; it must have all of them, with these classes and sizes.
        device: where it computes.

    Raises:
        ValueError: if a domain has other classes or another input size.
        FileError: if the checkpoint lacks a domain, or is damaged.
    """

    def __init__(self, path: str | Path, domains: Mapping[str, Domain], device: torch.device) -> None:
        self.model, _, specs = load_checkpoint(path, list(domains))
        for name, domain in domains.items():
            spec = specs[name]
            if list(domain.classes) != spec["classes"] or spec.get("size") not in (None, domain.size):
                raise ValueError(
                    f"Teacher(): expected the domain {name!r} of {path} to have the classes and the size of the data, "
                    f"got others: {len(spec['classes'])} classes of size {spec.get('size')}."
                )
        self.model.to(device).requires_grad_(False)

    @torch.no_grad()
    def logits(self, domain: str, images: Tensor) -> Tensor:
        """(N, classes) of images (N, 3, H, W), in eval mode."""
        bk.set_domain(self.model, domain)
        return self.model(images)
