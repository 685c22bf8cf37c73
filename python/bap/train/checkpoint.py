"""Checkpoints: the shared weights once, and a small folder for each domain.

    config.json                             settings, order of the domains, digest of model.safetensors
    model.safetensors                       weights that all domains share
    domains/<name>/domain_config.json       classes, input, share of the budget, accuracy, digest of domain.safetensors
    domains/<name>/domain.safetensors       scores, batch norm, classifier

A domain is loaded without reading the files of any other, and added without writing them. Digests (SHA-256) bind the
files: ``network``, in config.json and in every domain_config.json, is that of the settings and the shared weights, so
that a damaged file, or one of another run, is found whichever it is.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, FiniteFloat, StrictInt, StrictStr, ValidationError
from torch import Tensor, nn

import bap_kernels as bk
from bap.config import Config, config_of
from bap.data import Domain
from bap.files import (
    FileError,
    digest_of,
    parse_tensors,
    read_bytes,
    read_sealed_json,
    sealed_json,
    tensors_bytes,
    write_files,
)
from bap.train.network import switched_network

__all__ = ["domain_spec", "domains_of", "load_checkpoint", "save_checkpoint", "save_domain"]

# Format 1, of earlier versions, has no digests.
_FORMAT = 2
_TRIES = 4
_OWN_KEYS = ("format", "name", "network", "tensors", "position", "digest")
# Beside a pruned weight: which of its filters and input slices it holds.
_ROWS, _COLUMNS = ".kept_filters", ".kept_slices"


class _DomainSpec(BaseModel):
    """Fields of domain_config.json; ``classes`` is required, unknown ones are kept."""

    name: StrictStr
    classes: Annotated[list[StrictStr], Field(min_length=1)]
    size: Annotated[StrictInt, Field(ge=1, le=4096)] | None = None
    position: StrictInt = 0
    mean: list[FiniteFloat] | None = None
    std: list[FiniteFloat] | None = None
    kept: FiniteFloat | None = None
    accuracy: FiniteFloat | None = None


def domain_spec(domain: Domain, kept: float, accuracy: float, split: str) -> dict[str, Any]:
    """What domain_config.json says of a trained domain: its classes, its input, its share and its accuracy."""
    inputs = {"size": domain.size, "mean": list(domain.mean), "std": list(domain.std)}
    return {"classes": list(domain.classes), **inputs, "kept": kept, "accuracy": accuracy, "split": split}


class _MismatchError(FileError):
    """Files that do not belong together: another process may be writing them."""


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


def _domain_files(
    path: Path, model: nn.Module, domain: str, spec: Mapping[str, Any], network: str | None, position: int
) -> dict[str | Path, bytes]:
    folder = _folder(path, domain)
    own = _own_state(model, domain)
    if not own:
        raise ValueError(f"save_domain(): expected `model` to have the domain {domain!r}, got one without it.")
    tensors = tensors_bytes(own, {"format": _FORMAT, "domain": domain})
    head = {
        "format": _FORMAT,
        "name": domain,
        "network": network,
        "tensors": digest_of(tensors),
        "position": position,
        **{key: value for key, value in spec.items() if key not in _OWN_KEYS},
    }
    # The spec last: a domain without one is not complete.
    return {folder / "domain.safetensors": tensors, folder / "domain_config.json": sealed_json(head)}


def save_domain(path: str | Path, model: nn.Module, domain: str, spec: Mapping[str, Any]) -> None:
    """Writes one domain; nothing else in the folder is touched.

    Args:
        path: folder of the checkpoint, whose shared weights are the model's.
        model: a model that has the domain.
        domain: its name.
        spec: for domain_config.json; ``classes``, names of the classes, are needed to load it.

    Raises:
        FileError: if the folder has no checkpoint, or a file cannot be written.
        ValueError: if the model lacks the domain, or its name cannot be that of a folder.
    """
    path = Path(path)
    _domain_files(path, model, domain, spec, None, 0)
    head = _read_head(path)
    position = len(domains_of(path))
    write_files(_domain_files(path, model, domain, spec, head.get("network"), position))


def save_checkpoint(
    path: str | Path,
    model: nn.Module,
    config: Config,
    domains: Mapping[str, Mapping[str, Any]],
    kept: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None = None,
) -> None:
    """Writes a network with its domains.

    Args:
        path: the folder; created if it is missing.
        model: as :func:`bap.train.network.switched_network` makes it.
        config: the settings it was made with.
        domains: {domain: spec for its domain_config.json}, in the order in which they are loaded.
        kept: {convolution: filters that are left} and {convolution: input slices that are left}, bool, as
            :func:`bap.prune.prune.prune_` found them: only these weights are written.

    Raises:
        FileError: if a file cannot be written; an earlier checkpoint in the folder stays as it is.
    """
    path = Path(path)
    shared = _shared_state(model)
    if kept is not None:
        for name in kept[0]:
            conv = model.get_submodule(name)
            rows, columns = kept[0][name].cpu(), kept[1][name].cpu()
            if isinstance(conv, nn.Conv2d) and conv.groups == 1:
                weight = shared[f"{name}.weight"].detach().cpu()
                shared[f"{name}.weight"] = weight[rows][:, columns]
                shared[f"{name}{_ROWS}"], shared[f"{name}{_COLUMNS}"] = rows, columns
    weights = tensors_bytes(shared, {"format": _FORMAT})
    content = {"model": digest_of(weights), "domains": list(domains), "config": config.as_dict()}
    network = digest_of(content)
    files: dict[str | Path, bytes] = {}
    for position, (name, spec) in enumerate(domains.items()):
        files.update(_domain_files(path, model, name, spec, network, position))
    files[path / "model.safetensors"] = weights
    # Last: a folder without it is no checkpoint.
    files[path / "config.json"] = sealed_json({"format": _FORMAT, "network": network, **content})
    write_files(files)


def _widened(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Pruned weights at full size, zeros where they were dropped."""
    full = {key: value for key, value in state.items() if not key.endswith((_ROWS, _COLUMNS))}
    for key in state:
        if key.endswith(_ROWS):
            name = key.removesuffix(_ROWS)
            rows, columns, weight = state[key], state.get(f"{name}{_COLUMNS}"), state.get(f"{name}.weight")
            if columns is None or weight is None or weight.shape[:2] != (int(rows.sum()), int(columns.sum())):
                raise FileError(
                    f"load_checkpoint(): expected {path} to list what is left of {name!r}, got other lists."
                )
            dense = weight.new_zeros(len(rows), len(columns), *weight.shape[2:])
            dense[rows.nonzero(), columns.nonzero().T] = weight
            full[f"{name}.weight"] = dense
    return full


