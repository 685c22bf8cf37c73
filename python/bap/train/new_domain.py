"""Adds a domain to a trained network without changing the others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bap_kernels as bk
from bap.config import config_of, full_names
from bap.data import Domain
from bap.train.checkpoint import domain_spec, domains_of, load_checkpoint, save_domain
from bap.train.domains import load_domains
from bap.train.evaluate import evaluate, final_split
from bap.train.lock import folder_lock
from bap.train.trainer import Trainer, backend_of

__all__ = ["add_domain"]

# Settings that the network was made with.
_OF_THE_NETWORK = (
    "data.suite",
    "data.size",
    "data.domains",
    "data.source",
    "data.source_mode",
    "model.name",
    "model.options",
    "model.weights",
    "switches.stem",
    "switches.shortcuts",
    "switches.threshold",
    "switches.initial",
    "switches.ste_every",
)


def add_domain(
    checkpoint: str | Path,
    name: str,
    changes: Mapping[str, Any] | None = None,
    like: str | None = None,
    data: Domain | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Trains switches, batch norm and classifier of a new domain, and writes its folder; no other file is written.

    The sharing loss, if the settings have one, pulls the new domain to channels that the others keep.

    Args:
        checkpoint: folder as :func:`bap.train.checkpoint.save_checkpoint` writes it.
        name: the new domain.
        changes: settings other than those of the checkpoint, such as ``{"epochs": 10}``; those that say how the network
            is made, and what the other domains were given, stay.
        like: the domain whose switches and batch norm it starts from; None starts with all channels on.
        data: the domain's data; None loads it as the settings say.
        progress: prints a line per epoch; None: on a terminal.

    Returns:
        What its domain_config.json says.

    Raises:
        ValueError: if the checkpoint has the domain already, or a setting may not change or cannot be used.
        FileError: if files are damaged or cannot be written.
    """
    # A missing folder is not created: loading raises.
    with folder_lock(checkpoint if Path(checkpoint).is_dir() else None):
        present = domains_of(checkpoint)
        if name in present:
            raise ValueError(f"add_domain(): expected `name` to be new, got {name!r}, which {checkpoint} has.")
        if like is not None and like not in present:
            raise ValueError(f"add_domain(): expected `like` to be one of {present}, got {like!r}.")
        model, config, _ = load_checkpoint(checkpoint)
        changes, settings = full_names(changes or {}), config.by_name()
        if changes.get("optimiser.train_backbone", False) is not False:
            raise ValueError(
                "add_domain(): expected `optimiser.train_backbone` to be off, as other domains share it, got on."
            )
        for setting in _OF_THE_NETWORK:
            if setting in changes and changes[setting] != settings[setting]:
                raise ValueError(
                    f"add_domain(): expected {setting!r} to stay as in {checkpoint}, {settings[setting]!r}, which the "
                    f"network was made with, got {changes[setting]!r}."
                )
        own = {"optimiser.train_backbone": False, "data.source": None, "data.source_mode": "switched"}
        config = config_of({**settings, **own, **changes, "data.domains": [name]}, "add-domain")
        if config.budget.measure == "time":
            config = config.replace(measure="mac", budget_ms=None)
        domain = load_domains(config)[name] if data is None else data
        split = final_split({name: domain}, config.data.evaluate_on)
        bk.nn.add_domain_(model, name, like=like, classes=len(domain.classes))
        trainer = Trainer(config, {name: domain}, None, progress=progress, model=model)
        trainer.fit()
        with bk.use_backend(backend_of(config)):
            accuracy = evaluate(model, domain, split).percent
        spec = domain_spec(domain, trainer.used(name), accuracy, split)
        save_domain(checkpoint, model, name, spec)
        return spec
