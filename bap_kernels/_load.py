"""Loads torch, then the compiled libraries; importing ``_C`` registers the operators.

``BAP_KERNELS_LIBRARY`` names another build of ``_C``, such as one with sanitizers; ``BAP_KERNELS_CUDA_LIBRARY`` one of
``_C_cuda``, such as the simulation that tests run on CPU tensors.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import TYPE_CHECKING

# Before the extension, which finds torch's libraries already loaded.
import torch

from bap_kernels.settings import settings

if TYPE_CHECKING:
    from types import ModuleType

    from bap_kernels import _C

__all__ = ["_C", "cuda_library", "cuda_library_is_simulated", "cuda_library_problem"]

_BUILD = "Hint: build it with `pip install -e . --no-build-isolation` or `python setup.py build_ext --inplace`."


def _load_file(path: str, name: str, variable: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not os.path.isfile(path):
        raise ImportError(f"bap_kernels: expected `{variable}` to name a built extension, got {path!r}. {_BUILD}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def _load_library(path: str) -> ModuleType:
    try:
        if path:
            return _load_file(path, "bap_kernels._C", "BAP_KERNELS_LIBRARY")
        return importlib.import_module("bap_kernels._C")
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


def _load_cuda_library(path: str) -> tuple[ModuleType | None, str | None]:
    """Loads ``_C_cuda`` where it is built; returns it, or the reason where it is not there."""
    if path:
        return _load_file(path, "bap_kernels._C_cuda", "BAP_KERNELS_CUDA_LIBRARY"), None
    if importlib.util.find_spec("bap_kernels._C_cuda") is None:
        return None, "bap_kernels._C_cuda is not built"
    try:
        return importlib.import_module("bap_kernels._C_cuda"), None
    except (ImportError, OSError) as error:
        return None, f"bap_kernels._C_cuda does not load: {error}"


if not TYPE_CHECKING:
    _C = _load_library(settings.library)

cuda_library, cuda_library_problem = _load_cuda_library(settings.cuda_library)
cuda_library_is_simulated = False
if cuda_library is not None:
    try:
        cuda_library_is_simulated = _C.set_cuda_launcher(cuda_library.launcher)
    except (AttributeError, RuntimeError) as error:
        cuda_library_problem = f"bap_kernels._C_cuda does not fit: {str(error).splitlines()[0]}. {_BUILD}"
