"""Settings from YAML files and ``name=value`` overrides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bap.config.settings import Config, full_names
from bap.files import FileError, read_bytes

__all__ = ["config_of", "load_config", "override_values"]


def config_of(values: Mapping[str, Any], where: str) -> Config:
    """Settings from names and values that came from ``where``, a file or a command.

    Raises:
        ValueError: for names or values that cannot be used.
    """
    try:
        return Config(**full_names(values))
    except ValueError as error:
        raise ValueError(f"{error} (From {where}.)") from None


def _loader() -> Any:
    """PyYAML's safe loader, which otherwise takes the last of two values of one name in silence."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for name in names:
                if names.count(name) > 1:
                    raise yaml.constructor.ConstructorError(None, None, f"{name!r} is set twice", node.start_mark)
            return super().construct_mapping(node, deep)

    return Loader


def _parsed(text: str, where: str) -> Any:
    import yaml

    try:
        return yaml.load(text, _loader())
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"load_config(): expected {where} to be YAML, got {problem}.") from None


def _named(values: Mapping[Any, Any], where: str) -> dict[str, Any]:
    try:
        return full_names(values)
    except ValueError as error:
        raise ValueError(f"{error} (From {where}.)") from None


def override_values(overrides: Iterable[str]) -> dict[str, Any]:
    """``name=value`` overrides, whose values are YAML, as {"group.name": value}; of two with one name the last counts.

    Raises:
        ValueError: for others.
    """
    values: dict[str, Any] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"load_config(): expected overrides like name=value, got {override!r}.")
        values |= _named({name.strip(): _parsed(text, f"the value of {override!r}")}, f"-s {name.strip()}")
    return values


def load_config(
    path: str | Path | None = None, overrides: Iterable[str] = (), base: Mapping[str, Any] | None = None
) -> Config:
    """Settings from a YAML file, then from ``name=value`` overrides, whose values are YAML too.

    Args:
        path: the file; None starts from the defaults.
        overrides: such as ``"beta=0.25"``, ``"budget.beta=0.25"`` or ``"domains=[digits, signs]"``.
        base: settings to start from, before the file's.

    Raises:
        ValueError: for files, names or values that cannot be used.

    Examples:
        >>> from bap.config import load_config
        >>> config = load_config(overrides=["beta=0.25", "sharing.loss=int", "domains=[digits, signs]"])
        >>> config.budget.beta, config.sharing.loss, config.data.domains
        (0.25, 'int', ['digits', 'signs'])
    """
    values = full_names(base or {})
    sources = []
    if path is not None:
        try:
            text = read_bytes(path).decode()
        except (FileError, UnicodeDecodeError) as error:
            raise ValueError(f"load_config(): expected `path` to be a YAML file, got {path}: {error}") from None
        content = _parsed(text, str(path))
        if not isinstance(content, dict):
            raise ValueError(f"load_config(): expected {path} to hold names and values, got {type(content).__name__}.")
        values |= _named(content, str(path))
        sources.append(str(path))
    changes = override_values(overrides)
    sources += [f"-s {name}" for name in changes]
    return config_of(values | changes, ", ".join(sources) or "the defaults")
