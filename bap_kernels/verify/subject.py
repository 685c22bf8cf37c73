"""A device whose kernels are verified, as the verifier's own process sees it, without computing on it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bap_kernels import _load, dispatch
from bap_kernels._load import _C
from bap_kernels.verify.families import MATHS, TRITON_KERNELS, ordered

__all__ = ["Subject", "cuda_problem", "cuda_subject"]

_PACKAGE = Path(__file__).resolve().parents[1]
_JOB_BYTES = 3 * 2**29  # a CUDA context, its code, and the tensors of a child


@dataclass(frozen=True)
class Subject:
    """A device to verify.

    Args:
        index: its number in this process, as in ``cuda:0``.
        facts: what its verdicts hold for, by name: the key of the store.
        families: those that it can run, the most wanted first.
        environment: variables by which a child sees this device and no other.
        device: "module:name" of what a child computes on; see :mod:`bap_kernels.verify.device`.
        checks: "module:name" of a child's cases; see :mod:`bap_kernels.verify.cases`.
        jobs: children that its memory has room for.
    """

    index: int
    facts: Mapping[str, str]
    families: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    device: str = "bap_kernels.verify.device:CudaDevice"
    checks: str = "bap_kernels.verify.cases:checks"
    jobs: int = 8

    @property
    def name(self) -> str:
        """The device's name."""
        return self.facts.get("gpu", "device")


def cuda_problem() -> str | None:
    """Why there is no device to verify; None if there is one."""
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return None


def _driver() -> str:
    """The driver's version as its makers count it, or what CUDA version it is for."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
        match = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
        if match:
            return match[1]
    except OSError:
        pass
    try:
        # Where the kernel module is not to be seen, as in WSL.
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        version = ctypes.create_string_buffer(96)
        if nvml.nvmlInit_v2() == 0 and nvml.nvmlSystemGetDriverVersion(version, ctypes.c_uint(96)) == 0:
            return version.value.decode(errors="replace")
    except (OSError, AttributeError):
        pass
    number = torch._C._cuda_getDriverVersion() if hasattr(torch._C, "_cuda_getDriverVersion") else 0
    return f"for CUDA {number // 1000}.{number % 1000 // 10}"


def hash_of(paths: Iterable[Path]) -> str:
    """One short hash of the contents of files."""
    digest = hashlib.blake2b(digest_size=12)
    for path in sorted(paths):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)} ".encode())
        digest.update(content)
    return digest.hexdigest()


@functools.cache
def build_facts() -> dict[str, str]:
    """What verdicts depend on besides the device and its driver."""
    libraries = [getattr(module, "__file__", None) for module in (_C, _load.cuda_library)]
    sources = [*_PACKAGE.glob("triton/*.py"), *_PACKAGE.glob("testing*.py")]
    sources += [_PACKAGE / "verify" / name for name in ("cases.py", "device.py", "exercise.py", "guards.py")]
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return {
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": triton,
        "extension": hash_of(Path(each) for each in libraries if each),
        "triton sources": hash_of(sources),
    }


def _visible(index: int, uuid: str, name: str) -> str:
    """What CUDA_VISIBLE_DEVICES has to say for a child to see this device alone."""
    listed = [each.strip() for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    if index < len(listed) and listed[index].startswith(("MIG-", "GPU-")):
        return listed[index]
    return f"{'MIG' if ' MIG ' in name else 'GPU'}-{uuid.removeprefix('GPU-')}"


def cuda_families(capability: tuple[int, int]) -> tuple[str, ...]:
    """The families that this installation has for a device."""
    families = [] if dispatch.unsupported_reason("cuda") else list(_C.cuda_families())
    if capability != (9, 0):
        families = [family for family in families if "/wgmma" not in family]
    if dispatch.unsupported_reason("triton") is None:
        families += [f"triton/{kernel}/{math}" for kernel in TRITON_KERNELS for math in MATHS]
    return ordered(families)


def cuda_subject(index: int) -> Subject:
    """The CUDA device of this number. Makes no context on it."""
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    facts = {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "driver": _driver(),
        **build_facts(),
    }
    environment = {"CUDA_VISIBLE_DEVICES": _visible(index, str(properties.uuid), properties.name)}
    jobs = max(1, min(16, int(properties.total_memory // (4 * _JOB_BYTES))))
    return Subject(index, facts, cuda_families(capability), environment, jobs=jobs)
