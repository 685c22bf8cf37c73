"""What a run must have in common with what is in its folder already, so that no result is a mixture of two runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bap.config import Config, config_of
from bap.data import Domain
from bap.files import FileError, digest_of, read_bytes

__all__ = ["MAY_CHANGE", "check_same_data", "check_same_settings", "data_facts", "learning_rate", "weights_digest"]

# Where and how fast a run is computed, and what it prints: not what it computes, beyond rounding.
MAY_CHANGE = ("root", "workers", "device", "threads", "backend", "log_every")


def learning_rate(schedule: str, epoch: int, epochs: int) -> float:
    """The factor on all learning rates in an epoch, counted from 0.

    Examples:
        >>> from bap.resume import learning_rate
        >>> [learning_rate("step", epoch, 8) for epoch in (0, 5, 6)], learning_rate("cosine", 4, 8)
        ([1.0, 1.0, 0.1], 0.5)
    """
    import math

    if schedule == "cosine":
        return 0.5 * (1 + round(math.cos(math.pi * epoch / epochs), 12))
    return 0.1 if epoch >= 0.75 * epochs else 1.0


def weights_digest(config: Config) -> str | None:
    """SHA-256 of the file that the backbone starts from."""
    return None if config.weights is None else digest_of(read_bytes(config.weights))


def data_facts(domains: Mapping[str, Domain]) -> dict[str, Any]:
    """What tells the data of a run from others: classes, and numbers and labels of the images of each split."""
    return {
        name: {
            "classes": digest_of(list(domain.classes)),
            "size": domain.size,
            "splits": {
                split: [len(held), None if held.labels is None else digest_of(held.labels.numpy().tobytes())]
                for split, held in domain.splits.items()
            },
        }
        for name, domain in domains.items()
    }


def _epochs_fit(old: Config, new: Config, done: int) -> bool:
    """Whether the epochs that are done would have been the same in a run of the new length."""
    if done >= old.epochs or done >= new.epochs:
        return False
    rates = all(
        learning_rate(old.schedule, epoch, old.epochs) == learning_rate(new.schedule, epoch, new.epochs)
        for epoch in range(done)
    )
    return rates and all(
        (epoch >= old.settle * old.epochs) == (epoch >= new.settle * new.epochs) for epoch in range(done + 1)
    )


def check_same_settings(
    stored: Mapping[str, Any],
    asked: Config,
    where: str,
    done: int = 0,
    weights: str | None = None,
    only: Iterable[str] | None = None,
) -> None:
    """Refuses settings that differ from those that a run or a file was made with.

    Args:
        stored: settings by name; one that is missing has its default.
        asked: the settings now.
        where: the file or folder, for messages.
        done: epochs that are done: with it, ``epochs`` may change if these would have been the same.
        weights: digest of the file of the backbone's weights then; the same file may lie elsewhere now.
        only: settings to compare; None compares all but :data:`MAY_CHANGE`.

    Raises:
        ValueError: naming every setting that differs, with both values.
        FileError: if the stored settings are none.
    """
    names = [one.name for one in dataclasses.fields(Config)]
    try:
        old = config_of({name: value for name, value in stored.items() if name in names}, where)
    except ValueError as error:
        raise FileError(f"check_same_settings(): expected {where} to hold settings: {error}") from None
    different = []
    for name in names if only is None else only:
        then, now = getattr(old, name), getattr(asked, name)
        if then == now or name in MAY_CHANGE:
            continue
        if name == "epochs" and _epochs_fit(old, asked, done):
            continue
        if name == "weights" and weights is not None and weights == weights_digest(asked):
            continue
        different.append(f"{name}: stored {then!r}, asked {now!r}")
    if different:
        raise ValueError(
            f"check_same_settings(): expected the settings of {where}, got others: {'; '.join(different)}. "
            f"Hint: use another folder. Only {', '.join(MAY_CHANGE)}, and epochs while those that are done stay the "
            "same, may change."
        )


def check_same_data(stored: Any, domains: Mapping[str, Domain], where: str | Path) -> None:
    """Refuses data other than those that a run was started with.

    Args:
        stored: what :func:`data_facts` gave then; None, of earlier versions, is not compared.
        domains: the data now.
        where: the file, for messages.

    Raises:
        ValueError: naming the domains that differ.
    """
    now = data_facts(domains)
    if stored is None or stored == now:
        return
    different = [
        name
        for name in dict.fromkeys([*(stored if isinstance(stored, dict) else []), *now])
        if not isinstance(stored, dict) or stored.get(name) != now.get(name)
    ]
    raise ValueError(
        f"check_same_data(): expected the data that {where} was started with, got others for {different or 'all'}: "
        "another order of the domains, or other classes, numbers of images or labels."
    )
