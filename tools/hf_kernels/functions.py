"""Convolutions that read and compute listed channels only, as functions on the Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bap_kernels.triton import ops, switched
from bap_kernels.triton.launch import Epilogue
from tools.hf_kernels import torch_only
from tools.hf_kernels._ops import add_op_namespace_prefix

__all__ = ["gathered_conv2d", "switched_conv2d"]

_ARGUMENTS = "int[] stride, int[] padding, int[] dilation"


def _pair(op: str, name: str, value: int | Sequence[int], least: int) -> list[int]:
    pair = [value, value] if isinstance(value, int) else list(value)
    if len(pair) != 2 or any(not isinstance(each, int) or each < least for each in pair):
        raise ValueError(f"{op}(): expected `{name}` to be one or two integers of at least {least}, got {value!r}.")
    return pair


def _sides(padding: Sequence[int]) -> list[int]:
    return [padding[0], padding[0], padding[1], padding[1]]


def _out_size(
    input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    return [
        (input.shape[2 + d] + 2 * padding[d] - dilation[d] * (weight.shape[2 + d] - 1) - 1) // stride[d] + 1
        for d in (0, 1)
    ]


def _check(
    op: str,
    input: Tensor,
    weight: Tensor,
    vectors: dict[str, tuple[Tensor | None, int, torch.dtype]],
    options: tuple[list[int], ...],
) -> None:
    for name, tensor in (("input", input), ("weight", weight)):
        if tensor.dim() != 4:
            raise ValueError(f"{op}(): expected `{name}` to have 4 axes, got {tensor.dim()}.")
    if weight.shape[1] != input.shape[1]:
        raise ValueError(f"{op}(): expected `weight` to read {input.shape[1]} channels, got {weight.shape[1]}.")
    if weight.dtype != input.dtype or weight.device != input.device:
        raise TypeError(
            f"{op}(): expected `weight` to be {input.dtype} on {input.device}, got {weight.dtype} on {weight.device}."
        )
    for name, (vector, length, dtype) in vectors.items():
        if vector is None:
            continue
        if vector.dtype != dtype or vector.device != input.device:
            raise TypeError(
                f"{op}(): expected `{name}` to be {dtype} on {input.device}, got {vector.dtype} on {vector.device}."
            )
        if vector.dim() != 1 or (length >= 0 and vector.shape[0] != length):
            rule = "one axis" if length < 0 else f"shape ({length},)"
            raise ValueError(f"{op}(): expected `{name}` to have {rule}, got shape {tuple(vector.shape)}.")
    size = _out_size(input, weight, *options)
    if min(size) < 1:
        raise ValueError(f"{op}(): expected a result of at least one pixel, got {size}.")
    ops.refuse(op, ops.unsupported_reason(input, weight, 1, size, torch_only.interpreting()))


def _result(input: Tensor, weight: Tensor, channels: int, options: tuple[Sequence[int], ...]) -> Tensor:
    channels_last = input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
    return torch.empty(
        (input.shape[0], channels, *_out_size(input, weight, *options)),
        dtype=input.dtype,
        device=input.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


def _gradients(mask: Sequence[bool], like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(each) if wanted else each.new_empty((0,)) for wanted, each in zip(mask, like)]  # noqa: B905


@torch.library.custom_op(
    add_op_namespace_prefix("gathered_conv2d"),
    mutates_args=(),
    schema=f"(Tensor input, Tensor weight, Tensor? bias, Tensor? in_index, Tensor? out_index, {_ARGUMENTS}) -> Tensor",
)
def _gathered(input, weight, bias, in_index, out_index, stride, padding, dilation):  # type: ignore[no-untyped-def]
    torch_only.check_list("gathered_conv2d", "in_index", in_index, input.shape[1])
    torch_only.check_list("gathered_conv2d", "out_index", out_index, weight.shape[0])
    kept = weight.shape[0] if out_index is None else out_index.shape[0]
    out = _result(input, weight, kept, (stride, padding, dilation))
    if out.numel():
        ops.gathered_conv2d(
            *(out, input, weight, in_index, out_index, stride, _sides(padding), dilation), epilogue=Epilogue(bias)
        )
    return out


@_gathered.register_fake
def _(input, weight, bias, in_index, out_index, stride, padding, dilation):  # type: ignore[no-untyped-def]
    kept = weight.shape[0] if out_index is None else out_index.shape[0]
    return _result(input, weight, kept, (stride, padding, dilation))


@torch.library.custom_op(
    add_op_namespace_prefix("gathered_conv2d_backward"),
    mutates_args=(),
    schema="(Tensor grad, Tensor input, Tensor weight, Tensor? in_index, Tensor? out_index, "
    f"{_ARGUMENTS}, bool[] mask) -> (Tensor, Tensor, Tensor)",
)
def _gathered_backward(grad, input, weight, in_index, out_index, stride, padding, dilation, mask):  # type: ignore[no-untyped-def]
    return ops.gathered_conv2d_backward(
        grad, input, weight, in_index, out_index, stride, _sides(padding), dilation, mask
    )


@_gathered_backward.register_fake
def _(grad, input, weight, in_index, out_index, stride, padding, dilation, mask):  # type: ignore[no-untyped-def]
    return tuple(_gradients(mask, (input, weight, input.new_empty(weight.shape[0]))))


def _gathered_setup(ctx: Any, inputs: Any, output: Any) -> None:
    input, weight, _, in_index, out_index, *ctx.options = inputs
    ctx.save_for_backward(input, weight, in_index, out_index)


def _gathered_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    wanted = list(ctx.needs_input_grad[:3])
    computed = _gathered_backward(grad, *ctx.saved_tensors, *ctx.options, wanted)
    gradients = [each if want else None for each, want in zip(computed, wanted)]  # noqa: B905
    return (*gradients, None, None, None, None, None)


_gathered.register_autograd(_gathered_autograd, setup_context=_gathered_setup)


@torch.library.custom_op(
    add_op_namespace_prefix("switched_conv2d"),
    mutates_args=(),
    schema=f"(Tensor input, Tensor weight, Tensor? bias, Tensor switch, {_ARGUMENTS}) -> Tensor",
)
def _switched(input, weight, bias, switch, stride, padding, dilation):  # type: ignore[no-untyped-def]
    out = _result(input, weight, weight.shape[0], (stride, padding, dilation))
    if out.numel():
        switched.switched_conv2d(out, input, weight, bias, switch, stride, _sides(padding), dilation)
    return out


@_switched.register_fake
def _(input, weight, bias, switch, stride, padding, dilation):  # type: ignore[no-untyped-def]
    return _result(input, weight, weight.shape[0], (stride, padding, dilation))


@torch.library.custom_op(
    add_op_namespace_prefix("switched_conv2d_backward"),
    mutates_args=(),
    schema=f"(Tensor grad, Tensor input, Tensor weight, Tensor switch, {_ARGUMENTS}, bool[] mask) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _switched_backward(grad, input, weight, switch, stride, padding, dilation, mask):  # type: ignore[no-untyped-def]
    return switched.switched_conv2d_backward(grad, input, weight, switch, stride, _sides(padding), dilation, True, mask)


@_switched_backward.register_fake
def _(grad, input, weight, switch, stride, padding, dilation, mask):  # type: ignore[no-untyped-def]
    return tuple(_gradients(mask, (input, weight, input.new_empty(weight.shape[0]), switch)))


def _switched_setup(ctx: Any, inputs: Any, output: Any) -> None:
    input, weight, _, switch, *ctx.options = inputs
    ctx.save_for_backward(input, weight, switch)


def _switched_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    wanted = list(ctx.needs_input_grad[:4])
    computed = _switched_backward(grad, *ctx.saved_tensors, *ctx.options, wanted)
    gradients = [each if want else None for each, want in zip(computed, wanted)]  # noqa: B905
    return (*gradients, None, None, None)


_switched.register_autograd(_switched_autograd, setup_context=_switched_setup)


def gathered_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    in_index: Tensor | None = None,
    out_index: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """``F.conv2d`` that reads the channels of ``in_index`` and computes the filters of ``out_index`` only.

    Differentiable in input, weight and bias, whose gradients are zero where nothing is listed.

    Args:
        input: (N, C_in, H, W), float32, float16 or bfloat16, on a GPU; any strides.
        weight: (C_out, C_in, kH, kW), full-size.
        bias: (C_out,), full-size, or None.
        in_index: int32, (K_in,), distinct; None for all channels. It must not be changed after its first use.
        out_index: int32, (K_out,), likewise.
        stride, padding, dilation: an int or a pair.

    Returns:
        (N, K_out, oH, oW), in the memory format of the input.

    Raises:
        TypeError: for dtypes and devices that do not fit each other.
        ValueError: for shapes and options that do not fit, and channels that are listed twice.
        IndexError: for channels that are not there.
        NotImplementedError: for what the kernels cannot run.
    """
    op = "gathered_conv2d"
    options = (_pair(op, "stride", stride, 1), _pair(op, "padding", padding, 0), _pair(op, "dilation", dilation, 1))
    vectors = {
        "bias": (bias, weight.shape[0], input.dtype),
        "in_index": (in_index, -1, torch.int32),
        "out_index": (out_index, -1, torch.int32),
    }
    _check(op, input, weight, vectors, options)
    return _gathered(input, weight, bias, in_index, out_index, *options)


def switched_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    switch: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """``F.conv2d(input * switch, ...)`` that reads the channels that are on; differentiable in the switch, too.

    Args:
        input, weight, bias, stride, padding, dilation: as for :func:`gathered_conv2d`.
        switch: (C_in,), float32, zeros and ones, which are not checked. Its gradient is that of every channel.

    Returns:
        (N, C_out, oH, oW), in the memory format of the input.

    Raises:
        TypeError: for dtypes and devices that do not fit each other.
        ValueError: for shapes and options that do not fit.
        NotImplementedError: for what the kernels cannot run.
    """
    op = "switched_conv2d"
    options = (_pair(op, "stride", stride, 1), _pair(op, "padding", padding, 0), _pair(op, "dilation", dilation, 1))
    vectors = {
        "bias": (bias, weight.shape[0], input.dtype),
        "switch": (switch, input.shape[1], torch.float32),
    }
    _check(op, input, weight, vectors, options)
    return _switched(input, weight, bias, switch, *options)
