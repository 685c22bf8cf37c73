"""Which layers and functions keep channels apart, and how to call them without writing to their input."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bap_kernels.nn.recording import has_hooks
from bap_kernels.plan.graph import Op
from bap_kernels.plan.leaves import Blur, is_elementwise, is_spatial
from bap_kernels.plan.leaves import out_of_place as layer_out_of_place

__all__ = [
    "COMMUTING",
    "Call",
    "dense_size",
    "has_hooks",
    "in_place",
    "is_size",
    "known_binary",
    "known_layer",
    "known_map",
    "only_passes",
    "out_of_place",
    "shape_of",
    "size_of",
    "spatial_slice",
]

# Each result is a function of one number.
_ELEMENTWISE_LAYERS: tuple[type[nn.Module], ...] = (
    *(nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.LogSigmoid, nn.Softsign),
)
# Each result is a function of one channel's pixels, and of zeros a zero.
_SPATIAL_LAYERS: tuple[type[nn.Module], ...] = (
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.LPPool2d),
    *(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
    *(nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d),
)
# In eval mode their result is their input itself.
_PASSING_LAYERS = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)

_ELEMENTWISE: dict[Any, str] = {
    **{F.relu: "relu", torch.relu: "relu", F.relu6: "relu6", F.hardtanh: "", F.leaky_relu: "", F.elu: "", F.selu: ""},
    **{F.celu: "", F.gelu: "", F.silu: "", F.mish: "", F.sigmoid: "", torch.sigmoid: "", F.tanh: "", torch.tanh: ""},
    **{F.hardswish: "", F.hardsigmoid: "", F.softplus: "", F.logsigmoid: "", F.softsign: "", torch.clamp: ""},
    **{torch.clone: "", torch.neg: "", torch.abs: "", torch.exp: "", torch.square: "", torch.sqrt: "", torch.pow: ""},
    **{operator.neg: "", operator.pow: "", torch.rsub: "", torch.erf: "", torch.sin: "", torch.cos: ""},
    **{torch.clamp_min: "", torch.clamp_max: "", torch.selu: "", torch.celu: "", torch.log1p: "", torch.expm1: ""},
}
_SPATIAL = (
    *(F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.lp_pool2d, F.interpolate),
    torch.max_pool2d,
)
_ELEMENTWISE_METHODS = {
    **{"relu": "relu", "sigmoid": "", "tanh": "", "clamp": "", "contiguous": "", "clone": "", "neg": "", "abs": ""},
    **{"exp": "", "square": "", "sqrt": "", "pow": "", "erf": "", "sin": "", "cos": "", "clamp_min": "", "float": ""},
    **{"clamp_max": "", "detach": "", "log1p": "", "expm1": "", "double": "", "half": "", "bfloat16": ""},
}
# Over pixels they keep channels apart where they keep the axes.
_REDUCTIONS = (
    *(torch.mean, torch.sum, torch.amax, torch.amin),
    *("mean", "sum", "amax", "amin"),
)
_SIZES = ("size", "dim", "ndimension")
_ATTRIBUTES = ("shape", "dtype", "device", "ndim")
_BINARY = {
    operator.add: "add",
    operator.iadd: "add",
    torch.add: "add",
    operator.sub: "",
    operator.isub: "",
    torch.sub: "",
    operator.mul: "",
    operator.imul: "",
    torch.mul: "",
    operator.truediv: "",
    operator.itruediv: "",
    torch.div: "",
    torch.maximum: "",
    torch.minimum: "",
}
_BINARY_METHODS = {"add": "add", "sub": "", "mul": "", "div": ""}
# a + b = b + a; methods are called on the first.
COMMUTING = (operator.add, operator.iadd, torch.add, operator.mul, operator.imul, torch.mul)
_WITHOUT_WRITING: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    torch.relu_: torch.relu,
    F.relu_: F.relu,
    F.hardtanh_: F.hardtanh,
    F.leaky_relu_: F.leaky_relu,
    F.elu_: F.elu,
    torch.sigmoid_: torch.sigmoid,
    torch.tanh_: torch.tanh,
    torch.clamp_: torch.clamp,
}


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
        name = self.target if isinstance(self.target, str) else getattr(self.target, "__name__", None)
        return name or type(self.target).__name__


def in_place(target: object, kwargs: dict[str, Any], module: nn.Module | None) -> bool:
    """Whether a call writes to its first argument."""
    if module is not None:
        return bool(getattr(module, "inplace", False))
    if isinstance(target, str):
        return target.endswith("_") and not target.endswith("__")
    if target in (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.iand, operator.ior):
        return True
    name = getattr(target, "__name__", "")
    return bool(kwargs.get("inplace", False)) or (name.endswith("_") and not name.endswith("__"))


def out_of_place(target: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The same function without writing to its first argument, where one is known."""
    if isinstance(target, str):
        return (target[:-1] if target.endswith("_") and not target.endswith("__") else target), kwargs
    return _WITHOUT_WRITING.get(target, target), {key: value for key, value in kwargs.items() if key != "inplace"}


