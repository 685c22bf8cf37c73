"""The private ops of the backend: from an op's checked arguments to a route, and to its launches.

Routes of the forward: ``planar`` for 1x1 convolutions of planes; ``direct`` reads the input where it lies, in NHWC with
aligned blocks or without a list, else channel by channel; ``packed`` first copies the listed channels into a compact
NHWC tensor.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bap_kernels._load import _C
from bap_kernels.triton import launch, launch_backward
from bap_kernels.triton.configs import choose
from bap_kernels.triton.launch import NO_EPILOGUE, NO_PROLOGUE, Epilogue, Prologue
from bap_kernels.triton.launch_spec import ALIGNMENT, Geometry, Launch, target_of
from bap_kernels.triton.lists import ChannelList, channel_list
from bap_kernels.triton.tuning import tune_case

__all__ = ["ROUTES", "compact", "gathered_conv2d", "gathered_conv2d_backward", "refuse"]

ROUTES = ("planar", "direct", "packed")
Pair = Sequence[int]
_TAPS_OF_A_SIDE = 32


def unsupported_reason(input: Tensor, weight: Tensor, groups: int, out_size: Pair, interpreted: bool) -> str | None:
    """Why the kernels cannot run a call; None if they can."""
    if input.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"no Triton kernel for {input.dtype} (float32, float16 and bfloat16 only)"
    if groups != 1:
        return "no Triton kernel for depthwise convolutions"
    if max(weight.shape[2:]) > _TAPS_OF_A_SIDE:
        return f"a kernel of more than {_TAPS_OF_A_SIDE} rows or columns"
    pixels = input.shape[0] * max(math.prod(input.shape[2:]), math.prod(out_size))
    if max(pixels, weight.numel()) >= 2**31:
        return "the shape is beyond 32-bit tile arithmetic"
    if not input.is_cuda and not interpreted:
        return f"it computes on CUDA devices, the tensors are on {input.device}"
    return None


def refuse(op: str, reason: str | None) -> None:
    """Raises where there is a reason.

    Raises:
        NotImplementedError: with the reason.
    """
    if reason is not None:
        raise NotImplementedError(
            f"{op}(): expected a call that backend `triton` can run, got one that it cannot: {reason}. "
            'Hint: use_backend("auto") takes the ATen path where Triton cannot run.'
        )


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's device the current one, for launches."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def geometry_of(
    input: Tensor, weight: Tensor, out_size: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> tuple[Tensor, Geometry]:
    """The convolution's geometry, and its input: of strided 1x1 convolutions only the pixels that they meet."""
    kernel = (weight.shape[2], weight.shape[3])
    if kernel == (1, 1) and not any(padding) and tuple(stride) != (1, 1):
        input = input[:, :, :: stride[0], :: stride[1]]
        stride = (1, 1)
    geometry = Geometry(
        batch=input.shape[0],
        size=(input.shape[2], input.shape[3]),
        out_size=(out_size[0], out_size[1]),
        kernel=kernel,
        stride=(stride[0], stride[1]),
        padding=(padding[0], padding[2]),
        dilation=(dilation[0], dilation[1]),
    )
    return input, geometry


def is_planar(t: Tensor) -> bool:
    """Whether the pixels of a plane are one element apart, row after row."""
    return t.stride(3) == 1 and (t.shape[2] == 1 or t.stride(2) == t.shape[3])


def pointwise(geometry: Geometry) -> bool:
    """Whether each result pixel meets the input pixel at its place."""
    return geometry.kernel == (1, 1) and geometry.stride == (1, 1) and geometry.size == geometry.out_size


def route_of(input: Tensor, out: Tensor, geometry: Geometry, in_list: ChannelList) -> str:
    """The route that suits a forward call."""
    # Images are the grid's second axis.
    if pointwise(geometry) and is_planar(input) and is_planar(out) and geometry.batch < 2**16:
        return "planar"
    # Below 4 bytes a copy to shared memory cannot run ahead, and every tap would read the same channels again.
    few = in_list.kind == 1 and (input.dtype.itemsize < 4 or geometry.taps > 1)
    return "packed" if few or input.stride(1) != 1 else "direct"


