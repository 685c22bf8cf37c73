"""Adds a domain to a finished network, with the others untouched."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bap_kernels as bk
from bap.checkpoint import domains_of, load_checkpoint, save_domain
from bap.config import config_of
from bap.data import Domain
from bap.evaluate import evaluate
from bap.lock import folder_lock
from bap.network import load_domains
from bap.run import final_split
from bap.train import Trainer, backend_of

__all__ = ["add_domain"]

_OF_THE_NETWORK = (
    "data",
    "size",
    "model",
    "model_options",
    "weights",
    "switch_stem",
    "switch_shortcuts",
    "threshold",
    "initial",
    "ste_every",
    "source",
    "source_mode",
    "domains",
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
        checkpoint: folder as :func:`bap.checkpoint.save_checkpoint` writes it.
        name: the new domain.
        changes: settings other than those of the checkpoint, such as ``{"epochs": 10}``; those that say how the network
            is made, and what the other domains were given, stay.
        like: the domain whose switches and batch norm it starts from; None starts with all channels on.
        data: the domain's data; None loads it as the settings say.
        progress: prints a line per epoch; None: on a terminal.

    Returns:
        The facts in its domain_config.json.

    Raises:
        ValueError: if the checkpoint has the domain already, or a setting may not change or cannot be used.
        FileError: if files are damaged or cannot be written.
    """
    path = Path(checkpoint)
    # A folder that is not there is not made: loading says so.
    with folder_lock(path if path.is_dir() else None):
        return _add(path, name, dict(changes or {}), like, data, progress)


def _add(
    checkpoint: Path, name: str, changes: dict[str, Any], like: str | None, data: Domain | None, progress: bool | None
) -> dict[str, Any]:
    there = domains_of(checkpoint)
    if name in there:
        raise ValueError(f"add_domain(): expected `name` to be new, got {name!r}, which {checkpoint} has.")
    if like is not None and like not in there:
        raise ValueError(f"add_domain(): expected `like` to be one of {there}, got {like!r}.")
    model, config, _ = load_checkpoint(checkpoint)
    if changes.get("train_backbone", False) is not False:
        raise ValueError("add_domain(): expected `train_backbone` to be off, as other domains share it, got on.")
    held = [one for one in changes if one in _OF_THE_NETWORK and changes[one] != getattr(config, one)]
    if held:
        raise ValueError(
            f"add_domain(): expected {held[0]!r} to stay as in {checkpoint}, {getattr(config, held[0])!r}, which the "
            f"network was made with, got {changes[held[0]]!r}."
        )
    settings = {**config.as_dict(), "train_backbone": False, "source": None, "source_mode": "switched"}
    config = config_of({**settings, **changes, "domains": [name]}, "add-domain")
    if config.measure == "time":
        config = dataclasses.replace(config, measure="mac", budget_ms=None)
    domain = load_domains(config)[name] if data is None else data
    split = final_split({name: domain})
    bk.nn.add_domain_(model, name, like=like, classes=len(domain.classes))
    trainer = Trainer(config, {name: domain}, None, progress=progress, model=model)
    trainer.fit()
    with bk.use_backend(backend_of(config)):
        accuracy = evaluate(model, domain, split).percent
    facts = {
        "classes": list(domain.classes),
        "size": domain.size,
        "mean": list(domain.mean),
        "std": list(domain.std),
        "kept": trainer.used(name),
        "accuracy": accuracy,
        "split": split,
    }
    save_domain(checkpoint, model, name, facts)
    return facts
