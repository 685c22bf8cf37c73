"""Operation counts for :class:`torch.utils.flop_counter.FlopCounterMode`: 2 for each product of kept channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import bap_kernels._load  # noqa: F401  registers the operators

__all__: list[str] = []

_Shape = Sequence[int]


def _products(input: _Shape, weight: _Shape, in_index: _Shape | None, groups: int, output: _Shape) -> int:
    K_in = input[1] if in_index is None else in_index[0]
    N, K_out, oH, oW = output
    return N * K_out * oH * oW * weight[2] * weight[3] * (K_in if groups == 1 else 1)


@register_flop_formula([torch.ops.bap_kernels.gathered_conv2d, torch.ops.bap_kernels._gathered_conv2d_fused])
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
