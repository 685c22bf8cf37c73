"""Accuracy of one domain, and the predictions that a benchmark's server takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import bap_kernels as bk
from bap.data import Domain

__all__ = ["Accuracy", "evaluate", "evaluating", "predict"]


class Accuracy:
    """Images, hits and the sum of losses, over all processes.

    Attributes:
        images: their number.
        hits: those with the right answer.
        loss: sum of the cross entropies.
    """

    def __init__(self) -> None:
        self.images = self.hits = 0
        self.loss = 0.0

    def add(self, logits: Tensor, labels: Tensor, loss: float) -> None:
        """Counts a batch with its mean loss."""
        self.images += len(labels)
        self.hits += int((logits.argmax(1) == labels).sum())
        self.loss += loss * len(labels)

    def reduced(self) -> Accuracy:
        """The sum over all processes."""
        if dist.is_available() and dist.is_initialized():
            device = "cuda" if dist.get_backend() == "nccl" else "cpu"
            values = torch.tensor([self.images, self.hits, self.loss], dtype=torch.float64, device=device)
            dist.all_reduce(values)
            self.images, self.hits, self.loss = int(values[0]), int(values[1]), float(values[2])
        return self

    @property
    def percent(self) -> float:
        """Accuracy in per cent."""
        return 100.0 * self.hits / max(self.images, 1)

    @property
    def mean_loss(self) -> float:
        """Mean cross entropy."""
        return self.loss / max(self.images, 1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; modes come back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


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
    device = next(model.parameters()).device
    made = Accuracy()
    run = model if forward is None else forward
    with evaluating(model):
        for x, y in domain.batches(split, batch, None, rank, world):
            if (y < 0).any():
                raise ValueError(
                    f"evaluate(): expected `split` of {domain.name!r} to have labels, got {split!r} without. "
                    "Hint: bap.evaluate.predict makes the results file for the benchmark's server."
                )
            logits = run(x.to(device)).float()
            y = y.to(device)
            made.add(logits, y, float(nn.functional.cross_entropy(logits, y)))
    made.reduced()
    if not made.images:
        raise ValueError(f"evaluate(): expected `split` of {domain.name!r} to have images, got none in {split!r}.")
    return made


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
    held: Any = domain.splits[split]
    ids, categories = getattr(held, "image_ids", None), getattr(held, "category_ids", None)
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
