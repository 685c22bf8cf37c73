"""Operation counts for :class:`torch.utils.flop_counter.FlopCounterMode`: 2 for each product of kept channels.

A switch is data: channels that are on are counted by its values, and all of them where it has none (Meta and fake
tensors). A GPU, which does not read it, computes the products of all channels whatever is counted here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

import bap_kernels._load  # noqa: F401  registers the operators

__all__: list[str] = []

_Shape = Sequence[int]


def _products(input: _Shape, weight: _Shape, in_index: _Shape | None, groups: int, output: _Shape) -> int:
    K_in = input[1] if in_index is None else in_index[0]
    N, K_out, oH, oW = output
    return N * K_out * oH * oW * weight[2] * weight[3] * (K_in if groups == 1 else 1)


def _forward(
    input: _Shape,
    weight: _Shape,
    bias: _Shape | None,
    in_index: _Shape | None,
    out_index: _Shape | None,
    stride: _Shape,
    padding: _Shape,
    dilation: _Shape,
    groups: int,
    *args: Any,
    out_shape: _Shape,
    **kwargs: Any,
) -> int:
    return 2 * _products(input, weight, in_index, groups, out_shape)


register_flop_formula(torch.ops.bap_kernels.gathered_conv2d)(_forward)


@register_flop_formula(torch.ops.bap_kernels._gathered_conv2d_fused)
def _fused(*args: Any, out_shape: tuple[_Shape, _Shape | None], **kwargs: Any) -> int:
    return _forward(*args, out_shape=out_shape[0], **kwargs)


@register_flop_formula(torch.ops.bap_kernels.gathered_conv2d_backward)
def _backward(
    grad_output: _Shape,
    input: _Shape,
    weight: _Shape,
    in_index: _Shape | None,
    out_index: _Shape | None,
    stride: _Shape,
    padding: _Shape,
    dilation: _Shape,
    groups: int,
    output_mask: Sequence[bool],
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    # One product each for the gradients of input and weight; the bias needs none.
    return 2 * _products(input, weight, in_index, groups, grad_output) * (int(output_mask[0]) + int(output_mask[1]))


def _kept(switch: Tensor) -> int:
    if switch.is_meta or isinstance(switch, FakeTensor):
        return switch.shape[0]
    return int(switch.count_nonzero())


def _switched_products(weight: Tensor, result: Tensor, groups: int, channels: int) -> int:
    N, C_out, oH, oW = result.shape
    return N * oH * oW * weight.shape[2] * weight.shape[3] * channels * (C_out if groups == 1 else 1)


@register_flop_formula(torch.ops.bap_kernels.switched_conv2d, get_raw=True)
def _switched_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    switch: Tensor,
    stride: _Shape,
    padding: _Shape,
    dilation: _Shape,
    groups: int,
    *args: Any,
    out_val: Tensor,
    **kwargs: Any,
) -> int:
    return 2 * _switched_products(weight, out_val, groups, _kept(switch))


@register_flop_formula(torch.ops.bap_kernels.switched_conv2d_backward, get_raw=True)
def _switched_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    switch: Tensor,
    stride: _Shape,
    padding: _Shape,
    dilation: _Shape,
    groups: int,
    off_gradient: bool,
    output_mask: Sequence[bool],
    *args: Any,
    out_val: Any = None,
    **kwargs: Any,
) -> int:
    kept, (of_input, of_weight, _, of_switch) = _kept(switch), output_mask
    # The switch's gradient follows from that of input or weight where one of them is there.
    convolutions = int(of_input) + int(of_weight)
    channels = kept * (max(1, convolutions) if of_switch else convolutions)
    if of_switch and off_gradient:
        channels += switch.shape[0] - kept
    return 2 * _switched_products(weight, grad_output, groups, channels)


@register_flop_formula(torch.ops.bap_kernels._gathered_conv2d_mixed, get_raw=True)
def _mixed_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_indices: Sequence[Tensor | None],
    counts: Sequence[int],
    *args: Any,
    out_val: Tensor,
    **kwargs: Any,
) -> int:
    kept = sum(
        count * (weight.shape[1] if one is None else one.shape[0])
        for one, count in zip(in_indices, counts, strict=True)
    )
    _, C_out, oH, oW = out_val.shape
    return 2 * kept * C_out * oH * oW * weight.shape[2] * weight.shape[3]
