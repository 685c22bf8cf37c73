"""A trained network on disk: what is shared once, and a small folder for every domain.

    config.json                             model, its options, measure, budget, domains
    model.safetensors                       weights that all domains share
    domains/<name>/domain_config.json       classes, input, share of the budget, accuracy
    domains/<name>/domain.safetensors       scores, batch norm, classifier

A domain is loaded without reading the files of any other, and added without writing them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import bap_kernels as bk
from bap.config import Config
from bap.files import FileError, read_json, read_tensors, write_json, write_tensors
from bap.network import switched_network

__all__ = ["domains_of", "load_checkpoint", "save_checkpoint", "save_domain"]

_FORMAT = 1
# Beside a pruned weight: which of its filters and input slices are there.
_ROWS, _COLUMNS = ".kept_filters", ".kept_slices"


def _own_state(model: nn.Module, domain: str) -> dict[str, Any]:
    return {name: value for name, value in model.state_dict().items() if f".domains.{domain}." in f".{name}"}


def _shared_state(model: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in model.state_dict().items() if ".domains." not in f".{name}"}


def _folder(path: Path, domain: str) -> Path:
    if not re.fullmatch(r"[\w+-][\w+. -]*", domain):
        raise ValueError(
            f"save_domain(): expected a domain's name to be letters, digits, '-' and '_', got {domain!r}: "
            "it is the name of a folder."
        )
    return path / "domains" / domain


def save_domain(path: str | Path, model: nn.Module, domain: str, facts: Mapping[str, Any]) -> None:
    """Writes one domain; nothing else in the folder is touched.

    Args:
        path: folder of the checkpoint.
        model: a model that has the domain.
        domain: its name.
        facts: for domain_config.json; ``classes``, names of the classes, are needed to load it.

    Raises:
        FileError: if a file cannot be written.
        ValueError: if the model lacks the domain, or its name cannot be that of a folder.
    """
    folder = _folder(Path(path), domain)
    own = _own_state(model, domain)
    if not own:
        raise ValueError(f"save_domain(): expected `model` to have the domain {domain!r}, got one without it.")
    # The facts last: a domain without them is not there.
    write_tensors(folder / "domain.safetensors", own, {"format": _FORMAT, "domain": domain})
    write_json(folder / "domain_config.json", {"format": _FORMAT, "name": domain, **facts})


def save_checkpoint(
    path: str | Path,
    model: nn.Module,
    config: Config,
    domains: Mapping[str, Mapping[str, Any]],
    kept: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None = None,
) -> None:
    """Writes a network with its domains.

    Args:
        path: the folder; made if it is not there.
        model: as :func:`bap.network.switched_network` makes it.
        config: the settings it was made with.
        domains: {domain: facts for its domain_config.json}.
        kept: {convolution: filters that are left} and {convolution: input slices that are left}, bool, as
            :func:`bap.prune.prune_` found them: only these weights are written.

    Raises:
        FileError: if a file cannot be written.
    """
    path = Path(path)
    for name, facts in domains.items():
        save_domain(path, model, name, facts)
    shared = _shared_state(model)
    if kept is not None:
        for name in kept[0]:
            conv = model.get_submodule(name)
            rows, columns = kept[0][name].cpu(), kept[1][name].cpu()
            if isinstance(conv, nn.Conv2d) and conv.groups == 1:
                weight = shared[f"{name}.weight"].detach().cpu()
                shared[f"{name}.weight"] = weight[rows][:, columns]
                shared[f"{name}{_ROWS}"], shared[f"{name}{_COLUMNS}"] = rows, columns
    write_tensors(path / "model.safetensors", shared, {"format": _FORMAT})
    # Last: a folder without it is no checkpoint.
    write_json(path / "config.json", {"format": _FORMAT, "config": config.as_dict()})


def _widened(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pruned weights at full size, zeros where they were dropped."""
    made = {key: value for key, value in state.items() if not key.endswith((_ROWS, _COLUMNS))}
    for key in state:
        if key.endswith(_ROWS):
            name = key.removesuffix(_ROWS)
            rows, columns, weight = state[key], state[f"{name}{_COLUMNS}"], state[f"{name}.weight"]
            full = weight.new_zeros(len(rows), len(columns), *weight.shape[2:])
            full[rows.nonzero(), columns.nonzero().T] = weight
            made[f"{name}.weight"] = full
    return made


def domains_of(path: str | Path) -> list[str]:
    """Names of the domains of a checkpoint, sorted."""
    return sorted(one.parent.name for one in Path(path).glob("domains/*/domain_config.json"))


def load_checkpoint(
    path: str | Path, domains: Iterable[str] | None = None
) -> tuple[nn.Module, Config, dict[str, dict[str, Any]]]:
    """Loads a network with some of its domains; files of the others are not read.

    Args:
        path: folder of the checkpoint.
        domains: names; None loads all.

    Returns:
        The model, in eval mode with the first domain active; its settings; {domain: facts}.

    Raises:
        FileError: if a file is missing or damaged, or a domain is not there.

    Examples:
        >>> import tempfile
        >>> from bap.checkpoint import load_checkpoint, save_checkpoint
        >>> from bap.config import Config
        >>> from bap.network import switched_network
        >>> config = Config(model_options={"widths": [4, 8, 8], "blocks": [1, 1, 1]})
        >>> model = switched_network(config, {"a": 3, "b": 2})
        >>> facts = {"a": {"classes": ["x", "y", "z"]}, "b": {"classes": ["u", "v"]}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_checkpoint(folder, model, config, facts)
        ...     loaded, _, facts = load_checkpoint(folder, ["b"])
        >>> [(name, layer.out_features) for name, layer in loaded.fc.domains.items()]
        [('b', 2)]
    """
    path = Path(path)
    head = read_json(path / "config.json")
    if not isinstance(head, dict) or head.get("format") != _FORMAT:
        raise FileError(f"load_checkpoint(): expected {path} to be a checkpoint of format {_FORMAT}, got another one.")
    # Its weights are in the checkpoint, not in the file that training started from.
    config = Config(**{**head["config"], "weights": None})
    names = domains_of(path) if domains is None else list(domains)
    facts = {}
    for name in names:
        if name not in domains_of(path):
            raise FileError(f"load_checkpoint(): expected {path} to have one of {domains_of(path)}, got {name!r}.")
        facts[name] = read_json(_folder(path, name) / "domain_config.json")
    if not names:
        raise FileError(f"load_checkpoint(): expected {path} to have domains, got none.")
    model = switched_network(config, {name: len(facts[name]["classes"]) for name in names})
    state = _widened(read_tensors(path / "model.safetensors")[0])
    for name in names:
        own, _ = read_tensors(_folder(path, name) / "domain.safetensors")
        state.update(own)
    expected = model.state_dict()
    wrong = [key for key in expected if key not in state or state[key].shape != expected[key].shape]
    wrong += [key for key in state if key not in expected]
    if wrong:
        raise FileError(
            f"load_checkpoint(): expected {path} to fit {config.model!r}, got one that differs in {wrong[:3]}."
        )
    model.load_state_dict(state)
    bk.set_domain(model.eval(), names[0])
    return model, config, facts
