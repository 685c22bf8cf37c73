"""The private ops ``bap_kernels::_*_triton``. Each takes a call: the op's arguments by the names in its schema."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from bap_kernels._load import _C
from bap_kernels.dispatch import interpreting
from bap_kernels.triton import mixed, ops, switched
from bap_kernels.triton.families import families_of_call
from bap_kernels.triton.launch import DualStore, Epilogue, Prologue

__all__ = [
    "families",
    "gathered_conv2d",
    "gathered_conv2d_backward",
    "gathered_conv2d_mixed",
    "switched_conv2d",
    "switched_conv2d_backward",
    "unsupported_reason",
]

Call = Any


def unsupported_reason(call: Call) -> str:
    """Why the kernels cannot run a call; empty if they can."""
    return ops.unsupported_reason(call.input, call.weight, call.groups, call.out_size, interpreting()) or ""


def families(call: Call) -> list[str]:
    """See :func:`bap_kernels.triton.families.families_of_call`."""
    options = (*_geometry(call), call.out_size)
    return families_of_call(
        call.op, call.grad_output, call.input, call.weight, call.in_indices, *options, call.output_mask
    )


def _refuse(op: str, call: Call, result: Tensor, groups: int) -> None:
    ops.refuse(op, ops.unsupported_reason(call.input, call.weight, groups, result.shape[2:], interpreting()))


def _geometry(call: Call) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    return call.stride, call.padding, call.dilation


def gathered_conv2d(call: Call) -> None:
    """See :func:`bap_kernels.triton.ops.gathered_conv2d`."""
    _refuse(call.op, call, call.out, call.groups)
    dual = None
    if call.dual_store is not None:
        with ops.on_device(call.input):
            dual = DualStore(call.dual_store, _C.inverse_list(call.dual_store_index, call.out.shape[1]))
    ops.gathered_conv2d(
        *(call.out, call.input, call.weight, call.in_index, call.out_index, *_geometry(call)),
        prologue=Prologue(call.in_scale, call.in_shift, call.in_relu),
        epilogue=Epilogue(call.bias, call.out_scale, call.out_shift, call.residual, call.out_relu, dual),
        packed=call.packed,
    )


def gathered_conv2d_mixed(call: Call) -> None:
    """See :func:`bap_kernels.triton.mixed.gathered_conv2d_mixed`."""
    _refuse("_gathered_conv2d_mixed", call, call.out, 1)
    mixed.gathered_conv2d_mixed(
        *(call.out, call.input, call.weight, call.bias, call.in_indices, call.counts, *_geometry(call)),
        packed=call.packed,
    )


def gathered_conv2d_backward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`bap_kernels.triton.ops.gathered_conv2d_backward`."""
    _refuse("gathered_conv2d_backward", call, call.grad_output, call.groups)
    return ops.gathered_conv2d_backward(
        *(call.grad_output, call.input, call.weight, call.in_index, call.out_index, *_geometry(call)), call.output_mask
    )


def switched_conv2d(call: Call) -> None:
    """See :func:`bap_kernels.triton.switched.switched_conv2d`."""
    _refuse("switched_conv2d", call, call.out, call.groups)
    switched.switched_conv2d(call.out, call.input, call.weight, call.bias, call.switch, *_geometry(call))


def switched_conv2d_backward(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`bap_kernels.triton.switched.switched_conv2d_backward`."""
    _refuse("switched_conv2d_backward", call, call.grad_output, call.groups)
    return switched.switched_conv2d_backward(
        *(call.grad_output, call.input, call.weight, call.switch, *_geometry(call)), call.off_gradient, call.output_mask
    )
