"""Families of the Triton kernels, which are verified apart: which there are, and which a call runs.

A family is ``triton/<kernel>/<math>``. The kernels ``switched`` and ``mixed`` are those of the plain op, with a count
of channels on the device or with a list for each run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bap_kernels.triton import ops
from bap_kernels.triton.launch_spec import Geometry, target_of
from bap_kernels.triton.lists import channel_list
from bap_kernels.triton.ops import Pair

__all__ = ["KERNELS", "families_of_call", "math_of"]

KERNELS = ("forward", "planar", "pack", "input_gradient", "weight_gradient", "switched", "mixed")
_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


def math_of(dtype: torch.dtype, device: torch.device) -> str:
    """The math mode of a call: ``float32``, ``tf32``, ``float16`` or ``bfloat16``."""
    if dtype in _DTYPES:
        return _DTYPES[dtype]
    return "tf32" if target_of(device).tf32 else "float32"


def _of_forward(
    input: Tensor,
    weight: Tensor,
    in_indices: Sequence[Tensor | None],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    out_size: Pair,
) -> set[str]:
    x, geometry = ops.geometry_of(input, weight, out_size, stride, padding, dilation)
    planar = ops.pointwise(geometry) and ops.is_planar(x) and geometry.batch < 2**16
    # Strides of an input with one channel or one pixel name both formats, and the result's may be either.
    if planar and not x.is_contiguous(memory_format=torch.channels_last):
        return {"planar"}
    kernels = {"forward", "planar"} if planar else {"forward"}
    lists = [channel_list(each, input.shape[1]) for each in in_indices]
    # Runs of a mixed batch go as blocks of the length that all have, or channel by channel.
    single = any(each.kind == 1 for each in lists) or len({each.kind for each in lists}) > 1
    copied = x.stride(1) != 1 or (single and (input.dtype.itemsize < 4 or geometry.taps > 1))
    return kernels | {"pack"} if copied else kernels


def _of_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    in_index: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    mask: Sequence[bool],
    planes: bool,
) -> set[str]:
    kernels = set()
    kernel, size, out_size = (tuple(t.shape[2:]) for t in (weight, input, grad))
    options = (tuple(stride), (padding[0], padding[2]), tuple(dilation))
    geometry = Geometry(input.shape[0], size, out_size, kernel, *options)  # type: ignore[arg-type]
    if mask[0]:
        like_input = torch.empty_like(input, device="meta")
        planar = planes and ops.pointwise(geometry) and ops.is_planar(grad) and ops.is_planar(like_input)
        kernels.add("planar" if planar else "input_gradient")
        if not planar and grad.stride(1) != 1:
            kernels.add("pack")
    if mask[1]:
        kernels.add("weight_gradient")
        in_list = channel_list(in_index, input.shape[1])
        if grad.stride(1) != 1 or in_list.kind == 1 or input.stride(1) != 1:
            kernels.add("pack")
    return kernels


def families_of_call(
    op: str,
    grad_output: Tensor | None,
    input: Tensor,
    weight: Tensor,
    in_indices: Sequence[Tensor | None],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    out_size: Pair,
    output_mask: Sequence[bool],
) -> list[str]:
    """The families that a call may launch, sorted; none where ATen alone computes what is asked for.

    Args:
        op: its name. Those that are switched or mixed launch a family of that name, and those of the plain op.
        grad_output: of a backward.
        in_indices: one list, or one for each run of a mixed batch. A list on a GPU is read once, as the launch does.
        out_size: (oH, oW).
        output_mask: which gradients a backward is asked for.
    """
    switched = op.startswith("switched")
    if switched:
        # All channels, in an order that the device alone knows.
        in_indices = [torch.arange(input.shape[1], dtype=torch.int32).flip(0)]
    if grad_output is None:
        kernels = _of_forward(input, weight, in_indices, stride, padding, dilation, out_size)
    else:
        mask = output_mask if not switched else (output_mask[0] or output_mask[3], *output_mask[1:])
        options = (stride, padding, dilation, mask)
        kernels = _of_backward(grad_output, input, weight, in_indices[0], *options, planes=not switched)
    if kernels:
        kernels |= {"switched"} if switched else {"mixed"} if "mixed" in op else set()
    math = math_of(input.dtype, input.device)
    return sorted(f"triton/{kernel}/{math}" for kernel in kernels)
