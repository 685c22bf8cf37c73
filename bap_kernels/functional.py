"""The functions; they settle defaults and pairs, the operators check and compute."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from bap_kernels._load import _C

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["gathered_conv2d", "switched_conv2d"]

_operator = torch.ops.bap_kernels.gathered_conv2d.default
# With what is settled there: pairs, four sides, and who reads the result.
switched_operator = torch.ops.bap_kernels.switched_conv2d.default


def _in_onnx_export() -> bool:
    # Only an export has loaded it.
    onnx = sys.modules.get("torch.onnx")
    return onnx is not None and onnx.is_in_onnx_export()


# As torch.compiler.assume_constant_result does, which would load the compiler.
_in_onnx_export._dynamo_marked_constant = True  # type: ignore[attr-defined]


def refuse_onnx(op: str) -> None:
    """For callers that are being traced, compiled or exported.

    Raises:
        NotImplementedError: if it is an export to ONNX, which has no operator for lists.
    """
    if _in_onnx_export():
        raise NotImplementedError(
            f"{op}(): expected a caller other than torch.onnx.export, as ONNX has no such operator. "
            "Hint: export bap_kernels.specialize(model, domain), a plain network with the same results."
        )


def call_gathered_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_index: Tensor | None,
    out_index: Tensor | None,
    stride: Sequence[int],
    padding: tuple[int, int, int, int],
    dilation: Sequence[int],
    groups: int,
    cache_packed: bool,
) -> Tensor:
    """Calls the operator ``bap_kernels::gathered_conv2d`` by the cheapest way that the caller's context allows.

    Tracers and overrides see ``torch.ops``; plain eager code takes a binding of the same dispatcher entry that costs
    a few microseconds less. Arguments as :func:`gathered_conv2d`, with pairs and four sides settled.
    """
    if torch.compiler.is_compiling():
        refuse_onnx("gathered_conv2d")
    elif not torch.overrides.has_torch_function_variadic(input, weight):
        try:
            return _C.gathered_conv2d(
                input, weight, bias, in_index, out_index, stride, padding, dilation, groups, cache_packed
            )
        except TypeError:
            for name, value in (("in_index", in_index), ("out_index", out_index)):
                if isinstance(value, (list, tuple, range)):
                    raise TypeError(
                        f"gathered_conv2d(): expected `{name}` to be an int32 tensor, got a {type(value).__name__}. "
                        f"Hint: torch.tensor({name}, dtype=torch.int32)."
                    ) from None
            # The operator's own message names any other argument.
    return _operator(input, weight, bias, in_index, out_index, stride, padding, dilation, groups, cache_packed)


def plain_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int] | str,
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """``F.conv2d`` for inference, kept away from what PyTorch's CPU kernels get wrong (backends/aten/convolution.h)."""
    pair = (0, 0) if padding == "valid" else padding
    if (
        input.device.type == "cpu"
        and input.dim() == 4
        and not isinstance(pair, str)
        and _C.convolution_fails(input, weight, stride, pair, dilation, groups)
    ):
        return _C.convolution(input, weight.to(input.dtype), bias, stride, pair, dilation, groups)
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def _same_padding(size: int, dilation: int) -> tuple[int, int]:
    # As in torch.nn.functional.conv2d: an odd pixel goes to the end.
    total = dilation * (size - 1)
    return total // 2, total - total // 2


