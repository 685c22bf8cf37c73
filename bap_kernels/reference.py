"""Ground truth of the ops: slow loops in float64, and a second, independent route.

    z[n, i]         = relu?(in_scale[i] * x[n, in_index[i]] + in_shift[i]), then zero padding
    c[n, j, oh, ow] = b[out_index[j]] + sum over i, kh, kw of z[n, i, ih, iw] * w[out_index[j], in_index[i], kh, kw]
    y[n, j, oh, ow] = relu?(out_scale[j] * c + out_shift[j] + residual[n, j, oh, ow])
    with ih = oh * stride + kh * dilation - top, iw likewise from the left

Without scales, shifts, residual and ReLUs this is ``gathered_conv2d``. Depthwise, one list for both: w[out_index[j], 0]
on z[n, j]. ``switched_conv2d`` is y = conv2d(x * s, w, b) with zeros and ones s, one for each input channel.
Everything takes the arguments of the ops (``padding`` is top, bottom, left, right) and answers in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "conv_on_masked",
    "conv_on_selected",
    "gathered_conv2d",
    "gathered_conv2d_backward",
    "gathered_conv2d_fused",
    "output_size",
    "switched_conv2d",
    "switched_conv2d_backward",
]


def output_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """Height and width (oH, oW) of the result for an input of height and width ``size``."""
    reach = [dilation[d] * (kernel[d] - 1) + 1 for d in (0, 1)]
    padded = [size[d] + padding[2 * d] + padding[2 * d + 1] for d in (0, 1)]
    return (padded[0] - reach[0]) // stride[0] + 1, (padded[1] - reach[1]) // stride[1] + 1


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()


def _channels(index: Tensor | None, count: int) -> list[int]:
    return list(range(count)) if index is None else [int(c) for c in index.tolist()]


def _weight_channel(groups: int, in_channels: int, channel: int) -> int:
    if groups == 1:
        return channel
    if groups != in_channels:
        raise NotImplementedError(f"reference: expected `groups` to be 1 or C_in ({in_channels}), got {groups}.")
    return 0


def _taps(kernel: Sequence[int], out: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Iterator:
    """Yields each tap with the rows and columns of the padded input that it meets, one for each output pixel."""
    for kh in range(kernel[0]):
        rows = slice(kh * dilation[0], kh * dilation[0] + (out[0] - 1) * stride[0] + 1, stride[0])
        for kw in range(kernel[1]):
            columns = slice(kw * dilation[1], kw * dilation[1] + (out[1] - 1) * stride[1] + 1, stride[1])
            yield kh, kw, rows, columns


def _padded(plane: np.ndarray, padding: Sequence[int]) -> np.ndarray:
    top, bottom, left, right = padding
    return np.pad(plane, ((0, 0), (top, bottom), (left, right)))


def gathered_conv2d_fused(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_index: Tensor | None,
    out_index: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    in_scale: Tensor | None = None,
    in_shift: Tensor | None = None,
    in_relu: bool = False,
    out_scale: Tensor | None = None,
    out_shift: Tensor | None = None,
    residual: Tensor | None = None,
    out_relu: bool = False,
    out_max: float | None = None,
) -> Tensor:
    """Gathered convolution between an input transform and an output transform, by loops.

    Args:
        input: (N, C_in, H, W); only the listed channels are read.
        weight: (C_out, C_in / groups, kH, kW).
        bias: (C_out,), or None.
        in_index, out_index: 1-D lists of channels in any order, or None for all.
        stride, dilation: (rows, columns).
        padding: (top, bottom, left, right), in pixels of zeros, added after the input transform.
        groups: 1, or C_in (depthwise).
        in_scale, in_shift: (K_in,), in the order of ``in_index``.
        out_scale, out_shift: (K_out,), in the order of ``out_index``.
        residual: (N, K_out, oH, oW).
        out_max: the largest result of the ReLU, or None.

    Returns:
        (N, K_out, oH, oW), float64.
    """
    x, w = _array(input), _array(weight)
    kept_in, kept_out = _channels(in_index, x.shape[1]), _channels(out_index, w.shape[0])
    size = output_size(x.shape[2:], w.shape[2:], stride, padding, dilation)

    planes = []
    for i, channel in enumerate(kept_in):
        plane = x[:, channel]
        if in_scale is not None:
            plane = plane * _array(in_scale)[i]
        if in_shift is not None:
            plane = plane + _array(in_shift)[i]
        if in_relu:
            plane = np.maximum(plane, 0)
        planes.append(_padded(plane, padding))

    y = np.zeros((x.shape[0], len(kept_out), *size))
    for j, out_channel in enumerate(kept_out):
        for i, in_channel in enumerate(kept_in):
            if groups != 1 and in_channel != out_channel:
                continue
            taps = w[out_channel, _weight_channel(groups, x.shape[1], in_channel)]
            for kh, kw, rows, columns in _taps(w.shape[2:], size, stride, dilation):
                y[:, j] += planes[i][:, rows, columns] * taps[kh, kw]
        if bias is not None:
            y[:, j] += _array(bias)[out_channel]
        if out_scale is not None:
            y[:, j] *= _array(out_scale)[j]
        if out_shift is not None:
            y[:, j] += _array(out_shift)[j]
    if residual is not None:
        y += _array(residual)
    if out_relu:
        y = np.maximum(y, 0)
    if out_max is not None:
        y = np.minimum(y, out_max)
    return torch.from_numpy(y)


def gathered_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_index: Tensor | None,
    out_index: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Tensor:
    """Gathered convolution by loops; the arguments of :func:`gathered_conv2d_fused` without the transforms."""
    return gathered_conv2d_fused(input, weight, bias, in_index, out_index, stride, padding, dilation, groups)


def gathered_conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    in_index: Tensor | None,
    out_index: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the gathered convolution in input, weight and bias, by loops; zero where nothing is listed.

    Args:
        grad_output: (N, K_out, oH, oW).

    Returns:
        (N, C_in, H, W), (C_out, C_in / groups, kH, kW) and (C_out,), float64.
    """
    g, x, w = _array(grad_output), _array(input), _array(weight)
    kept_in, kept_out = _channels(in_index, x.shape[1]), _channels(out_index, w.shape[0])
    top, _, left, _ = padding
    height, width = x.shape[2:]
    grad_input, grad_weight, grad_bias = np.zeros_like(x), np.zeros_like(w), np.zeros(w.shape[0])

    for in_channel in kept_in:
        plane = _padded(x[:, in_channel], padding)
        grad_plane = np.zeros_like(plane)
        slot = _weight_channel(groups, x.shape[1], in_channel)
        for j, out_channel in enumerate(kept_out):
            if groups != 1 and in_channel != out_channel:
                continue
            for kh, kw, rows, columns in _taps(w.shape[2:], g.shape[2:], stride, dilation):
                grad_plane[:, rows, columns] += g[:, j] * w[out_channel, slot, kh, kw]
                grad_weight[out_channel, slot, kh, kw] += (g[:, j] * plane[:, rows, columns]).sum()
        grad_input[:, in_channel] = grad_plane[:, top : top + height, left : left + width]
    for j, out_channel in enumerate(kept_out):
        grad_bias[out_channel] += g[:, j].sum()
    return torch.from_numpy(grad_input), torch.from_numpy(grad_weight), torch.from_numpy(grad_bias)