def known_map(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, str, bool] | None:
    """(call, activation's name, whether elementwise) for functions and methods that keep channels apart."""
    if target in _REDUCTIONS:
        return (Call(target, args, **kwargs), "", False) if _over_pixels(args, kwargs) else None
    if isinstance(target, str):
        if target in _ELEMENTWISE_METHODS:
            return Call(target, args, **kwargs), _ELEMENTWISE_METHODS[target], True
        return None
    try:
        if target in _ELEMENTWISE:
            # A positional `inplace` would write; its meaning depends on the function.
            if any(value is True for value in args):
                return None
            return Call(target, args, **kwargs), _ELEMENTWISE[target], True
        if target in _SPATIAL and kwargs.get("return_indices") is not True:
            return Call(target, args, **kwargs), "", False
    except TypeError:  # not hashable
        pass
    return None


def known_layer(module: nn.Module) -> tuple[nn.Module, str, bool] | None:
    """(layer, activation's name, whether elementwise) for layers that keep channels apart."""
    kind = type(module)
    if kind is nn.PReLU and module.num_parameters == 1:
        return module, "", False  # its slope has a dtype, which constants may not have
    if kind in _ELEMENTWISE_LAYERS or is_elementwise(module):
        return layer_out_of_place(module), {nn.ReLU: "relu", nn.ReLU6: "relu6"}.get(kind, ""), True
    if kind in _SPATIAL_LAYERS and not getattr(module, "return_indices", False):
        return module, "", False
    if is_spatial(module):
        return module, "", False
    blur = Blur.of(module)
    return None if blur is None else (blur, "", False)


def known_binary(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, str] | None:
    """(call, name) for functions of two tensors that keep channels apart."""
    if args or kwargs:
        return None
    if isinstance(target, str):
        return (Call(target), _BINARY_METHODS[target]) if target in _BINARY_METHODS else None
    return (Call(target), _BINARY[target]) if target in _BINARY else None


def _over_pixels(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    axes = kwargs.get("dim", args[0] if args else None)
    keeps = kwargs.get("keepdim", args[1] if len(args) > 1 else False)
    axes = (axes,) if isinstance(axes, int) else axes
    if keeps is not True or not isinstance(axes, (tuple, list)) or not axes:
        return False
    return all(isinstance(axis, int) and axis % 4 in (2, 3) for axis in axes)


def is_size(target: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call tells a tensor's shape, dtype or device."""
    if kwargs or len(rest) > 1:
        return False
    if target is getattr:
        return len(rest) == 1 and rest[0] in _ATTRIBUTES
    return isinstance(target, str) and target in _SIZES and all(isinstance(one, int) for one in rest)


def shape_of(x: torch.Tensor, channels: int) -> tuple[int, ...]:
    """The shape of a tensor of which only some channels are there."""
    return torch.Size((x.shape[0], channels, *x.shape[2:]))


def size_of(x: torch.Tensor, axis: int, channels: int) -> int:
    """One number of :func:`shape_of`."""
    return channels if axis % 4 == 1 else x.shape[axis]


def dense_size(op: Op) -> tuple[Call, tuple[Any, ...]]:
    """What a step of kind size calls on a tensor of which only some channels are there, and its other arguments."""
    channels = op.inputs[0].channels
    if op.args and isinstance(op.args[0], int):
        return Call(size_of, channels=channels), op.args
    return Call(shape_of, channels=channels), ()


def spatial_slice(target: Any, rest: tuple[Any, ...]) -> bool:
    """Whether a call is x[:, :, ::2, ::2] or the like: the shortcut of residual networks on small images."""
    if getattr(target, "__name__", "") != "getitem" or len(rest) != 1 or not isinstance(rest[0], tuple):
        return False
    whole = slice(None)
    return len(rest[0]) >= 2 and all(isinstance(one, slice) for one in rest[0]) and rest[0][:2] == (whole, whole)


def only_passes(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], module: nn.Module | None) -> bool:
    """Whether in eval mode the result is the first argument itself."""
    if module is not None:
        return type(module) in _PASSING_LAYERS
    if target in (F.dropout, F.dropout2d, F.alpha_dropout):
        return kwargs.get("training", args[1] if len(args) > 1 else True) is False
    if getattr(target, "__name__", "") == "stochastic_depth":
        return kwargs.get("training", args[2] if len(args) > 2 else True) is False
    return False
