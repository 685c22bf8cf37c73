"""Accuracy of one domain, and the predictions that a benchmark's server takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import bap_kernels as bk
from bap.data import Domain
from bap.models import evaluating

__all__ = ["Accuracy", "accuracy_of", "check_splits", "evaluate", "final_split", "predict"]


class Accuracy:
    """Images, hits and the sum of losses, over all processes.

    What is added stays on its device: only the attributes wait for it.

    Attributes:
        images: their number.
        hits: those with the right answer.
        loss: sum of the cross entropies.
    """

    def __init__(self) -> None:
        self.images = 0
        self._hits: Tensor | int = 0
        self._loss: Tensor | float = 0.0

    @property
    def hits(self) -> int:
        """Images with the right answer."""
        return int(self._hits)

    @property
    def loss(self) -> float:
        """Sum of the cross entropies."""
        return float(self._loss)

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        """Counts a batch with its mean loss, 0-d."""
        self.images += len(labels)
        self._hits = self._hits + (logits.argmax(1) == labels).sum()
        self._loss = self._loss + loss.detach().double() * len(labels)

    def reduced(self) -> Accuracy:
        """The sum over all processes."""
        if dist.is_available() and dist.is_initialized():
            device = "cuda" if dist.get_backend() == "nccl" else "cpu"
            values = torch.tensor([self.images, self.hits, self.loss], dtype=torch.float64, device=device)
            dist.all_reduce(values)
            self.images, self._hits, self._loss = int(values[0]), int(values[1]), float(values[2])
        return self

    @property
    def percent(self) -> float:
        """Accuracy in per cent."""
        return 100.0 * self.hits / max(self.images, 1)

    @property
    def mean_loss(self) -> float:
        """Mean cross entropy."""
        return self.loss / max(self.images, 1)


def evaluate(
    model: nn.Module,
    domain: Domain,
    split: str = "test",
    batch: int = 128,
    forward: Callable[[Tensor], Tensor] | None = None,
    rank: int = 0,
    world: int = 1,
) -> Accuracy:
    """Accuracy of one domain.

    Args:
        model: a model with that domain; it stays active afterwards.
        domain: its data.
        split: such as ``"test"``.
        batch: images at a time.
        forward: what is called on a batch, on the model's device; None calls the model.
        rank, world: this process and their number; the result is that of all.

    Raises:
        ValueError: if the split has no labels or images.
    """
    bk.set_domain(model, domain.name)
    return accuracy_of(model, domain, split, batch, forward, rank, world)


def accuracy_of(
    model: nn.Module,
    domain: Domain,
    split: str,
    batch: int,
    forward: Callable[[Tensor], Tensor] | None,
    rank: int,
    world: int,
) -> Accuracy:
    """As :func:`evaluate`, of a network as it is: one without domains, or with the right one set."""
    device = next(model.parameters()).device
    accuracy = Accuracy()
    call = model if forward is None else forward
    with evaluating(model):
        for x, y in domain.batches(split, batch, None, rank, world):
            if (y < 0).any():
                raise ValueError(
                    f"evaluate(): expected `split` of {domain.name!r} to have labels, got {split!r} without. "
                    "Hint: bap.train.evaluate.predict makes the results file for the benchmark's server."
                )
            logits = call(x.to(device)).float()
            y = y.to(device)
            accuracy.add(logits, y, nn.functional.cross_entropy(logits, y))
    accuracy.reduced()
    if not accuracy.images:
        raise ValueError(f"evaluate(): expected `split` of {domain.name!r} to have images, got none in {split!r}.")
    return accuracy


def predict(model: nn.Module, domain: Domain, split: str = "test", batch: int = 128) -> list[dict[str, Any]]:
    """The decathlon's results of one domain: [{"image_id": ..., "category_id": ...}], image by image.

    Raises:
        ValueError: if there is no such split, or it has no image numbers, as only files in the decathlon's format have
            them.
    """
    if split not in domain.splits:
        raise ValueError(
            f"predict(): expected `split` of {domain.name!r} to be one of {list(domain.splits)}, got {split!r}."
        )
    images: Any = domain.splits[split]
    ids, categories = getattr(images, "image_ids", None), getattr(images, "category_ids", None)
    if ids is None or categories is None:
        raise ValueError(
            f"predict(): expected {domain.name!r} to be in the decathlon's format, got {split!r} without ids."
        )
    bk.set_domain(model, domain.name)
    device = next(model.parameters()).device
    answers: list[int] = []
    with evaluating(model):
        for x, _ in domain.batches(split, batch):
            answers += model(x.to(device)).argmax(1).tolist()
    return [{"image_id": image, "category_id": categories[answer]} for image, answer in zip(ids, answers, strict=True)]


def check_splits(domains: Mapping[str, Domain], evaluate_on: str) -> None:
    """Refuses data that would be missed after an epoch, or after all of them.

    Args:
        domains: the data.
        evaluate_on: the split of the accuracies, which needs labels.

    Raises:
        ValueError: if a domain lacks images or labels of ``train`` or ``evaluate_on``.
    """
    for name, domain in domains.items():
        for split in dict.fromkeys(("train", evaluate_on)):
            images = domain.splits.get(split)
            problem = "no such split" if images is None else "no images" if not len(images) else "no labels"
            if images is None or not len(images) or images.labels is None:
                raise ValueError(
                    f"check_splits(): expected {name!r} to have images with labels in {split!r}, got {problem}. "
                    + ("Hint: evaluate_on chooses the split of the accuracies." if split != "train" else "")
                )


def final_split(domains: Mapping[str, Domain], evaluate_on: str = "val") -> str:
    """The split of the results: ``test`` if every domain has labels of it, else ``val`` for all of them.

    Args:
        domains: the data.
        evaluate_on: the split of the accuracies during training; only where this is ``train`` can the results be
            of the training images, for want of others.

    Raises:
        ValueError: if a domain has labels of neither.
    """
    for split in ("test", "val", *(("train",) if evaluate_on == "train" else ())):
        images = [domain.splits.get(split) for domain in domains.values()]
        if all(part is not None and part.labels is not None and len(part) for part in images):
            return split
    without = [
        name
        for name, domain in domains.items()
        if all(split not in domain.splits or domain.splits[split].labels is None for split in ("test", "val"))
    ]
    raise ValueError(
        "results_of(): expected all domains to have labels of one split, test or val, got "
        + (f"neither for {without}." if without else "some with labels of test only.")
    )
