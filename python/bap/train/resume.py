"""Checks that a run is resumed with the settings, data and weights it was started with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bap.config import Config, config_of, known_settings
from bap.data import Domain
from bap.files import FileError, digest_of, read_bytes
from bap.train.distill import teacher_digest
from bap.train.schedule import annealed_budget, learning_rate, sharing_factor

__all__ = [
    "MAY_CHANGE",
    "Origin",
    "check_same_data",
    "check_same_settings",
    "data_fingerprint",
    "weights_digest",
]

# Settings that change where, how fast and how verbosely a run computes, not its results beyond rounding.
MAY_CHANGE = (
    "data.root",
    "data.decode_all",
    "data.workers",
    "data.cache",
    "data.cache_gib",
    "run.device",
    "run.threads",
    "run.backend",
    "run.log_every",
    "run.log_seconds",
)


def weights_digest(config: Config) -> str | None:
    """SHA-256 of the file that the backbone starts from."""
    return None if config.model.weights is None else digest_of(read_bytes(config.model.weights))


def fixed_digest(config: Config) -> str | None:
    """SHA-256 of the file of fixed channels."""
    return None if config.switches.fixed is None else digest_of(read_bytes(config.switches.fixed))


_DIGESTS = {
    "model.weights": weights_digest,
    "distill.teacher": lambda config: teacher_digest(config.distill.teacher),
    "switches.fixed": fixed_digest,
}


def data_fingerprint(domains: Mapping[str, Domain]) -> dict[str, Any]:
    """Identifies the data of a run: classes, and numbers and labels of the images of each split."""
    return {
        name: {
            "classes": digest_of(list(domain.classes)),
            "size": domain.size,
            # Left out where it is as it always was: states of earlier versions lack it.
            **({} if domain.crop else {"crop": False}),
            "splits": {
                split: [len(images), None if images.labels is None else digest_of(images.labels.numpy().tobytes())]
                for split, images in domain.splits.items()
            },
        }
        for name, domain in domains.items()
    }


def _epochs_fit(old: Config, new: Config, done: int) -> bool:
    """Whether the epochs that are done would have been the same in a run of the new length."""
    epochs = old.schedule.epochs, new.schedule.epochs
    if done >= min(epochs):
        return False
    return _course(old, done, epochs[0]) == _course(old, done, epochs[1])


def _course(config: Config, done: int, epochs: int) -> list[tuple[float, ...]]:
    """What the number of epochs decides in those that are done."""
    schedule, budget, sharing = config.schedule, config.budget, config.sharing
    return [
        (
            learning_rate(schedule.decay, epoch, epochs, schedule.milestones),
            annealed_budget(budget.anneal, budget.anneal_start, budget.beta, budget.anneal_until, epoch + 1, epochs),
            sharing_factor(sharing.schedule, sharing.schedule_until, epoch, epochs),
            float(epoch + 1 >= config.switches.freeze_at * epochs),
        )
        for epoch in range(done)
    ]


def check_same_settings(
    stored: Mapping[str, Any],
    asked: Config,
    where: str,
    done: int = 0,
    digests: Mapping[str, str | None] | None = None,
    only: Iterable[str] | None = None,
) -> None:
    """Refuses settings that differ from those that a run or a file was made with.

    Args:
        stored: settings, by group or by name; one that is missing has its default, unknown ones are ignored.
        asked: the settings now.
        where: the file or folder, for messages.
        done: epochs that are done: with it, ``schedule.epochs`` may change if these would have been the same.
        digests: of what ``model.weights``, ``distill.teacher`` and ``switches.fixed`` named then; the same may lie
            elsewhere now.
        only: names of the settings to compare; None compares all but :data:`MAY_CHANGE`.

    Raises:
        ValueError: naming every setting that differs, with both values.
        FileError: if the stored settings are none.
    """
    try:
        old = config_of(known_settings(stored), where)
    except ValueError as error:
        raise FileError(f"check_same_settings(): expected {where} to hold settings: {error}") from None
    before, after = old.by_name(), asked.by_name()
    different = []
    for name in before if only is None else only:
        if name in MAY_CHANGE:
            continue
        known = (digests or {}).get(name)
        if known is not None:
            # The content counts: it may lie elsewhere now, and there may be another one in its place.
            if after[name] is None or known != _DIGESTS[name](asked):
                same = before[name] == after[name]
                different.append(
                    f"{name}: stored {before[name]!r}, asked {after[name]!r}" + (", whose content has changed" * same)
                )
            continue
        if before[name] == after[name]:
            continue
        if name == "schedule.epochs" and _epochs_fit(old, asked, done):
            continue
        different.append(f"{name}: stored {before[name]!r}, asked {after[name]!r}")
    if different:
        raise ValueError(
            f"check_same_settings(): expected the settings of {where}, got others: {'; '.join(different)}. "
            f"Hint: use another folder. Only {', '.join(MAY_CHANGE)}, and schedule.epochs while those that are done "
            "stay the same, may change."
        )


def check_same_data(stored: Any, domains: Mapping[str, Domain], where: str | Path) -> None:
    """Refuses data other than those that a run was started with.

    Args:
        stored: what :func:`data_fingerprint` gave then; None, of earlier versions, is not compared.
        domains: the data now.
        where: the file, for messages.

    Raises:
        ValueError: naming the domains that differ.
    """
    now = data_fingerprint(domains)
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


class Origin:
    """What the state of a run comes from: settings, data, and the files that the settings name.

    Args:
        config: the settings.
        domains: the data, {name: Domain}.
    """

    def __init__(self, config: Config, domains: Mapping[str, Domain]) -> None:
        self._config, self._domains = config, domains
        self._weights, self._teacher = weights_digest(config), teacher_digest(config.distill.teacher)

    def as_dict(self) -> dict[str, Any]:
        """As the state has it."""
        return {
            "config": self._config.as_dict(),
            "data": data_fingerprint(self._domains),
            "weights": self._weights,
            "teacher": self._teacher,
            "fixed": fixed_digest(self._config),
        }

    def check(self, progress: Mapping[str, Any], path: Path) -> None:
        """Refuses the state of a run with other settings, data or files.

        Raises:
            ValueError: as in :func:`check_same_settings` and :func:`check_same_data`.
        """
        digests = {
            "model.weights": progress.get("weights"),
            "distill.teacher": progress.get("teacher"),
            "switches.fixed": progress.get("fixed"),
        }
        check_same_settings(progress["config"], self._config, str(path), progress["epoch"], digests)
        check_same_data(progress.get("data"), self._domains, path)
