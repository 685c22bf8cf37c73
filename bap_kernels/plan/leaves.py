"""Layers that a recording keeps as one step because their rule is known, beside PyTorch's own.

Classes of torchvision and timm are told by module and name, so that neither has to be installed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.overrides import TorchFunctionMode

from bap_kernels.nn.conv import GatheredConv2d, MaskedConv2d
from bap_kernels.nn.norms import norm_parts
from bap_kernels.nn.recording import has_hooks

__all__ = [
    "Blur",
    "PadSame",
    "class_name",
    "conv_of",
    "effective_conv",
    "is_elementwise",
    "is_spatial",
    "leaves",
    "out_of_place",
    "same_conv",
]

_ACTIVATIONS = (
    "Swish",
    "Mish",
    "Sigmoid",
    "Tanh",
    "HardSwish",
    "HardSigmoid",
    "HardMish",
    "GELU",
    "GELUTanh",
    "QuickGELU",
)
_ELEMENTWISE = {
    *(f"timm.layers.activations.{name}" for name in _ACTIVATIONS),
    *(f"timm.layers.activations_me.{name}Me" for name in _ACTIVATIONS),
}
_POOLS = {"timm.layers.pool2d_same.AvgPool2dSame", "timm.layers.pool2d_same.MaxPool2dSame"}
_BLUR = "timm.layers.blur_pool.BlurPool2d"
_SAME = "timm.layers.conv2d_same.Conv2dSame"


def class_name(module: nn.Module) -> str:
    """The name of a module's class with that of its Python module."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def is_elementwise(module: nn.Module) -> bool:
    """Whether it is one of timm's activations."""
    return class_name(module) in _ELEMENTWISE


def is_spatial(module: nn.Module) -> bool:
    """Whether it is one of timm's poolings, which maps each channel alone, and zeros to zeros."""
    return class_name(module) in _POOLS


class PadSame(nn.Module):
    """Zeros around an image, as many as a convolution with ``padding="same"`` in TensorFlow has.

    Args:
        kernel_size, stride, dilation: of the convolution that follows.
    """

    def __init__(self, kernel_size: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.dilation = tuple(kernel_size), tuple(stride), tuple(dilation)

    def forward(self, x: Tensor) -> Tensor:
        """Pads (N, C, H, W)."""
        sides = []
        for axis in (1, 0):
            size, stride = x.shape[2 + axis], self.stride[axis]
            reach = self.dilation[axis] * (self.kernel_size[axis] - 1) + 1
            missing = max((-(-size // stride) - 1) * stride + reach - size, 0)
            sides += [missing // 2, missing - missing // 2]
        return F.pad(x, sides)


class Blur(nn.Module):
    """A low-pass filter, the same for every channel.

    Args:
        filter: (kH, kW).
        stride: of the filter.
        sides: padding, as in ``F.pad``.
        mode: of the padding.
    """

    def __init__(self, filter: Tensor, stride: Any, sides: list[int], mode: str) -> None:
        super().__init__()
        self.register_buffer("filter", filter.detach().clone())
        self.stride, self.sides, self.mode = stride, list(sides), mode

    def forward(self, x: Tensor) -> Tensor:
        """Maps each channel alone."""
        C = x.shape[1]
        weight = self.filter.expand(C, 1, *self.filter.shape)  # type: ignore[operator, misc]
        return F.conv2d(F.pad(x, self.sides, self.mode), weight, stride=self.stride, groups=C)

    @classmethod
    def of(cls, module: nn.Module) -> Blur | None:
        """The layer of timm in a form that takes any number of channels; None for other layers."""
        filters = getattr(module, "filt", None)
        if class_name(module) != _BLUR or not isinstance(filters, Tensor) or not bool((filters == filters[:1]).all()):
            return None
        return cls(filters[0, 0], module.stride, module.padding, module.pad_mode)  # type: ignore[arg-type]


class _Convolutions(TorchFunctionMode):
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


def _one_call(conv: nn.Conv2d, x: Tensor) -> tuple[Any, ...] | None:
    """The arguments of F.conv2d after its input, where calling the layer is this call and nothing else."""
    with _Convolutions() as noted:
        y = conv(x)
    if len(noted.calls) != 1 or noted.calls[0][2] is not y:
        return None
    args, kwargs, _ = noted.calls[0]
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = dict(zip(names, args, strict=False)) | kwargs
    if given.pop("input") is not x:
        return None
    defaults = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    return tuple((defaults | given)[name] for name in names[1:])


def conv_of(weight: Any, bias: Any, options: tuple[Any, ...]) -> nn.Conv2d:
    """A layer with these parameters.

    Args:
        weight, bias: parameters; the bias may be None.
        options: stride, padding, dilation and groups, as ``F.conv2d`` takes them.
    """
    with torch.device("meta"):
        channels, kernel = (weight.shape[1] * options[3], weight.shape[0]), tuple(weight.shape[2:])
        conv = nn.Conv2d(*channels, kernel, *options, bias is not None)  # type: ignore[call-arg]
    conv.weight, conv.bias = weight, bias
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
    # What its forward keeps stays in an object of its own.
    probe = type(conv).__new__(type(conv))
    probe.__dict__.update(conv.__dict__)
    for table in ("_parameters", "_buffers", "_modules"):
        probe.__dict__[table] = conv.__dict__[table].copy()
    made = []
    with unset_fake_temporarily(), torch.no_grad():
        for shape in ((2, conv.in_channels, H, W), (1, conv.in_channels, H + 3, W + 1)):
            x = torch.randn(shape, generator=generator).to(like)
            try:
                made.append(_one_call(probe, x))
            except Exception:  # whatever the layer's own code raises: it is then run as it is
                return None
        first, second = made
        if first is None or second is None or first[2:] != second[2:] or not _same_tensor(first[0], second[0]):
            return None
        if not _same_tensor(first[1], second[1]):
            return None
        filters, bias = first[:2]
        if filters is weight and bias is conv._parameters.get("bias"):
            plain = conv_of(filters, bias, first[2:])
            # The same table, so that a parameter that is replaced is seen.
            plain.__dict__["_parameters"] = conv._parameters
            return plain
        kept = [None if one is None else nn.Parameter(one.detach().clone(), False) for one in (filters, bias)]
        return conv_of(kept[0], kept[1], first[2:])


def same_conv(conv: nn.Module) -> bool:
    """Whether it is timm's convolution with TensorFlow's padding."""
    plain = conv._parameters.get("weight") is not None and not nn.utils.parametrize.is_parametrized(conv)
    return class_name(conv) == _SAME and plain and not has_hooks(conv)


def leaves(modules: Iterable[nn.Module]) -> set[nn.Module]:
    """The layers among some modules that are one step each."""
    found = set()
    for module in modules:
        if "forward" in module.__dict__:
            continue
        if isinstance(module, nn.Conv2d):
            plain = type(module) in (nn.Conv2d, GatheredConv2d, MaskedConv2d)
            known = plain or same_conv(module) or effective_conv(module) is not None
        else:
            known = is_elementwise(module) or is_spatial(module) or norm_parts(module) is not None
            known = known or Blur.of(module) is not None
        if known:
            found.add(module)
    return found


def out_of_place(module: nn.Module) -> nn.Module:
    """A layer that does not write to its input: itself, or a copy."""
    if getattr(module, "inplace", False):
        module = copy.copy(module)
        module.inplace = False  # type: ignore[assignment]
    return module
