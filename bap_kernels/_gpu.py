"""What tells one GPU's measurements from another's: the device, its driver, and the software that computes on it."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from pathlib import Path

import torch

from bap_kernels._load import _C, cuda_library

__all__ = ["driver_version", "extension_hash", "gpu_identity"]

_DRIVER_FILE = Path("/proc/driver/nvidia/version")


def driver_version(file: Path = _DRIVER_FILE) -> str:
    """The driver's version as NVIDIA counts it, or the CUDA version that it is for; "unknown" without either.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from bap_kernels._gpu import driver_version
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "version")
        ...     _ = file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.10  Jan 22")
        ...     driver_version(file)
        '570.86.10'
    """
    try:
        words = file.read_text(encoding="utf-8", errors="replace").splitlines()[0].split()
    except (OSError, IndexError):
        words = []
    for word in words:
        parts = word.split(".")
        if len(parts) > 1 and all(part.isdecimal() for part in parts):
            return word
    known = getattr(torch._C, "_cuda_getDriverVersion", None)
    return f"CUDA {known()}" if known is not None else "unknown"


@functools.cache
def extension_hash() -> str:
    """A short hash of the compiled libraries, which tells builds apart."""
    digest = hashlib.blake2b(digest_size=4)
    for module in (_C, cuda_library):
        if module is not None and module.__file__ is not None:
            digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def gpu_identity(index: int) -> str:
    """Name, capability, driver, CUDA runtime, cuDNN, Triton and build, as one line without tabs.

    Measured choices are kept under it, so another driver or build measures anew.

    Args:
        index: the GPU's number, as in ``torch.device``.
    """
    major, minor = torch.cuda.get_device_capability(index)
    facts = (
        f"{torch.cuda.get_device_name(index)} {major}.{minor}",
        f"driver {driver_version()}",
        f"cuda {torch.version.cuda}",
        f"cudnn {torch.backends.cudnn.version()}",
        f"triton {_triton_version()}",
        f"build {extension_hash()}",
    )
    return ", ".join(facts).replace("\t", " ")
