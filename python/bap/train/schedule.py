"""The order of training: whose batch is next, and the learning rate of an epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from torch import Tensor

from bap.config import Config
from bap.data import Domain

__all__ = ["learning_rate", "steps_of", "turns_of"]


def learning_rate(decay: str, epoch: int, epochs: int) -> float:
    """The factor on all learning rates in an epoch, counted from 0.

    Examples:
        >>> from bap.train.schedule import learning_rate
        >>> [learning_rate("step", epoch, 8) for epoch in (0, 5, 6)], learning_rate("cosine", 4, 8)
        ([1.0, 1.0, 0.1], 0.5)
    """
    if decay == "cosine":
        return 0.5 * (1 + round(math.cos(math.pi * epoch / epochs), 12))
    return 0.1 if epoch >= 0.75 * epochs else 1.0


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
