"""The order of training: whose batch is next; learning rates, budgets and weights of an epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from bap.config import Config
from bap.data import Domain

__all__ = ["annealed_budget", "batches_of", "learning_rate", "sharing_factor", "steps_of", "steps_of_epoch", "turns_of"]


def learning_rate(decay: str, epoch: int, epochs: int, milestones: Sequence[float] = (0.75,)) -> float:
    """The factor on all learning rates in an epoch, counted from 0.

    Args:
        decay: ``"step"`` or ``"cosine"``.
        epoch, epochs: this one, and their number.
        milestones: parts of the run at which ``"step"`` multiplies by 0.1.

    Examples:
        >>> from bap.train.schedule import learning_rate
        >>> [learning_rate("step", epoch, 8) for epoch in (0, 5, 6)], learning_rate("cosine", 4, 8)
        ([1.0, 1.0, 0.1], 0.5)
    """
    if decay == "cosine":
        return 0.5 * (1 + round(math.cos(math.pi * epoch / epochs), 12))
    return float(0.1 ** sum(epoch >= milestone * epochs for milestone in milestones))


def annealed_budget(anneal: str | None, start: float, beta: float, until: float, done: int, epochs: int) -> float:
    """The budget that holds after an epoch: from ``start`` down to β, exactly β from ``until`` on.

    ``cubic`` falls fast at first, as gradual pruning does (Zhu and Gupta, 2017): β + (start − β)(1 − t)³, with t the
    part of the way; ``linear`` has the power 1.

    Args:
        anneal: ``"linear"``, ``"cubic"``, or None, for β throughout.
        start: in force before the first epoch.
        beta: β.
        until: part of the run at which β is reached.
        done: epochs that are done, with the one that ends.
        epochs: of the run.

    Examples:
        >>> from bap.train.schedule import annealed_budget
        >>> [annealed_budget("linear", 1.0, 0.5, 0.5, done, 8) for done in (1, 2, 4, 8)]
        [0.875, 0.75, 0.5, 0.5]
    """
    part = done / (until * epochs)
    if anneal is None or part >= 1:
        return beta
    return beta + (max(start, beta) - beta) * (1 - part) ** (3 if anneal == "cubic" else 1)


def sharing_factor(schedule: str, until: float, epoch: int, epochs: int) -> float:
    """The factor on λ_PS in an epoch, counted from 0.

    Args:
        schedule: ``"constant"``, ``"rise"`` (to 1) or ``"fall"`` (from 1).
        until: part of the run at which it has risen or fallen.
        epoch, epochs: this one, and their number.

    Examples:
        >>> from bap.train.schedule import sharing_factor
        >>> [sharing_factor("rise", 0.5, epoch, 8) for epoch in (0, 1, 3, 7)]
        [0.25, 0.5, 1.0, 1.0]
        >>> [sharing_factor("fall", 0.5, epoch, 8) for epoch in (0, 1, 4, 7)]
        [1.0, 0.75, 0.0, 0.0]
    """
    if schedule == "rise":
        return min(1.0, (epoch + 1) / (until * epochs))
    if schedule == "fall":
        return max(0.0, 1 - epoch / (until * epochs))
    return 1.0


def steps_of(domain: Domain, batch: int, world: int = 1) -> int:
    """Steps of an epoch of one domain, on each of ``world`` processes."""
    return max(1, len(domain.splits["train"]) // world // batch)


def turns_of(
    domains: Mapping[str, Domain], config: Config, epoch: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The batches of an epoch as (domain, images, labels), in the order of ``schedule.round_robin``."""
    batch = config.schedule.batch
    streams = {
        name: domain.batches("train", batch, (config.run.seed, epoch), rank, world) for name, domain in domains.items()
    }
    if config.schedule.round_robin == "epoch":
        for name, stream in streams.items():
            for images, labels in stream:
                yield name, images, labels
        return
    # Every domain is seen once in an epoch: one with fewer images takes its turns farther apart.
    counts = {name: steps_of(domain, batch, world) for name, domain in domains.items()}
    turns = sorted(((turn + 0.5) / count, name) for name, count in counts.items() for turn in range(count))
    for _, name in turns:
        following = next(streams[name], None)
        if following is not None:
            yield name, *following


def steps_of_epoch(domains: Mapping[str, Domain], config: Config, world: int = 1) -> int:
    """Steps of an epoch, on each of ``world`` processes."""
    counts = [steps_of(domain, config.schedule.batch, world) for domain in domains.values()]
    if config.schedule.round_robin == "joint":
        return config.schedule.steps or max(counts)
    return sum(counts)


def _endless(
    domain: Domain, batch: int, key: tuple[int | str, ...], rank: int, world: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches in a random order, and when all images were seen, in another one."""
    lap = 0
    while True:
        count = 0
        for images, labels in domain.batches("train", batch, key if lap == 0 else (*key, "lap", lap), rank, world):
            count += 1
            yield images, labels
        if not count:
            raise ValueError(
                f"batches_of(): expected {domain.name!r} to have an image for each of {world} processes, got "
                f"{len(domain.splits['train'])}."
            )
        lap += 1


def batches_of(
    domains: Mapping[str, Domain], config: Config, epoch: int, rank: int = 0, world: int = 1
) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
    """What each step of an epoch sees, [(domain, images, labels)]: one batch, or one of every domain for ``joint``."""
    if config.schedule.round_robin != "joint":
        for turn in turns_of(domains, config, epoch, rank, world):
            yield [turn]
        return
    key = (config.run.seed, epoch)
    streams = {name: _endless(domain, config.schedule.batch, key, rank, world) for name, domain in domains.items()}
    for _ in range(steps_of_epoch(domains, config, world)):
        yield [(name, *next(stream)) for name, stream in streams.items()]
