"""Atomic files: written under another name, flushed, and renamed; tensors and JSON with a digest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

__all__ = [
    "FileError",
    "digest_of",
    "parse_tensors",
    "read_bytes",
    "read_json",
    "read_sealed_json",
    "read_tensors",
    "remove_leftovers",
    "sealed_json",
    "tensors_bytes",
    "write_bytes",
    "write_files",
    "write_json",
    "write_tensors",
]

_SUFFIX = ".part"
_VERSION = "2"


class FileError(RuntimeError):
    """A file cannot be written, or its content is not valid."""


def write_files(files: Mapping[str | Path, bytes]) -> None:
    """Writes files atomically, also when the process or the machine dies in between.

    All of them are on the disk, under other names, before the first one is replaced; the last one is replaced last.

    Raises:
        FileError: if one cannot be written; earlier files stay.

    Examples:
        >>> import tempfile, pathlib
        >>> from bap.files import write_files
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_files({pathlib.Path(folder, "a"): b"whole"})
        ...     pathlib.Path(folder, "a").read_bytes()
        b'whole'
    """
    parts: dict[Path, Path] = {}
    path = Path()
    data = b""
    try:
        for name, data in files.items():
            path = Path(name)
            part = parts[path] = path.with_name(f".{path.name}.{os.getpid()}{_SUFFIX}")
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path, part in parts.items():
            os.replace(part, path)
        for folder in dict.fromkeys(path.parent for path in parts):
            # A rename is on the disk once its folder is.
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    except OSError as error:
        raise FileError(
            f"write_bytes(): expected to write {path} ({len(data)} bytes), got {error.strerror or error}. "
            "Hint: is the disk full? What was there before is unchanged."
        ) from None
    finally:
        for part in parts.values():
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes one file, see :func:`write_files`."""
    write_files({path: data})


def remove_leftovers(folder: str | Path, name: str = "") -> None:
    """Removes temporary files that a killed process left in a folder: of one file, or of all."""
    for part in Path(folder).glob(f".{name}*{_SUFFIX}"):
        part.unlink(missing_ok=True)


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def write_json(path: str | Path, value: Any) -> None:
    """Writes JSON, see :func:`write_files`."""
    write_bytes(path, _json_bytes(value))


def read_bytes(path: str | Path) -> bytes:
    """Reads a file.

    Raises:
        FileError: if it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise FileError(f"read_bytes(): expected {path} to be there, got no such file.") from None
    except (OSError, ValueError) as error:
        raise FileError(f"read_bytes(): expected {path} to be a file that can be read, got {error}.") from None


def read_json(path: str | Path) -> Any:
    """Reads JSON.

    Raises:
        FileError: if there is no such file, or it is no JSON.
    """
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise FileError(f"read_json(): expected {path} to be a JSON file, got no such file.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"read_json(): expected {path} to be a JSON file, got {error}.") from None


def digest_of(value: Any) -> str:
    """SHA-256 of bytes, or of a value in its one canonical JSON form."""
    if not isinstance(value, bytes):
        value = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(value).hexdigest()


def sealed_json(value: Mapping[str, Any]) -> bytes:
    """A JSON object with ``digest``, the SHA-256 of everything else in it."""
    return _json_bytes({**value, "digest": digest_of(dict(value))})


def read_sealed_json(path: str | Path, version: int) -> dict[str, Any]:
    """Reads what :func:`sealed_json` wrote, without ``digest``; objects of a smaller ``format`` may lack it.

    Args:
        path: the file.
        version: the newest ``format`` that is known; it has a digest.

    Raises:
        FileError: if there is no such file, it has no known ``format``, or its content is not what was written.
    """
    content = read_json(path)
    found_format = content.get("format") if isinstance(content, dict) else None
    if type(found_format) is not int or not 1 <= found_format <= version:
        raise FileError(
            f"read_json(): expected {path} to be of a format from 1 to {version}, got {found_format!r}: "
            "a damaged file, or one of a newer version."
        )
    expected = content.pop("digest", None)
    if (found_format == version or expected is not None) and expected != digest_of(content):
        raise FileError(
            f"read_json(): expected {path} to have the digest {expected}, got another one: a damaged or edited file."
        )
    return content


def _old_checksum(tensors: Mapping[str, Tensor]) -> str:
    value = 0
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"", value)
    return f"{value:08x}"


def _checksum(tensors: Mapping[str, Tensor], info: str) -> str:
    """SHA-256 of the info and of all tensors with their names, dtypes and shapes."""
    value = hashlib.sha256(info.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        value.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        value.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return value.hexdigest()


def tensors_bytes(tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> bytes:
    """A safetensors file with a checksum over everything, and further info, in its header.

    Args:
        tensors: dense tensors of any device.
        info: what JSON can hold.
    """
    dense = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(info, allow_nan=False)
    header = {"version": _VERSION, "checksum": _checksum(dense, text), "info": text}
    # Clones: tensors that share memory are refused.
    return save({name: tensor.clone() for name, tensor in dense.items()}, metadata=header)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Writes what :func:`tensors_bytes` makes, see :func:`write_files`."""
    write_bytes(path, tensors_bytes(tensors, info))


def parse_tensors(data: bytes, path: str | Path) -> tuple[dict[str, Tensor], Any]:
    """The tensors, on the CPU, and the info of what :func:`tensors_bytes` wrote; ``path`` is for messages.

    Raises:
        FileError: if it is damaged.
    """
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        # Files of earlier versions have no version; their checksum is of the tensors alone.
        if set(header) not in ({"info", "checksum"}, {"info", "checksum", "version"}):
            raise ValueError(f"its header has the keys {sorted(header)}")
        if header.get("version", _VERSION) != _VERSION:
            raise ValueError(f"it has the version {header['version']!r}, this one reads {_VERSION}")
        checksum = _checksum(tensors, header["info"]) if "version" in header else _old_checksum(tensors)
        info = json.loads(header["info"])
        expected = header["checksum"]
    except (SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise FileError(
            f"read_tensors(): expected {path} to be a whole checkpoint, got a damaged file: {error!r}."
        ) from None
    if checksum != expected:
        raise FileError(f"read_tensors(): expected {path} to have the checksum {expected}, got a damaged file.")
    return tensors, info


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], Any]:
    """Reads what :func:`write_tensors` wrote: the tensors, on the CPU, and the info.

    Raises:
        FileError: if there is no such file, or it is damaged.
    """
    return parse_tensors(read_bytes(path), path)