def _read_head(path: Path) -> dict[str, Any]:
    inside = path / "checkpoint"
    if not (path / "config.json").exists() and (inside / "config.json").exists():
        raise FileError(
            f"load_checkpoint(): expected {path} to be a checkpoint, got the folder of a run. Hint: {inside}."
        )
    head = read_sealed_json(path / "config.json", _FORMAT)
    if not isinstance(head.get("config"), dict):
        raise FileError(f"load_checkpoint(): expected {path / 'config.json'} to hold `config`, got none.")
    return head


def _read_spec(path: Path, domain: str, network: str | None) -> dict[str, Any]:
    file = _folder(path, domain) / "domain_config.json"
    spec = read_sealed_json(file, _FORMAT)
    try:
        checked = _DomainSpec.model_validate(spec)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise FileError(
            f"load_checkpoint(): expected {file} to describe a domain, got {place}: {first['msg']}"
        ) from None
    if checked.name != domain:
        raise FileError(f"load_checkpoint(): expected {file} to be of {domain!r}, got that of {checked.name!r}.")
    if network is not None and spec.get("network") != network:
        raise _MismatchError(
            f"load_checkpoint(): expected {file} to belong to {path / 'config.json'}, got a domain of another network."
        )
    return spec


def _read_bound(file: Path, expected: str | None, binding: Path) -> dict[str, Tensor]:
    """Tensors of a file whose digest another file holds."""
    data = read_bytes(file)
    if expected is not None and digest_of(data) != expected:
        # A damaged file is reported as such, not as one of another network.
        parse_tensors(data, file)
        raise _MismatchError(
            f"load_checkpoint(): expected {file} to have the digest that {binding} names, got a damaged file or one of "
            "another network."
        )
    return parse_tensors(data, file)[0]


def domains_of(path: str | Path) -> list[str]:
    """Names of the domains of a checkpoint: in the order of training, then those that were added, sorted."""
    path = Path(path)
    present = sorted(file.parent.name for file in path.glob("domains/*/domain_config.json"))
    try:
        first = _read_head(path).get("domains", [])
    except FileError:
        first = []
    first = [name for name in first if name in present] if isinstance(first, list) else []
    return first + [name for name in present if name not in first]


