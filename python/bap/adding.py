"""Adds a domain to a finished network, with the others untouched."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bap_kernels as bk
from bap.checkpoint import domains_of, load_checkpoint, save_domain
from bap.config import Config
from bap.data import Domain
from bap.evaluate import evaluate
from bap.network import load_domains
from bap.train import Trainer, backend_of

__all__ = ["add_domain"]


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
        changes: settings other than those of the checkpoint, such as ``{"epochs": 10}``.
        like: the domain whose switches and batch norm it starts from; None starts with all channels on.
        data: the domain's data; None loads it as the settings say.
        progress: prints a line per epoch; None: on a terminal.

    Returns:
        The facts in its domain_config.json.

    Raises:
        ValueError: if the checkpoint has the domain already, or the shared weights were to be trained.
        FileError: if files are damaged or cannot be written.
    """
    if name in domains_of(checkpoint):
        raise ValueError(f"add_domain(): expected `name` to be new, got {name!r}, which {checkpoint} has.")
    model, config, _ = load_checkpoint(checkpoint)
    settings = {**config.as_dict(), "train_backbone": False, **dict(changes or {}), "domains": [name]}
    config = Config(**settings)
    if config.train_backbone:
        raise ValueError("add_domain(): expected `train_backbone` to be off, as other domains share it, got on.")
    if config.measure == "time":
        config = Config(**{**config.as_dict(), "measure": "mac", "budget_ms": None})
    domain = load_domains(config)[name] if data is None else data
    bk.nn.add_domain_(model, name, like=like, classes=len(domain.classes))
    trainer = Trainer(config, {name: domain}, None, progress=progress, model=model)
    trainer.fit()
    with bk.use_backend(backend_of(config)):
        accuracy = evaluate(model, domain, "test" if "test" in domain.splits else "val").percent
    facts = {
        "classes": list(domain.classes),
        "size": domain.size,
        "mean": list(domain.mean),
        "std": list(domain.std),
        "kept": trainer.used(name),
        "accuracy": accuracy,
    }
    save_domain(checkpoint, model, name, facts)
    return facts
