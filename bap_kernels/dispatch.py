"""The choice of a backend, what the backends need to run here, and the measured choices and packed weights kept."""

from __future__ import annotations

import importlib.util
import os
from types import TracebackType
from typing import Any

import torch

import bap_kernels._warn  # noqa: F401  issues the warnings of the C++ part
from bap_kernels._gpu import gpu_identity
from bap_kernels._load import _C, cuda_library_is_simulated, cuda_library_problem
from bap_kernels.settings import BACKENDS, MAX_BYTES, settings

__all__ = [
    "choices",
    "clear_choices",
    "clear_packed_cache",
    "interpreting",
    "packed_cache_info",
    "set_packed_cache_limit",
    "unsupported_reason",
    "use_backend",
    "use_winograd",
]

OLDEST_TRITON = (3, 6)


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors too: TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in text.split(".")[:2])


def _triton_unsupported_reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        # Deferred: importing Triton takes longer than the rest of the package.
        import triton
    except Exception as error:  # a broken installation raises whatever it raises
        return f"Triton does not load: {error}"
    if _version(triton.__version__) < OLDEST_TRITON:
        return f"Triton {triton.__version__} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    return None if interpreting() else _device_unsupported_reason()


def _cuda_unsupported_reason() -> str | None:
    if cuda_library_problem is not None:
        return cuda_library_problem
    return None if cuda_library_is_simulated else _device_unsupported_reason()


def _device_unsupported_reason() -> str | None:
    if torch.version.hip is not None:
        return "its kernels are for NVIDIA GPUs"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"the GPU has compute capability {major}.{minor}, its kernels need 8.0"
    return None


def _gpu_backend_unsupported_reason(backend: str) -> str:
    return (_cuda_unsupported_reason() if backend == "cuda" else _triton_unsupported_reason()) or ""


def unsupported_reason(backend: str) -> str | None:
    """Why a backend cannot run on this machine or is not built; None if it can run."""
    reason = _C.unsupported_reason(backend)
    return None if reason is None else reason.removeprefix(f"{backend}: ")


class use_backend:  # noqa: N801
    """Sets which backend computes in the calling thread, from now on; as a context manager, until the block ends.

    ``auto`` measures once per case and takes the fastest. ``heuristic`` measures nothing, so two runs on one machine
    have equal results: on CPUs it takes the native kernels where they cover a call, with Winograd's convolution where a
    rule of shapes says so; elsewhere PyTorch's. A named backend is used or an error says why it cannot be.

    As with grad mode and autocast, the setting belongs to one thread. A new thread begins with ``BAP_KERNELS_BACKEND``
    (``auto`` if it is not set), whatever the thread that started it has set; so do the workers of a ``DataLoader`` that
    are started as new processes, while forked ones begin with the setting of the thread that forks. A backward pass
    uses the backend of its forward, in whichever thread and block it runs.

    Args:
        name: ``"auto"``, ``"heuristic"``, ``"native"``, ``"aten"``, ``"triton"`` or ``"cuda"``.

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
        reason = unsupported_reason(name)
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


class use_winograd:  # noqa: N801
    """Sets whether ``auto`` may take Winograd convolutions in the calling thread.

    It holds from now on; as a context manager, until the block ends. They compute 3x3 convolutions of stride 1 on CPUs
    in float32 with 2.25 or 4 times fewer multiplications (Lavin and Gray, arXiv 1509.09308), and round otherwise: the
    page on CPU kernels states a bound. In inference ``auto`` takes them where they were measured to be faster, in
    training by a rule. A backend that is named takes none of them.

    The setting belongs to one thread, as that of :class:`use_backend` does. A new thread begins with
    ``BAP_KERNELS_WINOGRAD`` (allowed if it is not set). A backward pass uses the setting of its forward.

    Args:
        allowed: whether they may be taken.

    Raises:
        TypeError: if ``allowed`` is not a bool.

    Examples:
        >>> import bap_kernels as bk
        >>> import torch
        >>> x, weight = torch.randn(1, 64, 28, 28), torch.randn(64, 64, 3, 3)
        >>> with bk.use_winograd(False):
        ...     exact = bk.gathered_conv2d(x, weight, padding=1)
        >>> bool(((bk.gathered_conv2d(x, weight, padding=1) - exact).abs() < 1e-4 * exact.abs().max()).all())
        True
    """

    def __init__(self, allowed: bool = True) -> None:
        if not isinstance(allowed, bool):
            raise TypeError(f"use_winograd(): expected `allowed` to be a bool, got {allowed!r}.")
        self.allowed = allowed
        self._previous = _C.get_winograd()
        _C.set_winograd(allowed)

    def __enter__(self) -> use_winograd:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _C.set_winograd(self._previous)

    def __repr__(self) -> str:
        return f"use_winograd({self.allowed})"


def packed_cache_info() -> dict[str, int]:
    """Counts of the packed weights that layers in eval mode keep.

    Returns:
        ``bytes`` and ``entries`` now held, with all that belongs to them; ``limit_bytes``; and so far: ``hits``,
        ``misses``, ``evictions``, calls that ``compared`` a whole weight, and calls whose packed weights were
        ``not_kept``. The last two grow where :func:`bap_kernels.report` says so of a layer. ``pinned`` is the number of
        tensors, outside of the limit, that captured CUDA graphs read; they live as long as their weights.
    """
    return dict(_C.packed_cache_info())


def set_packed_cache_limit(limit_bytes: int) -> None:
    """Sets the most bytes of packed weights that are kept; the least recently used go first, and 0 keeps none.

    Raises:
        TypeError: if ``limit_bytes`` is not an integer.
        ValueError: if ``limit_bytes`` is negative or beyond 64 bits.
    """
    if not isinstance(limit_bytes, int) or isinstance(limit_bytes, bool):
        raise TypeError(f"set_packed_cache_limit(): expected `limit_bytes` to be an integer, got {limit_bytes!r}.")
    if not 0 <= limit_bytes <= MAX_BYTES:
        raise ValueError(
            f"set_packed_cache_limit(): expected `limit_bytes` to be 0 or more and less than 2**63, got {limit_bytes}."
        )
    _C.set_packed_cache_limit(limit_bytes)


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


def choices() -> list[dict[str, Any]]:
    """What ``auto`` has chosen so far, one dictionary for each case that it has measured.

    Returns:
        For each case, sorted by its text:

        - ``case``: dtype, layout, shapes, numbers of listed channels, and threads or the GPU; what begins with
          ``block`` is three convolutions of a plan, either in one pass (``bands``) or each by its own choice
          (``layers``);
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


if settings.isa is not None:
    _C.set_isa(settings.isa)
_C.set_unsupported_reason(_gpu_backend_unsupported_reason)
_C.set_gpu_hooks(gpu_identity, torch.cuda.is_current_stream_capturing)
_C.set_choice_file(str(settings.choice_file or settings.unusable_cache_dir), settings.cache_problem)
_C.set_packed_cache_limit(settings.packed_cache_bytes)
_C.set_default_packed_memory(settings.packed_memory)
_C.set_packed_memory(settings.packed_memory)
if not settings.winograd:
    _C.set_default_winograd(False)
    use_winograd(False)
if settings.backend != "auto":
    _C.set_default_backend(settings.backend)
    use_backend(settings.backend)