def four_sided(
    op: str,
    padding: int | str | tuple[int, int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int, int, int]:
    """Padding as (top, bottom, left, right), from what :class:`torch.nn.Conv2d` takes.

    Raises:
        ValueError: if ``padding`` is something else, or ``'same'`` with a stride other than 1.

    Examples:
        >>> from bap_kernels.functional import four_sided
        >>> four_sided("conv", "same", kernel_size=(4, 3), stride=(1, 1), dilation=(1, 1))
        (1, 2, 1, 1)
    """
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "same":
        if tuple(stride) != (1, 1):
            raise ValueError(f"{op}(): expected `stride` to be 1 with padding='same', got {tuple(stride)}.")
        return *_same_padding(kernel_size[0], dilation[0]), *_same_padding(kernel_size[1], dilation[1])
    if isinstance(padding, (tuple, list)) and len(padding) == 2:
        return padding[0], padding[0], padding[1], padding[1]
    raise ValueError(f"{op}(): expected `padding` to be an int, a pair, 'same' or 'valid', got {padding!r}.")


def gathered_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    in_index: Tensor | None = None,
    out_index: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    r"""Convolution that reads only the channels of one list and computes only those of another.

    .. math::
        y_{n,j} = b_{o_j} + \sum_{i} w_{o_j, c_i} \ast x_{n, c_i},
        \qquad c = \text{in\_index},\ o = \text{out\_index}

    It is the convolution of *Budget-Aware Adapters for Multi-Domain Learning* (arXiv 1905.06242) for binary switches,
    and differentiable in ``input``, ``weight`` and ``bias``; what no list names gets a gradient of zero. Second
    derivatives, forward-mode AD and the transforms of ``torch.func`` are right, and run PyTorch's own convolution on
    what the lists select.

    Args:
        input: (N, C_in, H, W), float32, float64, bfloat16 or float16; all channels, any strides.
        weight: (C_out, C_in / groups, kH, kW), full size; the lists select from it.
        bias: (C_out,), full size, or None.
        in_index: channels to read, int32, (K_in,), without repeats, on the input's device. None reads all.
        out_index: channels to compute, int32, (K_out,), likewise; the result follows its order. None computes all.
        stride: rows and columns between neighbouring results, in pixels; an int or a pair.
        padding: pixels of zeros on each side; an int, a pair, ``'valid'`` (none) or ``'same'`` (stride 1 only).
        dilation: rows and columns between the taps, in pixels; an int or a pair.
        groups: 1, or C_in for a depthwise convolution, whose two lists must be equal.

    Shape:
        - Output: (N, K_out, oH, oW) with oH and oW of :class:`torch.nn.Conv2d`; its memory format follows the input's.

    Raises:
        TypeError: for dtypes that do not fit each other, and lists that are not int32.
        ValueError: for shapes and options that do not fit, and lists with repeats.
        IndexError: for lists out of range.
        NotImplementedError: for other groups, and for lists that ``torch.func.vmap`` maps over.

    Examples:
        >>> import torch, bap_kernels as bk
        >>> x, w = torch.randn(2, 8, 5, 5), torch.randn(4, 8, 3, 3)
        >>> kept = torch.tensor([1, 2, 6], dtype=torch.int32)
        >>> y = bk.gathered_conv2d(x, w, in_index=kept, padding=1)
        >>> y.shape
        torch.Size([2, 4, 5, 5])
        >>> expected = torch.nn.functional.conv2d(x[:, [1, 2, 6]], w[:, [1, 2, 6]], padding=1)
        >>> torch.allclose(y, expected, atol=1e-5)
        True
    """
    strides = (stride, stride) if isinstance(stride, int) else stride
    dilations = (dilation, dilation) if isinstance(dilation, int) else dilation
    if isinstance(padding, int):
        sides = (padding, padding, padding, padding)
    elif isinstance(padding, tuple) and len(padding) == 2:
        sides = (padding[0], padding[0], padding[1], padding[1])
    else:
        sides = four_sided("gathered_conv2d", padding, weight.shape[2:], strides, dilations)
    return call_gathered_conv2d(input, weight, bias, in_index, out_index, strides, sides, dilations, groups, False)


def switched_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    switch: Tensor,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    off_gradient: bool = True,
) -> Tensor:
    r"""Convolution whose input channels a vector of zeros and ones switches on and off, for training the switches.

    .. math::
        y_{n,k} = b_k + \sum_c s_c \, (w_{k,c} \ast x_{n,c}), \qquad s \in \{0, 1\}^{C_{in}}

    It is the convolution that *Budget-Aware Adapters for Multi-Domain Learning* (arXiv 1905.06242) trains, and
    differentiable in ``input``, ``weight``, ``bias`` and ``switch``. Channels that are off reach neither the result nor
    the gradients of the other three: theirs are zero there. The gradient in ``switch`` is that of every channel, off
    ones too, since by it they come back:

    .. math::
        \frac{\partial L}{\partial s_c} = \Big\langle x_c, \frac{\partial L}{\partial (s x)_c} \Big\rangle

    Neither the product ``input * switch`` nor the gradient in it over all channels is formed on a CPU: there only
    channels that are on are computed. On a GPU the switch is not read on the host, and all channels are.

    Args:
        input: (N, C_in, H, W), float32, float64, bfloat16 or float16; any strides.
        weight: (C_out, C_in / groups, kH, kW).
        bias: (C_out,), or None.
        switch: (C_in,), zeros and ones, float32 (or float64, as the input is), on the input's device; its values are
            checked on CPUs only.
        stride: rows and columns between neighbouring results, in pixels; an int or a pair.
        padding: pixels of zeros on each side; an int, a pair, ``'valid'`` (none) or ``'same'`` (stride 1 only).
        dilation: rows and columns between the taps, in pixels; an int or a pair.
        groups: 1, or C_in for a depthwise convolution with C_out == C_in.
        off_gradient: whether the switch's gradient of channels that are off is computed; else it is zero.

    Shape:
        - Output: (N, C_out, oH, oW) with oH and oW of :class:`torch.nn.Conv2d`; its memory format follows the input's.

    Raises:
        TypeError: for dtypes that do not fit each other.
        ValueError: for shapes and options that do not fit, and a switch with other values than 0 and 1.
        NotImplementedError: for other groups.

    Examples:
        >>> import torch, bap_kernels as bk
        >>> x, w = torch.randn(2, 4, 5, 5), torch.randn(3, 4, 3, 3)
        >>> switch = torch.tensor([1.0, 0.0, 1.0, 0.0], requires_grad=True)
        >>> y = bk.switched_conv2d(x, w, None, switch, padding=1)
        >>> expected = torch.nn.functional.conv2d(x[:, [0, 2]], w[:, [0, 2]], padding=1)
        >>> torch.allclose(y, expected, atol=1e-5)
        True
        >>> y.sum().backward()
        >>> switch.grad.count_nonzero().item()
        4
    """
    if torch.compiler.is_compiling():
        refuse_onnx("switched_conv2d")
    strides = (stride, stride) if isinstance(stride, int) else stride
    dilations = (dilation, dilation) if isinstance(dilation, int) else dilation
    pair = (padding, padding) if isinstance(padding, int) else padding
    sides = four_sided("switched_conv2d", pair, weight.shape[2:], strides, dilations)
    return switched_operator(input, weight, bias, switch, strides, sides, dilations, groups, off_gradient)
