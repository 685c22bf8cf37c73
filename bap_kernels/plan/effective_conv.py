"""Which convolutions a plan can compute, and the plain one that a layer of an unknown class computes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.overrides import TorchFunctionMode

from bap_kernels.flow.ops import has_hooks, is_same_padded_conv
from bap_kernels.nn.conv import GatheredConv2d, MaskedConv2d

__all__ = ["conv_of", "effective_conv", "is_plain", "not_lowered_reason"]


class _ConvCalls(TorchFunctionMode):
    """Notes the calls of ``F.conv2d``."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (F.conv2d, torch.conv2d):
            self.calls.append((args, kwargs or {}, result))
        return result


def _same_tensor(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def _only_call(conv: nn.Conv2d, x: Tensor) -> tuple[Any, ...] | None:
    """The arguments of F.conv2d after its input, where calling the layer is this call and nothing else."""
    with _ConvCalls() as mode:
        y = conv(x)
    if len(mode.calls) != 1 or mode.calls[0][2] is not y:
        return None
    args, kwargs, _ = mode.calls[0]
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = dict(zip(names, args, strict=False)) | kwargs
    if given.pop("input") is not x:
        return None
    defaults = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    return tuple((defaults | given)[name] for name in names[1:])


def conv_of(weight: Any, bias: Any, options: tuple[Any, ...], padding_mode: str = "zeros") -> nn.Conv2d:
    """A layer in eval mode with these parameters; tensors become parameters.

    Args:
        weight, bias: the bias may be None.
        options: stride, padding, dilation and groups, as ``F.conv2d`` takes them.
        padding_mode: as in :class:`torch.nn.Conv2d`.
    """
    with torch.device("meta"):
        channels, kernel = (weight.shape[1] * options[3], weight.shape[0]), tuple(weight.shape[2:])
        conv = nn.Conv2d(*channels, kernel, *options, bias is not None, padding_mode)  # type: ignore[call-arg]
    conv.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
    conv.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)
    return conv.eval()


def effective_conv(conv: nn.Conv2d) -> nn.Conv2d | None:
    """What a convolution of a class that is not known computes, found by calling it on small inputs.

    Where two calls on different inputs are nothing but the same call of ``F.conv2d``, the layer is a plain one with
    that weight: standardised weights, parametrizations, subclasses that only add attributes.

    Args:
        conv: in eval mode.

    Returns:
        A plain layer with that weight, the layer's own parameter where it is that; None for layers that do anything
        else, have hooks, or pad by another rule.
    """
    if has_hooks(conv) or isinstance(conv, GatheredConv2d) or conv.in_channels % conv.groups:
        return None
    weight = conv._parameters.get("weight")
    like = weight if weight is not None else next(conv.parameters(), None)
    if like is None or like.device.type == "meta":
        return None
    H, W = (4 + dilation * (kernel - 1) for dilation, kernel in zip(conv.dilation, conv.kernel_size, strict=True))
    generator = torch.Generator().manual_seed(0)
    # Attributes that its forward sets go to an object of its own.
    probe = type(conv).__new__(type(conv))
    probe.__dict__.update(conv.__dict__)
    for table in ("_parameters", "_buffers", "_modules"):
        probe.__dict__[table] = conv.__dict__[table].copy()
    calls = []
    with unset_fake_temporarily(), torch.no_grad():
        for shape in ((2, conv.in_channels, H, W), (1, conv.in_channels, H + 3, W + 1)):
            x = torch.randn(shape, generator=generator).to(like)
            try:
                calls.append(_only_call(probe, x))
            except Exception:  # whatever the layer's own code raises: it is then run as it is
                return None
        first, second = calls
        if first is None or second is None or first[2:] != second[2:]:
            return None
        if not all(_same_tensor(*pair) for pair in zip(first[:2], second[:2], strict=True)):
            return None
        filters, bias = first[:2]
        if filters is weight and bias is conv._parameters.get("bias"):
            plain = conv_of(filters, bias, first[2:])
            # The same table, so that a parameter that is replaced is seen.
            plain.__dict__["_parameters"] = conv._parameters
            return plain
        kept = [None if tensor is None else nn.Parameter(tensor.detach().clone(), False) for tensor in (filters, bias)]
        return conv_of(kept[0], kept[1], first[2:])


def is_plain(conv: nn.Conv2d) -> bool:
    """Whether a convolution is one of PyTorch's or the package's own with parameters of its own."""
    computed = conv._parameters.get("weight") is None or nn.utils.parametrize.is_parametrized(conv)
    return type(conv) in (nn.Conv2d, GatheredConv2d, MaskedConv2d) and not computed


def not_lowered_reason(conv: nn.Conv2d) -> str:
    """Why a plan has no rule for a convolution."""
    if has_hooks(conv):
        return "it has hooks"
    if not is_plain(conv) and not is_same_padded_conv(conv):
        return f"{type(conv).__name__} computes something else than one convolution with a fixed weight"
    return "its input has no batch axis, it is called with keywords, or it writes no channel"
