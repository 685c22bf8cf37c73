"""The network of a run: a backbone with switches, batch norm and classifiers for every domain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import bap_kernels as bk
from bap.config import Config
from bap.data import DOMAINS, Domain, embedded_suite, load_decathlon, load_sketch
from bap.models import MODELS, build, load_weights, stem_and_shortcuts

__all__ = ["example_of", "load_domains", "plain_network", "source_of", "switched_network"]


def load_domains(config: Config) -> dict[str, Domain]:
    """The domains of a run, checked; the source is among them unless it is excluded.

    Raises:
        ValueError: for unknown domains, and data that are not as they should be.
    """
    names = list(config.domains)
    if config.data == "embedded":
        suite = embedded_suite(names or DOMAINS, config.images)
    elif config.data == "decathlon":
        suite = load_decathlon(str(config.root), names or None, config.size, config.workers, config.full)
    else:
        suite = load_sketch(str(config.root), names or None, config.size, config.workers, config.full)
    if config.source_mode == "excluded":
        suite.pop(source_of(config, suite), None)
    if not suite:
        raise ValueError("load_domains(): expected at least one domain besides the source, got none.")
    return suite


def source_of(config: Config, names: Iterable[str]) -> str:
    """The source domain: as set, or the suite's usual one, or the first."""
    usual = {"embedded": "shapes", "decathlon": "imagenet12", "sketch": "imagenet"}[config.data]
    if config.source is not None:
        return config.source
    return usual if usual in names or config.source_mode == "excluded" else next(iter(names))


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
