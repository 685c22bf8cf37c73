"""The file that keeps the channel lists of a network for all of its domains."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from bap_kernels.channels import ChannelLists

__all__ = ["read_lists", "write_lists"]

_FORMAT = "bap_kernels.channel_table"
_VERSION = 1
_KEYS = ("in_index", "out_index")


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, and of all lists with their numbers, dtypes and shapes."""
    value = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        listed = tensors[name].contiguous()
        value.update(json.dumps([name, str(listed.dtype), list(listed.shape)]).encode())
        value.update(listed.numpy().tobytes())
    return value.hexdigest()


def write_lists(path: str | os.PathLike[str], domains: Mapping[str, Mapping[str, ChannelLists]]) -> None:
    """Writes {domain: {layer: lists}}, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    # Names go into one JSON text, so that any name is safe; tensors are named by number, and bound by a digest.
    names: list[list[object]] = []
    for domain, layers in domains.items():
        entries: list[list[object]] = []
        for layer, lists in layers.items():
            keys: list[str | None] = []
            for side in _KEYS:
                listed = getattr(lists.to("cpu"), side)
                keys.append(None if listed is None else f"{len(tensors)}")
                if listed is not None:
                    tensors[f"{len(tensors)}"] = listed.clone()
            entries.append([layer, *keys])
        names.append([domain, entries])
    text = json.dumps(names)
    header = {"format": _FORMAT, "version": str(_VERSION), "table": text, "digest": _digest(text, tensors)}
    data = to_bytes(tensors, header)
    # In the same folder, so that the last step is one rename.
    partial = f"{os.fspath(path)}.{os.getpid()}.partial"
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        # The file that could not be written is another one than the caller named.
        raise type(error)(
            f"ChannelTable.save(): expected `path` to be a file that can be written, got {os.fspath(path)!r}: "
            f"{error.strerror or error}."
        ) from error
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def read_lists(path: str | os.PathLike[str]) -> dict[str, dict[str, ChannelLists]]:
    """Reads what :func:`write_lists` wrote.

    Raises:
        OSError: if there is no such file (FileNotFoundError), or it cannot be read.
        ValueError: if the file is damaged, newer than this version, or something else.
    """
    if os.path.isdir(path):
        raise IsADirectoryError(
            f"ChannelTable.load(): expected `path` to be a file, got the folder {os.fspath(path)!r}."
        )
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            facts = file.metadata() or {}
            if facts.get("format") != _FORMAT:
                raise ValueError("it holds no channel table")
            if facts.get("version") != str(_VERSION):
                raise ValueError(f"its format has version {facts.get('version')}, this one reads {_VERSION}")
            # Files of earlier versions have no digest; a damaged key is not taken for one of them.
            if set(facts) - {"digest"} != {"format", "version", "table"}:
                raise ValueError(f"its header has the keys {sorted(facts)}")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no mapping
            if "digest" in facts and facts["digest"] != _digest(facts["table"], tensors):
                raise ValueError("its digest is that of other content: a damaged or edited file")
            table = {
                domain: {
                    layer: ChannelLists(*(None if key is None else tensors[key] for key in keys))
                    for layer, *keys in entries
                }
                for domain, entries in json.loads(facts["table"])
            }
            if not all(
                isinstance(name, str) for name in (*table, *(name for layers in table.values() for name in layers))
            ):
                raise ValueError("not all of its names are texts")
            return table
    except (SafetensorError, ValueError, TypeError, KeyError, IndexError) as error:
        raise ValueError(
            f"ChannelTable.load(): expected a file that ChannelTable.save wrote, got {os.fspath(path)!r}: {error}."
        ) from error
