"""Which domains a run has, and which of them is the source."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from bap.config import Config
from bap.data import (
    BUILTIN_DOMAINS,
    DECATHLON,
    DECATHLON_RESIZE,
    DECODED,
    SKETCH,
    SPLITS,
    VARIED_DOMAINS,
    Domain,
    ImageFiles,
    builtin_suite,
    load_decathlon,
    load_sketch,
    sketch_resize,
)

__all__ = ["check_source", "load_domains", "resize_of", "source_of", "suite_of"]

_SUITES = {
    "builtin": BUILTIN_DOMAINS,
    "varied": VARIED_DOMAINS,
    "decathlon": tuple(DECATHLON),
    "sketch": tuple(SKETCH),
}
_SOURCES = {"builtin": "shapes", "varied": "things", "decathlon": "imagenet12", "sketch": "imagenet"}


def suite_of(config: Config) -> tuple[str, ...]:
    """All domains of the suite that the settings name."""
    return _SUITES[config.data.suite]


def resize_of(config: Config, name: str, size: int) -> int | tuple[int, int]:
    """How evaluation resizes an image file of a domain before it takes the middle, as in :class:`bap.data.ImageFiles`.

    Args:
        config: the settings.
        name: of the domain.
        size: height and width of the network's input.
    """
    if config.data.suite == "decathlon":
        return DECATHLON_RESIZE
    # The built-in images have the input's size.
    return sketch_resize(name, size) if config.data.suite == "sketch" else size


def load_domains(config: Config, splits: Sequence[str] = SPLITS) -> dict[str, Domain]:
    """The domains of a run, checked; the source is among them unless it is excluded.

    Args:
        config: the settings.
        splits: those that are needed.

    Raises:
        ValueError: for unknown domains, and data that are not as they should be.
    """
    data, names = config.data, list(config.data.domains)
    excluded = source_of(config, suite_of(config)) if data.source_mode == "excluded" else None
    names = [name for name in names or (suite_of(config) if data.full else ()) if name != excluded]
    if data.domains and not names:
        raise ValueError("load_domains(): expected at least one domain besides the source, got none.")
    if data.train_on == "train+val":
        splits = (*splits, "val")
    root, decode = Path(str(data.root)), -1 if data.decode_all else DECODED
    if data.built_in:
        suite = builtin_suite(names or None, data.images, data.suite)
    elif data.suite == "decathlon":
        suite = load_decathlon(root, names or None, data.size, data.workers, data.full, decode, splits, data.crops)
    else:
        suite = load_sketch(root, names or None, data.size, data.workers, data.full, decode)
    if excluded is not None:
        suite.pop(excluded, None)
    if not suite:
        raise ValueError("load_domains(): expected at least one domain besides the source, got none.")
    if data.train_on == "train+val":
        for name, domain in suite.items():
            if "val" not in domain.splits:
                raise ValueError(
                    f"load_domains(): expected {name!r} to have 'val' for `data.train_on`, got no such split."
                )
            domain.splits["train"] = domain.splits["train"].joined(domain.splits.pop("val"))
    if data.cache is not None:
        _keep_decoded(suite, data.cache, int(data.cache_gib * 2**30))
    return suite


def _keep_decoded(suite: dict[str, Domain], folder: str, room: int) -> None:
    """Keeps decoded images of all splits, training images first, as far as there is room."""
    splits = [domain.splits[split] for split in SPLITS for domain in suite.values() if split in domain.splits]
    # A benchmark without a third split has one twice.
    for split in dict.fromkeys(splits):
        if isinstance(split, ImageFiles):
            room -= split.keep_decoded(folder, room)


def source_of(config: Config, names: Iterable[str]) -> str:
    """The source domain: as set, or the suite's usual one, or the first."""
    usual = _SOURCES[config.data.suite]
    if config.data.source is not None:
        return config.data.source
    return usual if usual in names or config.data.source_mode == "excluded" else next(iter(names))


def check_source(config: Config, names: Iterable[str]) -> None:
    """Refuses a run whose source is not among its domains, where another one would take its place in silence.

    Raises:
        ValueError: if the source that is set, or that of a benchmark, is missing.
    """
    names = list(names)
    benchmark = not config.data.built_in
    source = config.data.source or (_SOURCES[config.data.suite] if benchmark else None)
    if config.data.source_mode != "excluded" and source is not None and source not in names:
        raise ValueError(
            f"check_source(): expected the source {source!r} to be among the domains, got {names}. Hint: "
            "-s source=NAME sets another one, -s source_mode=excluded trains without it."
        )
