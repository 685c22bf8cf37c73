"""Writes checkpoints and states as versions before digests did, from those of today."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import torch
from bap.files import read_tensors
from safetensors.torch import save_file


def old_tensors(path: Path) -> None:
    """Rewrites a file of tensors: a CRC of the tensors alone, no version."""
    tensors, info = read_tensors(path)
    value = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"", value)
    save_file(tensors, path, {"checksum": f"{value:08x}", "info": json.dumps(info)})


def old_checkpoint(folder: Path) -> None:
    """Rewrites a checkpoint: format 1, no digests, no order of the domains, no settings that are new."""
    for path in folder.rglob("*.safetensors"):
        old_tensors(path)
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text())
        for key in ("digest", "network", "tensors", "position", "model", "domains", "split"):
            content.pop(key, None)
        content["format"] = 1
        content.get("config", {}).pop("log_every", None)
        path.write_text(json.dumps(content, indent=1) + "\n")
