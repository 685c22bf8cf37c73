"""Saves and loads the state of a run between two epochs, in one safetensors file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bap.files import FileError, read_tensors, write_tensors
from bap.prune.layers import switched_layers

__all__ = ["load_state", "save_state"]

_FORMAT = 1


def save_state(
    path: str | Path, model: nn.Module, optimizers: Mapping[str, torch.optim.Optimizer], progress: Mapping[str, Any]
) -> None:
    """Saves model, optimizers and progress.

    Args:
        path: the file.
        model: its whole state, and the counters of switches that get gradients in some forwards only.
        optimizers: by name.
        progress: what else is needed, as JSON can hold it.

    Raises:
        FileError: if it cannot be written; an earlier file stays.
    """
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    groups: dict[str, Any] = {}
    plain: dict[str, dict[str, Any]] = {}
    for name, optimizer in optimizers.items():
        state = optimizer.state_dict()
        groups[name] = state["param_groups"]
        for index, values in state["state"].items():
            for key, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{name}.{index}.{key}"] = value
                else:
                    plain.setdefault(f"{name}.{index}", {})[key] = value
    counters = {
        f"{layer}.{domain}": switch.since
        for layer, module in switched_layers(model)
        for domain, switch in module.domains.items()
    }
    info = {"format": _FORMAT, "groups": groups, "plain": plain, "counters": counters, "facts": dict(progress)}
    write_tensors(path, tensors, info)


def load_state(
    path: Path,
    model: nn.Module,
    optimizers: Mapping[str, torch.optim.Optimizer],
    check: Callable[[Mapping[str, Any], Path], None] | None = None,
) -> dict[str, Any]:
    """Reads what :func:`save_state` wrote into a model and optimizers of the same kind; returns the progress.

    Args:
        path: the file.
        model, optimizers: as they were saved.
        check: called with the progress and the path before anything is loaded; may refuse them.

    Raises:
        FileError: if the file is damaged, or is that of another network.
    """
    tensors, info = read_tensors(path)
    if not isinstance(info, dict) or info.get("format") != _FORMAT:
        raise FileError(f"load_state(): expected {path} to be a state of format {_FORMAT}, got another one.")
    if check is not None:
        check(info["facts"], path)
    prefix = "model."
    state = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
    own = model.state_dict()
    wrong = [name for name in own if name not in state or state[name].shape != own[name].shape]
    wrong += [name for name in state if name not in own]
    if wrong or set(info["groups"]) != set(optimizers):
        raise FileError(
            f"load_state(): expected {path} to be a state of this network, got one that differs in {wrong[:3]}. "
            "Hint: resume with the settings that the run was started with."
        )
    model.load_state_dict(state)
    for name, optimizer in optimizers.items():
        values: dict[int, dict[str, Any]] = {}
        for key, tensor in tensors.items():
            if key.startswith(f"optimizer.{name}."):
                index, field = key[len(f"optimizer.{name}.") :].split(".", 1)
                values.setdefault(int(index), {})[field] = tensor
        for key, more in info["plain"].items():
            owner, index = key.rsplit(".", 1)
            if owner == name:
                values.setdefault(int(index), {}).update(more)
        optimizer.load_state_dict({"state": values, "param_groups": info["groups"][name]})
    for layer, module in switched_layers(model):
        for domain, switch in module.domains.items():
            switch.since = info["counters"][f"{layer}.{domain}"]
    return info["facts"]
