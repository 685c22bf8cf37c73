"""What a run tells other programs, such as Weights & Biases or MLflow, which this project does not need.

A callback for one of them is a few lines in a file of the user's:

    class WandbCallback(Callback):
        def started(self, config, folder):
            import wandb
            self.run = wandb.init(project="bap", config=config.as_dict(), dir=folder)

        def epoch_ended(self, record):
            self.run.log(flat_numbers(record), step=record["epoch"])

        def ended(self, results):
            self.run.summary.update(flat_numbers(results))
            self.run.finish()

``bap train --callback my_callbacks:WandbCallback`` uses it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bap.config import Config

__all__ = ["Callback", "flat_numbers", "load_callback"]


class Callback:
    """Called by :func:`bap.results.run.train_run`, by the first process only; each method does nothing by default.

    An exception ends the run; what was saved of the last whole epoch stays.
    """

    def started(self, config: Config, folder: Path | None) -> None:
        """Before the first epoch, or the first after a resumption."""

    def epoch_ended(self, record: Mapping[str, Any]) -> None:
        """After the state of an epoch was written; the record is a line of metrics.jsonl."""

    def ended(self, results: Mapping[str, Any]) -> None:
        """After results.json was written."""


def flat_numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """All numbers of nested mappings by their path, as such programs take them; other values are left out.

    Examples:
        >>> from bap.results.callbacks import flat_numbers
        >>> flat_numbers({"epoch": 2, "domains": {"digits": {"kept": 0.5}}, "split": "test"})
        {'epoch': 2, 'domains/digits/kept': 0.5}
    """
    numbers: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            numbers |= flat_numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            numbers[f"{prefix}{key}"] = value
    return numbers


def load_callback(name: str) -> Callback:
    """An instance of a class that is named ``package.module:Class``, of the working folder or installed.

    Raises:
        ValueError: if there is no such class, or it is no :class:`Callback`.

    Examples:
        >>> from bap.results.callbacks import load_callback
        >>> type(load_callback("bap.results.callbacks:Callback")).__name__
        'Callback'
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"load_callback(): expected `name` to be package.module:Class, got {name!r}.")
    here = str(Path.cwd())
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"load_callback(): expected {name!r} to be there, got {error}.") from None
    finally:
        if added:
            sys.path.remove(here)
    if not isinstance(kind, type) or not issubclass(kind, Callback):
        raise ValueError(f"load_callback(): expected {name!r} to be a bap.results.callbacks.Callback, got {kind!r}.")
    return kind()
