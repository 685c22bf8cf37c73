"""What each layer and function does to the channels of its input: one table, and how to look a call up in it.

A row of the table is a rule with every spelling that it holds for: layers' classes, functions, names of methods.
Classes of timm are spelled by module and name, so that timm need not be installed. Spellings that write to their input
(``relu_``, ``+=``) are looked up as those that do not: see :func:`out_of_place`.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "COMMUTATIVE",
    "Blur",
    "Call",
    "PadSame",
    "Rule",
    "asks_size",
    "binary_rule",
    "call_rule",
    "class_name",
    "has_hooks",
    "is_same_padded_conv",
    "is_spatial_slice",
    "layer_rule",
    "out_of_place",
    "passes_input",
    "rule_of",
    "writes_to_input",
]


@dataclass(frozen=True)
class Rule:
    """What an operation does to channels.

    ===========  ======================================================================================================
    elementwise  each number of the result depends on one number of the input
    spatial      each channel of the result depends on the pixels of that channel, and zeros give zeros
    reduction    as spatial where it reduces pixels only and keeps the axes
    identity     in eval mode the result is the input itself; in training mode elementwise
    binary       channel j of the result depends on channel j of two inputs, or on one that serves all channels
    concat       the inputs' channels after one another
    split        some channels, or parts of them
    shuffle      channels in another order
    move         moves elements or changes the shape
    squeeze      drops axes of size 1
    size         tells the shape, and nothing of the content
    product      sums over channels with weights, as a layer does
    ===========  ======================================================================================================

    Attributes:
        kind: a row of the table above.
        act: the name under which a step before or after it can take it over: ``"relu"``, ``"relu6"`` or ``"add"``.
        steady: whether a gradient of zeros gives a gradient of zeros, whatever finite numbers the input holds. It does
            not where the slope can be infinite, or is another input.
    """

    kind: str
    act: str = ""
    steady: bool = True

    @property
    def elementwise(self) -> bool:
        """Whether each number of the result depends on one number."""
        return self.kind == "elementwise"


_TIMM = "timm.layers.activations"
# They have a second, memory-efficient implementation, whose name ends in Me.
_TIMM_TWICE = ("Swish", "Mish", "HardSwish", "HardSigmoid", "HardMish")
_TABLE: dict[Rule, tuple[Any, ...]] = {
    Rule("elementwise", "relu"): (nn.ReLU, F.relu, torch.relu, "relu"),
    Rule("elementwise", "relu6"): (nn.ReLU6, F.relu6),
    Rule("elementwise"): (
        *(nn.Hardtanh, F.hardtanh, nn.LeakyReLU, F.leaky_relu, nn.ELU, F.elu, nn.SELU, F.selu, torch.selu),
        *(nn.CELU, F.celu, torch.celu, nn.GELU, F.gelu, nn.SiLU, F.silu, nn.Mish, F.mish),
        *(nn.Sigmoid, F.sigmoid, torch.sigmoid, "sigmoid", nn.Tanh, F.tanh, torch.tanh, "tanh"),
        *(nn.Hardswish, F.hardswish, nn.Hardsigmoid, F.hardsigmoid, nn.Softplus, F.softplus),
        *(nn.LogSigmoid, F.logsigmoid, nn.Softsign, F.softsign),
        *(torch.clamp, "clamp", torch.clamp_min, "clamp_min", torch.clamp_max, "clamp_max"),
        *(torch.neg, operator.neg, "neg", torch.abs, "abs", torch.rsub),
        *(torch.erf, "erf", torch.sin, "sin", torch.cos, "cos"),
        *(torch.clone, "clone", "contiguous", "detach", "float", "double", "half", "bfloat16"),
        *(f"{_TIMM}.{name}" for name in (*_TIMM_TWICE, "Sigmoid", "Tanh", "GELU", "GELUTanh", "QuickGELU")),
        *(f"{_TIMM}_me.{name}Me" for name in _TIMM_TWICE),
    ),
    Rule("elementwise", steady=False): (
        *(torch.exp, "exp", torch.square, "square", torch.sqrt, "sqrt", torch.pow, operator.pow, "pow"),
        *(torch.log1p, "log1p", torch.expm1, "expm1"),
    ),
    Rule("spatial"): (
        *(nn.MaxPool2d, F.max_pool2d, torch.max_pool2d, nn.AvgPool2d, F.avg_pool2d),
        *(nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d, nn.AdaptiveMaxPool2d, F.adaptive_max_pool2d),
        *(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, F.interpolate),
        *(nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d),
        *("timm.layers.pool2d_same.AvgPool2dSame", "timm.layers.pool2d_same.MaxPool2dSame"),
    ),
    Rule("spatial", steady=False): (nn.LPPool2d, F.lp_pool2d),
    Rule("reduction"): (torch.mean, "mean", torch.sum, "sum", torch.amax, "amax", torch.amin, "amin"),
    Rule("identity"): (
        *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
        *(F.dropout, F.dropout2d, F.alpha_dropout),
    ),
    Rule("binary", "add"): (operator.add, torch.add, "add"),
    Rule("binary"): (operator.sub, torch.sub, "sub", torch.maximum, torch.minimum),
    Rule("binary", steady=False): (operator.mul, torch.mul, "mul", operator.truediv, torch.div, "div"),
    Rule("concat"): (torch.cat, torch.concat),
    Rule("split"): (
        *(operator.getitem, torch.chunk, "chunk", torch.split, "split", torch.tensor_split, "tensor_split"),
        *(torch.split_with_sizes, "split_with_sizes", torch.narrow, "narrow"),
    ),
    Rule("shuffle"): (nn.ChannelShuffle, torch.channel_shuffle, F.channel_shuffle),
    Rule("move"): (
        *(torch.reshape, "reshape", "view", torch.flatten, "flatten", torch.unflatten, "unflatten", nn.Flatten),
        *(torch.transpose, "transpose", torch.permute, "permute"),
        *(torch.swapaxes, "swapaxes", torch.swapdims, "swapdims"),
    ),
    Rule("squeeze"): (torch.squeeze, "squeeze"),
    Rule("size"): ("size", "dim", "ndimension"),
    Rule("product"): (
        *(F.linear, F.bilinear, F.conv1d, F.conv2d, F.conv3d),
        *(F.multi_head_attention_forward, F.scaled_dot_product_attention),
        *(torch.matmul, operator.matmul, "matmul", "__matmul__", torch.mm, "mm", torch.bmm, "bmm"),
        *(torch.addmm, "addmm", torch.einsum, torch.tensordot),
    ),
}
_RULES: dict[Any, Rule] = {spelling: rule for rule, spellings in _TABLE.items() for spelling in spellings}
# a + b = b + a.
COMMUTATIVE = (operator.add, torch.add, operator.mul, torch.mul)
_SIZE_ATTRIBUTES = ("shape", "dtype", "device", "ndim")
_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_")
# {operator.iadd: operator.add, ...}
_WITHOUT_WRITING: dict[Any, Any] = {
    getattr(operator, f"i{name.rstrip('_')}"): getattr(operator, name) for name in _OPERATORS
}
_BLUR = "timm.layers.blur_pool.BlurPool2d"
_SAME = "timm.layers.conv2d_same.Conv2dSame"


class Call:
    """A function or a method with everything but its first arguments, the tensors."""

    def __init__(self, target: Callable[..., Any] | str, args: tuple[Any, ...] = (), **kwargs: Any) -> None:
        self.target = target
        self.args = args
        self.kwargs = kwargs

    def __call__(self, *tensors: Any, **kwargs: Any) -> Any:
        """Calls it on tensors."""
        if isinstance(self.target, str):
            return getattr(tensors[0], self.target)(*tensors[1:], *self.args, **self.kwargs, **kwargs)
        return self.target(*tensors, *self.args, **self.kwargs, **kwargs)

    def __repr__(self) -> str:
        if isinstance(self.target, nn.Module):
            return type(self.target).__name__
        return _name_of(self.target) or type(self.target).__name__


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


def has_hooks(module: nn.Module) -> bool:
    """Whether something else runs when the module is called."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def class_name(module: nn.Module) -> str:
    """The name of a module's class with that of its Python module."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def is_same_padded_conv(conv: nn.Module) -> bool:
    """Whether it is timm's convolution with TensorFlow's padding and a weight of its own."""
    plain = conv._parameters.get("weight") is not None and not nn.utils.parametrize.is_parametrized(conv)
    return class_name(conv) == _SAME and plain and not has_hooks(conv)


def _name_of(target: Any) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", "")


def _is_written(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def rule_of(target: Any) -> Rule | None:
    """The rule for a layer, a function or a method's name, whatever its arguments are; None if there is none.

    Examples:
        >>> from torch import nn
        >>> from bap_kernels.flow.ops import rule_of
        >>> rule_of(nn.MaxPool2d(2)).kind, rule_of("add").kind, rule_of(nn.Linear(2, 2))
        ('spatial', 'binary', None)
    """
    if isinstance(target, nn.Module):
        return _RULES.get(type(target)) or _RULES.get(class_name(target))
    try:
        return _RULES.get(target)
    except TypeError:  # not hashable
        return None


def writes_to_input(target: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a layer, function or method writes to its first argument, as its name or ``inplace`` tells."""
    if isinstance(target, nn.Module):
        return bool(getattr(target, "inplace", False))
    if isinstance(target, str):
        return _is_written(target)
    return target in _WITHOUT_WRITING or bool(kwargs.get("inplace", False)) or _is_written(_name_of(target))


