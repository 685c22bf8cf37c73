"""The network of a run: a backbone with switches, batch norm and classifiers for every domain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import bap_kernels as bk
from bap.config import Config
from bap.models import MODELS, build, load_weights, stem_and_shortcuts
from bap.train.domains import source_of

__all__ = ["plain_network", "switched_network"]


def plain_network(config: Config, classes: int) -> nn.Module:
    """The backbone with random weights, the same for the same seed, or those of the file."""
    torch.manual_seed(config.run.seed)
    model = build(config.model.name, classes, **config.model.options)
    if config.model.weights is not None:
        backbone = MODELS[config.model.name]
        load_weights(model, config.model.weights, backbone.head, backbone.renamed)
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
    without = (set() if config.switches.stem else stem) | (set() if config.switches.shortcuts else apart - stem)
    head_name, switches = MODELS[config.model.name].head, config.switches
    plain_shape = model.get_submodule(head_name).weight.shape
    bk.nn.switch_(
        model,
        list(classes),
        lambda module, name: name not in without,
        switches.threshold,
        switches.initial,
        switches.ste_every,
        heads=classes,
        **options,
    )
    head = model.get_submodule(head_name)
    assert isinstance(head, bk.nn.DomainLinear)
    for name, module in head.domains.items():
        # Other domains with as many classes by accident must not start from the source's answers.
        assert isinstance(module, nn.Linear)
        if name != source and module.weight.shape == plain_shape:
            module.reset_parameters()
    return model