def compact(
    input: Tensor, in_list: ChannelList, prologue: Prologue = NO_PROLOGUE, count: Tensor | None = None
) -> tuple[Tensor, ChannelList]:
    """A dense NHWC copy of the listed channels, (N, K rounded up, H, W), and the list that reads all of it."""
    batch, _, height, width = input.shape
    padded = -(-in_list.length // ALIGNMENT) * ALIGNMENT
    copy = input.new_empty((batch, height, width, padded))
    launch.pack(copy, input, in_list, prologue, count).run()
    # With a count the kernels stop at it and must not go on to the padding.
    length = in_list.length if count is not None else padded
    return copy.permute(0, 3, 1, 2), ChannelList(None, 0, length)


def gathered_conv2d(
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    in_index: Tensor | None,
    out_index: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    prologue: Prologue = NO_PROLOGUE,
    epilogue: Epilogue = NO_EPILOGUE,
    count: Tensor | None = None,
    packed: Tensor | None = None,
    full_width: bool = False,
    route: str | None = None,
) -> None:
    """Computes the gathered convolution into ``out``.

    Args:
        out: (N, K_out, oH, oW), or with ``full_width`` (N, C_out, oH, oW), whose unlisted channels are left alone.
        count: int32, (1,): how many channels of ``in_index`` are used; None: all.
        packed: the weight by filters, see csrc/dispatch/pack_weight.h; None: it is packed for this call.
        route: one of ``ROUTES``; None takes the one that suits.
    """
    target = target_of(input.device)
    x, geometry = geometry_of(input, weight, out.shape[2:], stride, padding, dilation)
    # A count cuts blocks short, so it reads channel by channel.
    in_list = channel_list(in_index, input.shape[1], blocks=count is None)
    out_list = channel_list(out_index, weight.shape[0])
    route = route or route_of(x, out, geometry, in_list)
    with on_device(input):
        if packed is None:
            packed = _C.pack_weight(weight, out_index, in_index, by_input=False)
        if route == "packed":
            x, in_list = compact(x, in_list, prologue, count)
            prologue = NO_PROLOGUE
        fused = (prologue, epilogue, count, full_width)
        if route == "planar":
            problem = launch.planar_problem(x, in_list, out_list.length)
            step = functools.partial(launch.planar, out, x, packed, in_list, out_list, target, *fused)
        else:
            problem = launch.forward_problem(geometry, in_list, out_list.length)
            step = functools.partial(launch.forward, out, x, packed, geometry, in_list, out_list, target, *fused)
        tune_case(problem, x.dtype, target, x.device, step)
        step().run()


def _gradient_of_input(
    g: Tensor, input: Tensor, weight: Tensor, geometry: Geometry, in_index: Tensor | None, out_index: Tensor | None
) -> Tensor:
    target = target_of(input.device)
    in_list = channel_list(in_index, input.shape[1])
    packed = _C.pack_weight(weight, out_index, in_index, by_input=True)
    dx = torch.empty_like(input) if in_index is None else torch.zeros_like(input)
    if pointwise(geometry) and is_planar(g) and is_planar(dx) and geometry.batch < 2**16:
        every = ChannelList(None, 0, g.shape[1])
        step = functools.partial(launch.planar, dx, g, packed, every, in_list, target, full_width=True)
        tune_case(launch.planar_problem(g, every, in_list.length), g.dtype, target, g.device, step)
        step().run()
        return dx
    if g.stride(1) != 1:
        g, _ = compact(g, ChannelList(None, 0, g.shape[1]))
    problem = launch_backward.input_gradient_problem(g, geometry, in_list)

    def prepare() -> Launch:
        config = choose(problem, target.products(g.dtype), target.capability)
        return launch_backward.input_gradient(g, packed, geometry, in_list, target, config, dx=dx)

    tune_case(problem, g.dtype, target, g.device, prepare)
    prepare().run()
    return dx


def gradient_of_weight(
    g: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: Geometry,
    in_index: Tensor | None,
    out_index: Tensor | None,
    count: Tensor | None = None,
    direct: bool | None = None,
) -> Tensor:
    """The gradient (C_out, C_in, kH, kW), zero where nothing is listed.

    Args:
        g: (N, at least K_out, oH, oW), its channels contiguous.
        direct: whether the input is read where it lies; None: where that suits.
    """
    target = target_of(input.device)
    in_list = channel_list(in_index, input.shape[1], blocks=count is None)
    out_list = channel_list(out_index, weight.shape[0])
    dw = torch.empty_like(weight) if in_index is None and out_index is None else torch.zeros_like(weight)
    if direct is None:
        direct = in_list.kind != 1 and input.stride(1) == 1
    x, read = input, in_list
    if not direct:
        x, read = compact(input, in_list, count=count)
    # Rounded up where they are compact copies: the rest holds zeros and is not added.
    problem = launch_backward.weight_gradient_problem(geometry, g.shape[1], read)

    def prepare() -> tuple[Tensor, Launch]:
        config = choose(problem, target.products(g.dtype), target.capability)
        partial = launch_backward.weight_gradient_partials(g, geometry, g.shape[1], read.length, target, config)
        return partial, launch_backward.weight_gradient(partial, g, x, geometry, read, target, config, count)

    tune_case(problem, g.dtype, target, g.device, lambda: prepare()[1])
    partial, step = prepare()
    step.run()
    launch_backward.sum_partials(dw, partial, geometry, in_list, out_list, count).run()
    return dw


def gradient_of_bias(grad_output: Tensor, out_index: Tensor | None, filters: int) -> Tensor:
    """The gradient (C_out,): the sum over images and pixels, zero for filters that are not listed."""
    sums = grad_output.sum((0, 2, 3))
    if out_index is None:
        return sums
    return sums.new_zeros(filters).index_copy_(0, out_index.long(), sums)


def gathered_conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    in_index: Tensor | None,
    out_index: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in input, weight and bias; an empty tensor for each that ``mask`` leaves out."""
    none = input.new_empty((0,))
    dx, dw, db = none, none, none
    kernel = (weight.shape[2], weight.shape[3])
    geometry = Geometry(
        input.shape[0],
        (input.shape[2], input.shape[3]),
        (grad_output.shape[2], grad_output.shape[3]),
        kernel,
        (stride[0], stride[1]),
        (padding[0], padding[2]),
        (dilation[0], dilation[1]),
    )
    with on_device(input):
        g = grad_output
        if mask[0]:
            dx = _gradient_of_input(g, input, weight, geometry, in_index, out_index)
        if mask[1]:
            if g.stride(1) != 1:
                g, _ = compact(g, ChannelList(None, 0, g.shape[1]))
            dw = gradient_of_weight(g, input, weight, geometry, in_index, out_index)
        if mask[2]:
            db = gradient_of_bias(grad_output, out_index, weight.shape[0])
    return dx, dw, db
