"""Loads torch, then the compiled libraries; importing ``_C`` registers the operators.

``BAP_KERNELS_LIBRARY`` names another build of ``_C``, such as one with sanitizers; ``BAP_KERNELS_CUDA_LIBRARY`` one of
``_C_cuda``, such as the one that tests execute on CPU tensors.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from pathlib import Path
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


def _minor(version: str) -> list[str]:
    return version.split("+")[0].split(".")[:2]


def _built_with(file: Path) -> str | None:
    """The torch that a library names in its file, for libraries that do not load."""
    try:
        match = re.search(rb"bap_kernels was built with torch ([\w.+]+)", file.read_bytes())
    except OSError:
        return None
    return match.group(1).decode() if match else None


def _other_torch(built: str) -> ImportError:
    minor = ".".join(_minor(built))
    return ImportError(
        f"bap_kernels: expected torch {minor}, which the compiled library was built with ({built}), got torch "
        f"{torch.__version__}. Hint: install a wheel of bap_kernels for this torch, torch=={minor}.*, or build "
        "again with `pip install . --no-build-isolation` or `python setup.py build_ext --inplace`."
    )


def _not_built() -> ImportError:
    python = sys.implementation.cache_tag
    files = sorted(file.name for file in Path(__file__).parent.glob("_C.*.so"))
    if files and not any(python in name for name in files):
        return ImportError(
            f"bap_kernels: expected the compiled library for {python}, got {', '.join(files)} alone. {_BUILD}"
        )
    return ImportError(f"bap_kernels: the compiled library bap_kernels._C is not built. {_BUILD}")


def _import_library(path: str) -> ModuleType:
    if path:
        return _load_file(path, "bap_kernels._C", "BAP_KERNELS_LIBRARY")
    return importlib.import_module("bap_kernels._C")


def _load_library(path: str) -> ModuleType:
    try:
        library = _import_library(path)
    except ModuleNotFoundError as error:
        if error.name != "bap_kernels._C":
            raise
        raise _not_built() from error
    except ImportError as error:
        if path and "BAP_KERNELS_LIBRARY" in str(error):
            raise
        spec = None if path else importlib.util.find_spec("bap_kernels._C")
        built = _built_with(Path(path or (spec and spec.origin) or ""))
        if built is not None and _minor(built) != _minor(torch.__version__):
            raise _other_torch(built) from error
        raise ImportError(
            f"bap_kernels: the compiled library does not load with torch {torch.__version__}: {error}. "
            f"It was probably built against another torch. {_BUILD}"
        ) from error
    built = library.build_info()["torch"]
    # Some libraries load with another torch, whose classes may be laid out otherwise.
    if _minor(built) != _minor(torch.__version__):
        raise _other_torch(built)
    return library


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