def load_checkpoint(
    path: str | Path, domains: Iterable[str] | None = None
) -> tuple[nn.Module, Config, dict[str, dict[str, Any]]]:
    """Loads a network with some of its domains; files of the others are not read.

    Args:
        path: folder of the checkpoint.
        domains: names, in the order that the model will have; None loads all, in the order of training and adding.

    Returns:
        The model, in eval mode with the first domain active; its settings; {domain: spec}.

    Raises:
        FileError: if a file is missing, damaged or of another network, or a domain is missing.

    Warns:
        UserWarning: for a checkpoint of an earlier version, whose files no digest binds.

    Examples:
        >>> import tempfile
        >>> from bap.train.checkpoint import load_checkpoint, save_checkpoint
        >>> from bap.config import Config
        >>> from bap.train.network import switched_network
        >>> config = Config(model_options={"widths": [4, 8, 8], "blocks": [1, 1, 1]})
        >>> model = switched_network(config, {"a": 3, "b": 2})
        >>> specs = {"a": {"classes": ["x", "y", "z"]}, "b": {"classes": ["u", "v"]}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_checkpoint(folder, model, config, specs)
        ...     loaded, _, specs = load_checkpoint(folder, ["b"])
        >>> [(name, layer.out_features) for name, layer in loaded.fc.domains.items()]
        [('b', 2)]
    """
    path = Path(path)
    requested = None if domains is None else list(dict.fromkeys(domains))
    for _ in range(_TRIES - 1):
        try:
            return _load(path, requested)
        except _MismatchError:
            # A process that rewrites the checkpoint replaces its files one after another, within a moment.
            time.sleep(0.1)
    return _load(path, requested)


def _load(path: Path, requested: list[str] | None) -> tuple[nn.Module, Config, dict[str, dict[str, Any]]]:
    head = _read_head(path)
    binding = path / "config.json"
    network = None
    if head["format"] == _FORMAT:
        content = {key: head.get(key) for key in ("model", "domains", "config")}
        network = head.get("network")
        if network != digest_of(content):
            raise FileError(f"load_checkpoint(): expected {binding} to name its own network, got another one.")
    else:
        warnings.warn(
            f"load_checkpoint(): {path} is of an earlier format, without digests: a damaged file, or one of another "
            "run, may not be found. Hint: save_checkpoint rewrites it.",
            stacklevel=3,
        )
    # Its weights are in the checkpoint, not in the file that training started from; its teacher is not needed.
    try:
        config = config_of(head["config"], str(binding)).replace(
            weights=None, teacher=None, distill_weight=0.0, fixed=None
        )
    except ValueError as error:
        raise FileError(f"load_checkpoint(): expected {binding} to hold settings: {error}") from None
    present = domains_of(path)
    names = present if requested is None else requested
    for name in names:
        if name not in present:
            raise FileError(f"load_checkpoint(): expected {path} to have one of {present}, got {name!r}.")
    if not names:
        raise FileError(f"load_checkpoint(): expected {path} to have domains, got none.")
    specs = {name: _read_spec(path, name, network) for name in names}
    trained = head.get("domains")
    lost = [name for name in trained if name not in present] if isinstance(trained, list) else []
    if requested is None and lost:
        # What only they use would count as unused.
        raise FileError(
            f"load_checkpoint(): expected {path} to have all domains that {binding.name} lists, got no "
            f"domain_config.json of {lost}. Hint: name those that are there."
        )
    if requested is None:
        names = sorted(names, key=lambda name: specs[name].get("position", 0))
        specs = {name: specs[name] for name in names}
    shared = _read_bound(path / "model.safetensors", head.get("model") if network is not None else None, binding)
    state = _widened(shared, path / "model.safetensors")
    for name in names:
        folder = _folder(path, name)
        own = _read_bound(folder / "domain.safetensors", specs[name].get("tensors"), folder / "domain_config.json")
        strange = [key for key in own if f".domains.{name}." not in f".{key}"]
        if strange:
            raise FileError(
                f"load_checkpoint(): expected {folder} to hold what {name!r} owns, got others: {strange[:3]}."
            )
        state.update(own)
    # Built last, after all files were checked.
    model = switched_network(config, {name: len(specs[name]["classes"]) for name in names})
    expected = model.state_dict()
    wrong = [
        key
        for key, value in expected.items()
        if key not in state or state[key].shape != value.shape or state[key].dtype != value.dtype
    ]
    wrong += [key for key in state if key not in expected]
    if wrong:
        raise FileError(
            f"load_checkpoint(): expected {path} to fit {config.model.name!r}, got one that differs in {wrong[:3]}."
        )
    model.load_state_dict(state)
    bk.set_domain(model.eval(), names[0])
    return model, config, specs
