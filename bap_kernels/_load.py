"""Loads torch, then the compiled libraries; importing ``_C`` registers the operators.

``BAP_KERNELS_LIBRARY`` names another build of ``_C``, such as one with sanitizers.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import TYPE_CHECKING

# Before the extension, which finds torch's libraries already loaded.
import torch

if TYPE_CHECKING:
    from types import ModuleType

    from bap_kernels import _C

__all__ = ["_C", "why_not_cuda_library"]

_BUILD = "Hint: build it with `pip install -e . --no-build-isolation` or `python setup.py build_ext --inplace`."


def _load_file(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("bap_kernels._C", path)
    if spec is None or spec.loader is None or not os.path.isfile(path):
        raise ImportError(
            f"bap_kernels: expected `BAP_KERNELS_LIBRARY` to name a built extension, got {path!r}. {_BUILD}"
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def _load_library() -> ModuleType:
    path = os.environ.get("BAP_KERNELS_LIBRARY")
    try:
        return _load_file(path) if path else importlib.import_module("bap_kernels._C")
    except ModuleNotFoundError as error:
        if error.name != "bap_kernels._C":
            raise
        raise ImportError(f"bap_kernels: the compiled library bap_kernels._C is not built. {_BUILD}") from error
    except ImportError as error:
        if path and "BAP_KERNELS_LIBRARY" in str(error):
            raise
        raise ImportError(
            f"bap_kernels: the compiled library does not load with torch {torch.__version__}: {error}. "
            f"It was probably built against another torch. {_BUILD}"
        ) from error


def _load_cuda_library() -> str | None:
    """Loads ``_C_cuda`` where it is built; returns the reason where it is not there."""
    if importlib.util.find_spec("bap_kernels._C_cuda") is None:
        return "bap_kernels._C_cuda is not built"
    try:
        importlib.import_module("bap_kernels._C_cuda")
    except (ImportError, OSError) as error:
        return f"bap_kernels._C_cuda does not load: {error}"
    return None


if not TYPE_CHECKING:
    _C = _load_library()

why_not_cuda_library: str | None = _load_cuda_library()
