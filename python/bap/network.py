"""The network of a run: a backbone with switches, batch norm and classifiers for every domain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bap_kernels as bk
from bap.config import Config
from bap.data import DECATHLON, DOMAINS, SKETCH, SPLITS, Domain, embedded_suite, load_decathlon, load_sketch
from bap.models import MODELS, build, load_weights, stem_and_shortcuts

__all__ = [
    "check_source",
    "example_of",
    "load_domains",
    "plain_network",
    "source_of",
    "suite_of",
    "switched_network",
]


_SUITES = {"embedded": DOMAINS, "decathlon": tuple(DECATHLON), "sketch": tuple(SKETCH)}
_SOURCES = {"embedded": "shapes", "decathlon": "imagenet12", "sketch": "imagenet"}


def suite_of(config: Config) -> tuple[str, ...]:
    """All domains of the suite that the settings name."""
    return _SUITES[config.data]


def load_domains(config: Config, splits: Sequence[str] = SPLITS) -> dict[str, Domain]:
    """The domains of a run, checked; the source is among them unless it is excluded.

    Args:
        config: the settings.
        splits: those that are needed.

    Raises:
        ValueError: for unknown domains, and data that are not as they should be.
    """
    names = list(config.domains)
    excluded = source_of(config, suite_of(config)) if config.source_mode == "excluded" else None
    names = [name for name in names or (suite_of(config) if config.full else ()) if name != excluded]
    if config.domains and not names:
        raise ValueError("load_domains(): expected at least one domain besides the source, got none.")
    root = Path(str(config.root))
    if config.data == "embedded":
        suite = embedded_suite(names or DOMAINS, config.images)
    elif config.data == "decathlon":
        suite = load_decathlon(root, names or None, config.size, config.workers, config.full, splits=splits)
    else:
        suite = load_sketch(root, names or None, config.size, config.workers, config.full)
    if excluded is not None:
        suite.pop(excluded, None)
    if not suite:
        raise ValueError("load_domains(): expected at least one domain besides the source, got none.")
    return suite


def source_of(config: Config, names: Iterable[str]) -> str:
    """The source domain: as set, or the suite's usual one, or the first."""
    usual = _SOURCES[config.data]
    if config.source is not None:
        return config.source
    return usual if usual in names or config.source_mode == "excluded" else next(iter(names))


def check_source(config: Config, names: Iterable[str]) -> None:
    """Refuses a run whose source is not among its domains, where another one would take its place in silence.

    Raises:
        ValueError: if the source that is set, or that of a benchmark which must be whole, is not there.
    """
    names = list(names)
    usual = config.data != "embedded" and config.full
    wanted = config.source or (_SOURCES[config.data] if usual else None)
    if config.source_mode != "excluded" and wanted is not None and wanted not in names:
        raise ValueError(
            f"check_source(): expected the source {wanted!r} to be among the domains, got {names}. Hint: "
            "-s source=NAME sets another one, -s source_mode=excluded trains without it, -s full=false takes the first."
        )


def plain_network(config: Config, classes: int) -> nn.Module:
    """The backbone with random weights, the same for the same seed, or those of the file."""
    torch.manual_seed(config.seed)
    model = build(config.model, classes, **config.model_options)
    if config.weights is not None:
        load_weights(model, config.weights, MODELS[config.model].head)
    return model


def switched_network(config: Config, classes: Mapping[str, int], **options: Any) -> nn.Module:
    """A backbone with switches, batch norm and classifiers for some domains.

    Args:
        config: the settings.
        classes: {domain: number of classes}; classifiers of the source's size start from the source's.
        **options: for :func:`bap_kernels.nn.switch_`.
    """
    source = source_of(config, classes)
    model = plain_network(config, classes.get(source, next(iter(classes.values()))))
    apart = stem_and_shortcuts(model)
    stem = {name for name in apart if model.get_submodule(name).in_channels == 3}
    without = (set() if config.switch_stem else stem) | (set() if config.switch_shortcuts else apart - stem)
    plain_head = {
        key: value.clone() for key, value in model.get_submodule(MODELS[config.model].head).state_dict().items()
    }
    bk.nn.switch_(
        model,
        list(classes),
        lambda module, name: name not in without,
        config.threshold,
        config.initial,
        config.ste_every,
        heads=classes,
        **options,
    )
    head = model.get_submodule(MODELS[config.model].head)
    assert isinstance(head, bk.nn.DomainLinear)
    for name, module in head.domains.items():
        # Other domains with as many classes by accident must not start from the source's answers.
        assert isinstance(module, nn.Linear)
        if name != source and module.weight.shape == plain_head["weight"].shape:
            module.reset_parameters()
    return model


def example_of(config: Config, size: int | None = None) -> Tensor:
    """An input, (1, 3, H, W), for counting."""
    side = size or config.size or (32 if config.data == "embedded" else MODELS[config.model].size)
    return torch.zeros(1, 3, side, side)
