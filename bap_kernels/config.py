"""Settings: the environment variables, the choice of a backend, the packed weights and the measured choices kept."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from bap_kernels import (
    _dispatch,  # noqa: F401  knows why Triton cannot run
    _warn,  # noqa: F401  issues the warnings of the C++ part
)
from bap_kernels._load import _C
from bap_kernels._packed import triton_weights

__all__ = [
    "BACKENDS",
    "ENVIRONMENT",
    "Settings",
    "Variable",
    "choices",
    "clear_choices",
    "clear_packed_cache",
    "packed_cache_info",
    "read_environment",
    "set_packed_cache_limit",
    "settings",
    "use_backend",
    "why_not",
]

BACKENDS = ("auto", "native", "aten", "triton", "cuda")
ISAS = ("avx512", "avx2", "none", "avx512_emulated")
_MOST_BYTES = 2**63 - 1


@dataclass(frozen=True)
class Variable:
    """One environment variable: its name, its default as text, when it is read, and what it does."""

    name: str
    default: str
    read: str
    meaning: str


ENVIRONMENT = (
    Variable("BAP_KERNELS_ISA", "the best one here", "import", f"CPU kernels to use: {', '.join(ISAS)}"),
    Variable("BAP_KERNELS_BACKEND", "auto", "import", f"backend to start with: {', '.join(BACKENDS)}"),
    Variable("BAP_KERNELS_CACHE_DIR", "~/.cache/bap_kernels", "import", "folder of the measured choices; empty: none"),
    Variable("BAP_KERNELS_AUTOTUNE", "0", "import", "1: the Triton backend tunes each case at its first call"),
    Variable("BAP_KERNELS_PACKED_CACHE_BYTES", str(2**30), "import", "most bytes of packed weights kept; 0: keep none"),
    Variable(
        "BAP_KERNELS_LIBRARY", "", "import", "another build of bap_kernels._C to load, such as one with sanitizers"
    ),
    Variable(
        "BAP_KERNELS_CUDA_LIBRARY", "", "import", "another build of bap_kernels._C_cuda, such as the tests' simulation"
    ),
    Variable(
        "BAP_KERNELS_SIMULATED_PROCESSORS", "1", "call", "processors of that simulation: many make it take small tiles"
    ),
    Variable(
        "BAP_KERNELS_SIMULATED_WARPGROUPS", "0", "call", "whether that simulation has products of warpgroups: 0, 1"
    ),
    Variable("BAP_KERNELS_WITH_CUDA", "auto", "build", "build the CUDA library: 0, 1, auto"),
    Variable("BAP_KERNELS_MAX_JOBS", "one for each core", "build", "compilers run at once"),
    Variable("BAP_KERNELS_SANITIZE", "", "build", "sanitizers to build a second library with"),
)


@dataclass(frozen=True)
class Settings:
    """The environment, read once when the package is imported."""

    isa: str | None
    backend: str
    cache_dir: Path | None
    packed_cache_bytes: int
    autotune: bool = False
    cache_problem: str = ""  # why there is no cache_dir although one is wanted

    @property
    def choice_file(self) -> Path | None:
        """File of the measured choices of ``auto``; None keeps them in memory only."""
        return None if self.cache_dir is None else self.cache_dir / "choices-v5.tsv"


def _one_of(environment: Mapping[str, str], name: str, values: tuple[str, ...]) -> str | None:
    value = environment.get(name, "").strip().lower()
    if value and value not in values:
        raise ValueError(f"bap_kernels: expected `{name}` to be one of {', '.join(values)}, got {environment[name]!r}.")
    return value or None


def _cache_folder(text: str) -> tuple[Path | None, str]:
    """The folder that a setting names, or None and why it names none: in a container a user may have no home."""
    try:
        return (Path(text).expanduser() if text else None), ""
    except RuntimeError:
        return None, f"`{text}` has no home folder in front"


def read_environment(environment: Mapping[str, str] = os.environ) -> Settings:
    """Parses the variables that are read at import.

    Raises:
        ValueError: if a variable holds something else than :data:`ENVIRONMENT` allows.

    Examples:
        >>> from bap_kernels.config import read_environment
        >>> read_environment({"BAP_KERNELS_BACKEND": "aten"}).backend
        'aten'
    """
    name = "BAP_KERNELS_PACKED_CACHE_BYTES"
    text = environment.get(name, "").strip() or str(2**30)
    # int() alone would also take signs, underscores and digits of other scripts.
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= _MOST_BYTES):
        raise ValueError(
            f"bap_kernels: expected `{name}` to be a number of bytes, 0 or more and less than 2**63, got {text!r}."
        )
    processors = environment.get("BAP_KERNELS_SIMULATED_PROCESSORS", "").strip() or "1"
    if not (processors.isascii() and processors.isdigit() and len(processors) < 10 and int(processors) > 0):
        raise ValueError(
            "bap_kernels: expected `BAP_KERNELS_SIMULATED_PROCESSORS` to be a number, 1 or more and less than 10**9, "
            f"got {processors!r}."
        )
    _one_of(environment, "BAP_KERNELS_SIMULATED_WARPGROUPS", ("0", "1"))
    folder, problem = _cache_folder(environment.get("BAP_KERNELS_CACHE_DIR", "~/.cache/bap_kernels"))
    return Settings(
        isa=_one_of(environment, "BAP_KERNELS_ISA", ISAS),
        backend=_one_of(environment, "BAP_KERNELS_BACKEND", BACKENDS) or "auto",
        cache_dir=folder,
        packed_cache_bytes=int(text),
        autotune=_one_of(environment, "BAP_KERNELS_AUTOTUNE", ("0", "1")) == "1",
        cache_problem=problem,
    )


def why_not(backend: str) -> str | None:
    """Why a backend cannot run on this machine or is not built; None if it can run."""
    reason = _C.why_not(backend)
    return None if reason is None else reason.removeprefix(f"{backend}: ")


class use_backend:  # noqa: N801
    """Sets which backend computes in the calling thread, from now on; as a context manager, until the block ends.

    ``auto`` measures once per case and takes the fastest; a named backend is used or an error says why it cannot be.

    As with grad mode and autocast, the setting belongs to one thread. A new thread begins with ``BAP_KERNELS_BACKEND``
    (``auto`` if it is not set), whatever the thread that started it has set; so do the workers of a ``DataLoader`` that
    are started as new processes, while forked ones begin with the setting of the thread that forks. A backward pass
    uses the backend of its forward, in whichever thread and block it runs.

    Args:
        name: ``"auto"``, ``"native"``, ``"aten"``, ``"triton"`` or ``"cuda"``.

    Raises:
        ValueError: if there is no backend of that name.
        ImportError: if the backend cannot run on this machine or is not built; nothing is changed then.

    Examples:
        >>> import bap_kernels as bk
        >>> with bk.use_backend("aten"):
        ...     print(bk.info().backend)
        aten

        A thread that is started in the block has to set it again:

        >>> import threading
        >>> def work(seen):
        ...     seen.append(bk.info().backend)
        ...     with bk.use_backend("aten"):
        ...         seen.append(bk.info().backend)
        >>> seen = []
        >>> with bk.use_backend("aten"):
        ...     thread = threading.Thread(target=work, args=(seen,))
        ...     thread.start()
        ...     thread.join()
        >>> seen
        ['auto', 'aten']
    """

    def __init__(self, name: str) -> None:
        if name not in BACKENDS:
            raise ValueError(f"use_backend(): expected `name` to be one of {', '.join(BACKENDS)}, got {name!r}.")
        reason = why_not(name)
        if reason is not None:
            raise ImportError(
                f"use_backend(): expected `name` to be a backend that can run here, got {name!r}: {reason}. "
                "Hint: bap_kernels.info() lists every backend."
            )
        self.name = name
        self._previous = _C.get_backend()
        _C.set_backend(name)

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _C.set_backend(self._previous)

    def __repr__(self) -> str:
        return f"use_backend({self.name!r})"


def packed_cache_info() -> dict[str, int]:
    """Counts of the packed weights that layers in eval mode keep.

    Returns:
        ``bytes`` and ``entries`` now held, with all that belongs to them; ``limit_bytes``; and so far: ``hits``,
        ``misses``, ``evictions``, calls that ``compared`` a whole weight, and calls whose packed weights were
        ``not_kept``. The last two grow where :func:`bap_kernels.report` says so of a layer.
    """
    info = dict(_C.packed_cache_info())
    weights = triton_weights()
    if weights is not None:
        held, count = weights.held_bytes()
        info["bytes"] += held
        info["entries"] += count
    return info


def set_packed_cache_limit(limit_bytes: int) -> None:
    """Sets the most bytes of packed weights that are kept; the least recently used go first, and 0 keeps none.

    Raises:
        TypeError: if ``limit_bytes`` is not an integer.
        ValueError: if ``limit_bytes`` is negative or beyond 64 bits.
    """
    if not isinstance(limit_bytes, int) or isinstance(limit_bytes, bool):
        raise TypeError(f"set_packed_cache_limit(): expected `limit_bytes` to be an integer, got {limit_bytes!r}.")
    if not 0 <= limit_bytes <= _MOST_BYTES:
        raise ValueError(
            f"set_packed_cache_limit(): expected `limit_bytes` to be 0 or more and less than 2**63, got {limit_bytes}."
        )
    _C.set_packed_cache_limit(limit_bytes)
    weights = triton_weights()
    if weights is not None:
        weights.set_limit(limit_bytes)


def clear_packed_cache() -> None:
    """Drops all packed weights; they are packed again when next needed.

    Layers in eval mode keep packed weights and find out by themselves when the weight has changed. PyTorch counts most
    changes in the tensor's version; for the others

    - optimiser steps of every kind, :meth:`~torch.nn.Module.train`, :meth:`~torch.nn.Module.eval` and moves to another
      device or dtype drop what is kept, and another tensor, storage or address is seen;
    - a weight whose memory something else holds (a NumPy view, a shared or mapped file, another process, a state_dict
      or view that is kept, a flat vector of parameters), that was made in inference mode, or that autograd has tracked
      since, is compared whole; on GPUs nothing is kept of it (:func:`bap_kernels.report` names such layers);
    - in all other cases 16 to 256 of the listed values, spread over the weight, are compared at every call on CPUs.

    So this function is needed only after a write that left the version as it was (through ``weight.data``, a collective
    on parameters, a pointer, a NumPy view that is gone), in eval mode and without gradients since the last forward,
    and then only if it changed a small part of a weight on a CPU, or a weight on a GPU.
    """
    _C.clear_packed_cache()
    weights = triton_weights()
    if weights is not None:
        weights.clear()


def choices() -> list[dict[str, Any]]:
    """What ``auto`` has chosen so far, one dictionary for each case that it has measured.

    Returns:
        For each case, sorted by its text:

        - ``case``: dtype, layout, shapes, numbers of listed channels, and threads or the GPU;
        - ``backend``: the way that was chosen;
        - ``candidates``: microseconds of each way, the least of all measurements;
        - ``margin``: time of the next best way over that of the chosen one;
        - ``confidence``: from 0 to 1, the share of the interleaved rounds that the chosen one won against it, with one
          round more that it won and one that it lost, so that few rounds prove little;
        - ``measurements``: how often the case was measured, also by earlier processes;
        - ``settled``: whether it is measured again. It is while measurements do not agree or are close, a minute apart
          or more, within 2 % of the time in the case, and once more after a month.
    """
    return list(_C.choices())


def clear_choices() -> None:
    """Forgets what ``auto`` has measured; it measures again when next needed.

    The file that :func:`bap_kernels.info` names stays as it is: later processes read it, each case until it is measured
    again. Delete that file to forget its content too.
    """
    _C.clear_choices()


settings = read_environment()
if settings.cache_problem:
    _C.set_choice_file(os.environ.get("BAP_KERNELS_CACHE_DIR", "~/.cache/bap_kernels"), settings.cache_problem)
else:
    _C.set_choice_file(str(settings.choice_file or ""))
_C.set_packed_cache_limit(settings.packed_cache_bytes)
if settings.backend != "auto":
    _C.set_default_backend(settings.backend)
    use_backend(settings.backend)
