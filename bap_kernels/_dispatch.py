"""When the GPU's backends can run, and the private ops through which calls reach those that are Python.

The C++ kernels of the ops ask for the backend that the caller named and call ``bap_kernels::_*_triton`` for Triton;
on CUDA ``auto`` weighs ATen's ways alone, until results from a GPU show that the kernels are right. Triton and the
kernels are imported at the first call that needs them.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from bap_kernels._load import _C, cuda_library_is_simulated, why_not_cuda_library

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LEAST_TRITON", "interpreting", "why_not_cuda", "why_not_triton"]

LEAST_TRITON = (3, 6)


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors too: TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in text.split(".")[:2])


def why_not_triton() -> str | None:
    """Why the Triton backend cannot run here; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        import triton
    except Exception as error:  # a broken installation raises whatever it raises
        return f"Triton does not load: {error}"
    if _version(triton.__version__) < LEAST_TRITON:
        return f"Triton {triton.__version__} is older than {'.'.join(map(str, LEAST_TRITON))}"
    if interpreting():
        return None
    return _why_not_device()


def why_not_cuda() -> str | None:
    """Why the CUDA C++ backend cannot run here; None if it can."""
    if why_not_cuda_library is not None:
        return why_not_cuda_library
    return None if cuda_library_is_simulated else _why_not_device()


def _why_not_device() -> str | None:
    if torch.version.hip is not None:
        return "its kernels are for NVIDIA GPUs"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"the GPU has compute capability {major}.{minor}, its kernels need 8.0"
    return None


def _reason(backend: str) -> str:
    return (why_not_cuda() if backend == "cuda" else why_not_triton()) or ""


def _why_not(input: Tensor, weight: Tensor, groups: int, out_size: Sequence[int]) -> str:
    from bap_kernels.triton import ops

    return ops.why_not(input, weight, groups, out_size, interpreting()) or ""


def _refuse(op: str, input: Tensor, weight: Tensor, groups: int, out_size: Sequence[int]) -> None:
    from bap_kernels.triton import ops

    ops.refuse(op, ops.why_not(input, weight, groups, out_size, interpreting()))


def _gathered_conv2d(
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_index: Tensor | None,
    out_index: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    in_relu: bool,
    out_scale: Tensor | None,
    out_shift: Tensor | None,
    residual: Tensor | None,
    out_relu: bool,
    cache_packed: bool,
    weight_index: Tensor | None,
    copy: Tensor | None,
    copy_index: Tensor | None,
    op: str,
) -> None:
    from bap_kernels.triton import ops
    from bap_kernels.triton.launch import Copy, Epilogue, Prologue
    from bap_kernels.triton.lists import places_of

    _refuse(op, input, weight, groups, out.shape[2:])
    second = None
    if copy is not None and copy_index is not None:
        with ops.on_device(input):
            second = Copy(copy, places_of(copy_index, out.shape[1]))
    ops.gathered_conv2d(
        *(out, input, weight, in_index, out_index, stride, padding, dilation),
        prologue=Prologue(in_scale, in_shift, in_relu),
        epilogue=Epilogue(bias, out_scale, out_shift, residual, out_relu, second),
        cache_packed=cache_packed,
        weight_index=weight_index,
    )


def _gathered_conv2d_mixed(
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_indices: Sequence[Tensor | None],
    counts: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    cache_packed: bool,
) -> None:
    from bap_kernels.triton import mixed

    _refuse("_gathered_conv2d_mixed", input, weight, 1, out.shape[2:])
    mixed.gathered_conv2d_mixed(
        out, input, weight, bias, in_indices, counts, stride, padding, dilation, cache_packed=cache_packed
    )


def _gathered_conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    in_index: Tensor | None,
    out_index: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    from bap_kernels.triton import ops

    _refuse("gathered_conv2d_backward", input, weight, groups, grad_output.shape[2:])
    return ops.gathered_conv2d_backward(
        grad_output, input, weight, in_index, out_index, stride, padding, dilation, output_mask
    )


def _switched_conv2d(
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    switch: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    from bap_kernels.triton import switched

    _refuse("switched_conv2d", input, weight, groups, out.shape[2:])
    switched.switched_conv2d(out, input, weight, bias, switch, stride, padding, dilation)


def _switched_conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    switch: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    off_gradient: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from bap_kernels.triton import switched

    _refuse("switched_conv2d_backward", input, weight, groups, grad_output.shape[2:])
    return switched.switched_conv2d_backward(
        grad_output, input, weight, switch, stride, padding, dilation, off_gradient, output_mask
    )


_library = torch.library.Library("bap_kernels", "IMPL")
for _key in ("CUDA", "CPU"):
    _library.impl("_triton_why_not", _why_not, _key)
    _library.impl("_gathered_conv2d_triton", _gathered_conv2d, _key)
    _library.impl("_gathered_conv2d_mixed_triton", _gathered_conv2d_mixed, _key)
    _library.impl("_gathered_conv2d_backward_triton", _gathered_conv2d_backward, _key)
    _library.impl("_switched_conv2d_triton", _switched_conv2d, _key)
    _library.impl("_switched_conv2d_backward_triton", _switched_conv2d_backward, _key)
_C.set_why_not(_reason)
_C.set_cuda_facts(torch.cuda.get_device_name, torch.cuda.is_current_stream_capturing)
