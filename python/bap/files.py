"""Files that are whole or not there: written beside their place, flushed, and moved; tensors with a checksum."""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

__all__ = ["FileError", "read_json", "read_tensors", "remove_leftovers", "write_bytes", "write_json", "write_tensors"]

_SUFFIX = ".part"


class FileError(RuntimeError):
    """A file could not be written, or is not what it should be."""


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes a file that is never seen half-written, not even after the process or the machine dies.

    Raises:
        FileError: if it cannot be written; what was there before stays.

    Examples:
        >>> import tempfile, pathlib
        >>> from bap.files import write_bytes
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_bytes(pathlib.Path(folder, "a"), b"whole")
        ...     pathlib.Path(folder, "a").read_bytes()
        b'whole'
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}{_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            # The new name itself must be on the disk.
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise FileError(
            f"write_bytes(): expected to write {path} ({len(data)} bytes), got {error.strerror or error}. "
            "Hint: is the disk full? What was there before is unchanged."
        ) from None


def remove_leftovers(folder: str | Path) -> None:
    """Removes parts that a killed process left in a folder."""
    for part in Path(folder).glob(f".*{_SUFFIX}"):
        part.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Writes JSON, see :func:`write_bytes`."""
    write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: str | Path) -> Any:
    """Reads JSON.

    Raises:
        FileError: if there is no such file, or it is no JSON.
    """
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise FileError(f"read_json(): expected {path} to be a JSON file, got {error}.") from None


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    value = 0
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"", value)
    return f"{value:08x}"


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Writes a safetensors file with a checksum and further facts in its header, see :func:`write_bytes`.

    Args:
        path: the file.
        tensors: dense tensors of any device.
        info: facts that JSON can hold.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"checksum": _checksum(held), "info": json.dumps(info)}
    # Clones: tensors that share memory are refused.
    write_bytes(path, save({name: tensor.clone() for name, tensor in held.items()}, metadata=header))


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], Any]:
    """Reads what :func:`write_tensors` wrote: the tensors, on the CPU, and the facts.

    Raises:
        FileError: if there is no such file, or it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
        info = json.loads(header["info"])
        expected = header["checksum"]
    except FileNotFoundError:
        raise FileError(f"read_tensors(): expected {path} to be there, got no such file.") from None
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise FileError(
            f"read_tensors(): expected {path} to be a whole checkpoint, got a damaged file: {error!r}."
        ) from None
    if _checksum(tensors) != expected:
        raise FileError(f"read_tensors(): expected {path} to have the checksum {expected}, got a damaged file.")
    return tensors, info