def conv_on_selected(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_index: Tensor | None,
    out_index: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Tensor:
    """The same result by another route: ``F.conv2d`` on the selected channels, in float64; differentiable."""
    x, w, b = input.double(), weight.double(), None if bias is None else bias.double()
    size = output_size(x.shape[2:], w.shape[2:], stride, padding, dilation)
    if out_index is not None:
        w = w.index_select(0, out_index)
        b = None if b is None else b.index_select(0, out_index)
    if in_index is not None:
        x = x.index_select(1, in_index)
        w = w if groups != 1 else w.index_select(1, in_index)
    # F.conv2d returns no output channels for no input channels, and refuses no output channels.
    if w.shape[0] == 0 or x.shape[1] == 0:
        y = x.new_zeros((x.shape[0], w.shape[0], *size))
        return y if b is None else y + b.view(1, -1, 1, 1)
    top, bottom, left, right = padding
    x = F.pad(x, (left, right, top, bottom))
    return F.conv2d(x, w, b, tuple(stride), 0, tuple(dilation), 1 if groups == 1 else x.shape[1])


def switched_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    switch: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Tensor:
    """Convolution of the channels that ``switch`` (C_in,) has on, by loops; all C_out channels of the result."""
    x, w, s = _array(input), _array(weight), _array(switch)
    size = output_size(x.shape[2:], w.shape[2:], stride, padding, dilation)
    y = np.zeros((x.shape[0], w.shape[0], *size))
    for c in np.flatnonzero(s).tolist():
        plane, slot = _padded(x[:, c], padding), _weight_channel(groups, x.shape[1], c)
        for k in range(w.shape[0]) if groups == 1 else [c]:
            for kh, kw, rows, columns in _taps(w.shape[2:], size, stride, dilation):
                y[:, k] += s[c] * plane[:, rows, columns] * w[k, slot, kh, kw]
    if bias is not None:
        y += _array(bias)[:, None, None]
    return torch.from_numpy(y)


def switched_conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    switch: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    off_gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the switched convolution in input, weight, bias and switch, by loops.

    That of switch c is the sum over n, h, w of x[n, c, h, w] * dX[n, c, h, w], with dX the gradient in the input of the
    convolution without switches; the others are zero where the switch is off.

    Args:
        grad_output: (N, C_out, oH, oW).
        off_gradient: if False, the gradient of switches that are off is zero.

    Returns:
        (N, C_in, H, W), (C_out, C_in / groups, kH, kW), (C_out,) and (C_in,), float64.
    """
    g, x, w, s = _array(grad_output), _array(input), _array(weight), _array(switch)
    top, _, left, _ = padding
    height, width = x.shape[2:]
    grad_input, grad_weight, grad_switch = np.zeros_like(x), np.zeros_like(w), np.zeros(x.shape[1])
    for c in range(x.shape[1]):
        plane = _padded(x[:, c], padding)
        full, slot = np.zeros_like(plane), _weight_channel(groups, x.shape[1], c)
        for k in range(w.shape[0]) if groups == 1 else [c]:
            for kh, kw, rows, columns in _taps(w.shape[2:], g.shape[2:], stride, dilation):
                full[:, rows, columns] += g[:, k] * w[k, slot, kh, kw]
                if s[c]:
                    grad_weight[k, slot, kh, kw] += (g[:, k] * plane[:, rows, columns]).sum()
        full = full[:, top : top + height, left : left + width]
        if s[c]:
            grad_input[:, c] = full
        if s[c] or off_gradient:
            grad_switch[c] = (x[:, c] * full).sum()
    gradients = (grad_input, grad_weight, g.sum((0, 2, 3)), grad_switch)
    return tuple(torch.from_numpy(gradient) for gradient in gradients)  # type: ignore[return-value]


def conv_on_masked(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    switch: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Tensor:
    """The switched convolution by another route: ``F.conv2d`` on ``input * switch``, in float64; differentiable."""
    top, bottom, left, right = padding
    x = F.pad(input.double() * switch.double().view(1, -1, 1, 1), (left, right, top, bottom))
    b = None if bias is None else bias.double()
    return F.conv2d(x, weight.double(), b, tuple(stride), 0, tuple(dilation), groups)
