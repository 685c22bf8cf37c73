"""The switched convolution: a switch becomes a list and a count on the device, so that no call waits for it.

The list holds all channels, those that are on first; the kernels stop at the count.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bap_kernels._load import _C
from bap_kernels.triton import launch_backward, ops
from bap_kernels.triton.configs import choose
from bap_kernels.triton.launch import Epilogue
from bap_kernels.triton.launch_spec import Geometry, Launch, target_of
from bap_kernels.triton.lists import ChannelList
from bap_kernels.triton.ops import Pair
from bap_kernels.triton.tuning import tune_case

__all__ = ["switched_conv2d", "switched_conv2d_backward"]


def _listed(switch: Tensor) -> tuple[Tensor, Tensor]:
    """All channels, those that are on first, in increasing order each, int32; and how many are on, int32, (1,)."""
    off = switch == 0
    return off.argsort(stable=True).int(), (switch.numel() - off.sum(dim=0, keepdim=True)).int()


def switched_conv2d(
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    switch: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> None:
    """Computes the switched convolution into ``out`` (N, C_out, oH, oW)."""
    with ops.on_device(input):
        order, count = _listed(switch)
        ops.gathered_conv2d(
            out, input, weight, order, None, stride, padding, dilation, epilogue=Epilogue(bias), count=count
        )


def switched_conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    switch: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    off_gradient: bool,
    mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients in input, weight, bias and switch; an empty tensor for each that ``mask`` leaves out."""
    none = input.new_empty((0,))
    dx, dw, db, ds = none, none, none, switch.new_empty((0,))
    geometry = Geometry(
        input.shape[0],
        (input.shape[2], input.shape[3]),
        (grad_output.shape[2], grad_output.shape[3]),
        (weight.shape[2], weight.shape[3]),
        (stride[0], stride[1]),
        (padding[0], padding[2]),
        (dilation[0], dilation[1]),
    )
    target = target_of(input.device)
    channels = input.shape[1]
    with ops.on_device(input):
        order, count = _listed(switch)
        ordered = ChannelList(order, 1, channels)
        g = grad_output
        if g.stride(1) != 1 and (mask[0] or mask[1] or mask[3]):
            g, _ = ops.compact(g, ChannelList(None, 0, g.shape[1]))
        if mask[0] or mask[3]:
            packed = _C.pack_weight(weight, None, order, by_input=True)
            problem = launch_backward.input_gradient_problem(g, geometry, ordered, reduced=mask[3])
            dx = torch.zeros_like(input) if mask[0] else none

            def prepare() -> tuple[Tensor | None, Launch]:
                config = choose(problem, target.products(g.dtype), target.capability)
                partial = launch_backward.input_gradient_partials(g, geometry, channels, config) if mask[3] else None
                step = launch_backward.input_gradient(
                    *(g, packed, geometry, ordered, target, config),
                    dx=dx if mask[0] else None,
                    x=input if mask[3] else None,
                    partial=partial,
                    count=count,
                    reduce_off=mask[3] and off_gradient,
                )
                return partial, step

            tune_case(problem, g.dtype, target, g.device, lambda: prepare()[1])
            partial, step = prepare()
            step.run()
            if partial is not None:
                ds = torch.zeros_like(switch)
                _sum_terms(ds, partial, ordered, None if off_gradient else count)
        if mask[1]:
            dw = ops.gradient_of_weight(g, input, weight, geometry, order, None, count)
        if mask[2]:
            db = grad_output.sum((0, 2, 3))
    return dx, dw, db, ds


def _sum_terms(ds: Tensor, partial: Tensor, ordered: ChannelList, count: Tensor | None) -> None:
    one = Geometry(1, (1, 1), (1, 1), (1, 1), (1, 1), (0, 0), (1, 1))
    terms = partial.view(partial.shape[0], 1, 1, partial.shape[1])
    out = ds.view(1, -1, 1, 1)
    launch_backward.sum_partials(out, terms, one, ordered, ChannelList(None, 0, 1), count).run()
