"""The private ops ``bap_kernels::_*_triton``, with their arguments as the dispatcher passes them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bap_kernels.dispatch import interpreting
from bap_kernels.triton import mixed, ops, switched
from bap_kernels.triton.families import families_of_call
from bap_kernels.triton.launch import DualStore, Epilogue, Prologue
from bap_kernels.triton.lists import inverse_list

__all__ = [
    "families",
    "gathered_conv2d",
    "gathered_conv2d_backward",
    "gathered_conv2d_mixed",
    "switched_conv2d",
    "switched_conv2d_backward",
    "unsupported_reason",
]


def unsupported_reason(input: Tensor, weight: Tensor, groups: int, out_size: Sequence[int]) -> str:
    """Why the kernels cannot run a call; empty if they can."""
    return ops.unsupported_reason(input, weight, groups, out_size, interpreting()) or ""


def families(
    op: str,
    grad_output: Tensor | None,
    input: Tensor,
    weight: Tensor,
    in_indices: Sequence[Tensor | None],
    out_index: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out_size: Sequence[int],
    prologue: bool,
    output_mask: Sequence[bool],
) -> list[str]:
    """See :func:`bap_kernels.triton.families.families_of_call`."""
    options = (stride, padding, dilation, out_size)
    return families_of_call(op, grad_output, input, weight, in_indices, *options, output_mask)


def _refuse(op: str, input: Tensor, weight: Tensor, groups: int, out_size: Sequence[int]) -> None:
    ops.refuse(op, ops.unsupported_reason(input, weight, groups, out_size, interpreting()))


def gathered_conv2d(
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
    dual_store_index: Tensor | None,
    dual_store: Tensor | None,
    op: str,
) -> None:
    """See :func:`bap_kernels.triton.ops.gathered_conv2d`."""
    _refuse(op, input, weight, groups, out.shape[2:])
    second = None
    if dual_store is not None and dual_store_index is not None:
        with ops.on_device(input):
            second = DualStore(dual_store, inverse_list(dual_store_index, out.shape[1]))
    ops.gathered_conv2d(
        *(out, input, weight, in_index, out_index, stride, padding, dilation),
        prologue=Prologue(in_scale, in_shift, in_relu),
        epilogue=Epilogue(bias, out_scale, out_shift, residual, out_relu, second),
        cache_packed=cache_packed,
        weight_index=weight_index,
    )


def gathered_conv2d_mixed(
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
    """See :func:`bap_kernels.triton.mixed.gathered_conv2d_mixed`."""
    _refuse("_gathered_conv2d_mixed", input, weight, 1, out.shape[2:])
    mixed.gathered_conv2d_mixed(
        out, input, weight, bias, in_indices, counts, stride, padding, dilation, cache_packed=cache_packed
    )


def gathered_conv2d_backward(
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
    """See :func:`bap_kernels.triton.ops.gathered_conv2d_backward`."""
    _refuse("gathered_conv2d_backward", input, weight, groups, grad_output.shape[2:])
    return ops.gathered_conv2d_backward(
        grad_output, input, weight, in_index, out_index, stride, padding, dilation, output_mask
    )


def switched_conv2d(
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
    """See :func:`bap_kernels.triton.switched.switched_conv2d`."""
    _refuse("switched_conv2d", input, weight, groups, out.shape[2:])
    switched.switched_conv2d(out, input, weight, bias, switch, stride, padding, dilation)


def switched_conv2d_backward(
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
    """See :func:`bap_kernels.triton.switched.switched_conv2d_backward`."""
    _refuse("switched_conv2d_backward", input, weight, groups, grad_output.shape[2:])
    return switched.switched_conv2d_backward(
        grad_output, input, weight, switch, stride, padding, dilation, off_gradient, output_mask
    )