def out_of_place(target: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The same layer, function or method without writing to its first argument, where one is known."""
    if isinstance(target, nn.Module):
        if getattr(target, "inplace", False):
            target = copy.copy(target)
            target.inplace = False
        return target, kwargs
    if isinstance(target, str):
        return target[:-1] if _is_written(target) else target, kwargs
    name = _name_of(target)
    for functions in (torch, F) if _is_written(name) else ():
        if getattr(functions, name, None) is target:
            target = getattr(functions, name[:-1], target)
    return _WITHOUT_WRITING.get(target, target), {key: value for key, value in kwargs.items() if key != "inplace"}


def call_rule(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rule | None:
    """The rule for a call of a function or method that keeps the channels of one tensor apart; None for other calls.

    Args:
        target: the function, or the name of the method.
        args, kwargs: what follows the tensor.
    """
    rule = rule_of(target)
    if rule is None or isinstance(target, nn.Module):
        return None
    if rule.kind == "reduction":
        return rule if _reduces_pixels(args, kwargs) else None
    if rule.kind == "elementwise":
        # A positional `inplace` would write; its meaning depends on the function.
        written = not isinstance(target, str) and any(value is True for value in args)
        return None if written else rule
    return rule if rule.kind == "spatial" and kwargs.get("return_indices") is not True else None


def layer_rule(module: nn.Module) -> tuple[nn.Module, Rule] | None:
    """(the layer, without writing to its input; its rule) for layers that keep channels apart, batch norms aside."""
    if type(module) is nn.PReLU and module.num_parameters == 1:
        return module, Rule("spatial")  # its slope has a dtype, which constants may not have
    rule = rule_of(module)
    if rule is not None and rule.elementwise:
        return out_of_place(module, {})[0], rule
    if rule is not None and rule.kind == "spatial" and not getattr(module, "return_indices", False):
        return module, rule
    blur = Blur.of(module)
    return None if blur is None else (blur, Rule("spatial"))


def binary_rule(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rule | None:
    """The rule for functions of two tensors that keep channels apart; ``args`` and ``kwargs`` follow the two."""
    rule = None if args or kwargs else rule_of(target)
    return rule if rule is not None and rule.kind == "binary" else None


def _reduces_pixels(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    axes = kwargs.get("dim", args[0] if args else None)
    keeps = kwargs.get("keepdim", args[1] if len(args) > 1 else False)
    axes = (axes,) if isinstance(axes, int) else axes
    if keeps is not True or not isinstance(axes, (tuple, list)) or not axes:
        return False
    return all(isinstance(axis, int) and axis % 4 in (2, 3) for axis in axes)


def passes_input(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether in eval mode the result is the first argument itself; ``args`` and ``kwargs`` follow that one."""
    rule = rule_of(target)
    if isinstance(target, nn.Module):
        return rule is not None and rule.kind == "identity"
    if rule is not None and rule.kind == "identity":
        return kwargs.get("training", args[1] if len(args) > 1 else True) is False
    if _name_of(target) == "stochastic_depth":
        return kwargs.get("training", args[2] if len(args) > 2 else True) is False
    return False


def asks_size(target: Any, args: tuple[Any, ...]) -> bool:
    """Whether a call tells a tensor's shape, dtype or device; ``args`` follow the tensor."""
    if target is getattr:
        return len(args) == 1 and args[0] in _SIZE_ATTRIBUTES
    rule = rule_of(target)
    return rule is not None and rule.kind == "size" and len(args) <= 1 and all(isinstance(axis, int) for axis in args)


def is_spatial_slice(target: Any, args: tuple[Any, ...]) -> bool:
    """Whether a call is x[:, :, ::2, ::2] or the like: the shortcut of residual networks on small images."""
    if _name_of(target) != "getitem" or len(args) != 1 or not isinstance(args[0], tuple):
        return False
    whole = slice(None)
    return len(args[0]) >= 2 and all(isinstance(part, slice) for part in args[0]) and args[0][:2] == (whole, whole)
