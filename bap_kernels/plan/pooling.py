"""Poolings of a plan's tensors, by our own kernels on CPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bap_kernels._load import _C
from bap_kernels.flow.ops import Call, has_hooks
from bap_kernels.nn.replaceable import has_own_forward
from bap_kernels.plan.replaced_call import ReplacedCall

__all__ = ["Pooling", "pooling_of"]

_Pair = tuple[int, int]
_MAX_ARGUMENTS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_AVERAGE_ARGUMENTS = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
# By target of a call, and for layers by class: which pooling it is, and the names of its arguments.
_POOLINGS: dict[Any, tuple[str, tuple[str, ...]]] = {
    **dict.fromkeys((nn.MaxPool2d, F.max_pool2d, torch.max_pool2d), ("max", _MAX_ARGUMENTS)),
    **dict.fromkeys((nn.AvgPool2d, F.avg_pool2d), ("average", _AVERAGE_ARGUMENTS)),
    **dict.fromkeys((nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d), ("adaptive", ("output_size",))),
}


class Pooling(ReplacedCall):
    """A pooling: (N, C, H, W) -> (N, C, H', W')."""

    def join(self, run: _C.StepRun, x: int, out: int, freed: tuple[int, ...]) -> bool:
        """As :meth:`Step.join <bap_kernels.plan.steps.Step.join>`, from one slot to another."""
        raise NotImplementedError


class _Max(Pooling):
    def __init__(
        self, call: Callable[[Tensor], Any], kernel: _Pair, stride: _Pair, padding: _Pair, dilation: _Pair, ceil: bool
    ) -> None:
        super().__init__(call)
        self.window = kernel, stride, padding, dilation, ceil

    def run(self, x: Tensor) -> Any:
        return _C.max_pool2d(x, *self.window) if x.dim() == 4 else self.original(x)

    def join(self, run: _C.StepRun, x: int, out: int, freed: tuple[int, ...]) -> bool:
        run.add_max_pool(x, out, freed, *self.window)
        return True


class _Average(Pooling):
    def __init__(self, call: Callable[[Tensor], Any], kernel: _Pair, stride: _Pair) -> None:
        super().__init__(call)
        self.window = kernel, stride

    def run(self, x: Tensor) -> Any:
        return _C.avg_pool2d(x, *self.window) if x.dim() == 4 else self.original(x)

    def join(self, run: _C.StepRun, x: int, out: int, freed: tuple[int, ...]) -> bool:
        run.add_avg_pool(x, out, freed, *self.window)
        return True


class _GlobalAverage(Pooling):
    def run(self, x: Tensor) -> Any:
        return _C.global_avg_pool2d(x) if x.dim() == 4 else self.original(x)

    def join(self, run: _C.StepRun, x: int, out: int, freed: tuple[int, ...]) -> bool:
        run.add_global_avg_pool(x, out, freed)
        return True


def _pair(value: Any) -> _Pair | None:
    """The two integers that a setting stands for; None for anything else."""
    if type(value) is int:
        return value, value
    if isinstance(value, (tuple, list)) and len(value) in (1, 2) and all(type(part) is int for part in value):
        return value[0], value[-1]
    return None


def _settings(call: Any) -> tuple[str, dict[str, Any]]:
    """Which pooling a call of one tensor is, and its arguments by name; ("", {}) for any other call."""
    target, args, kwargs = (call.target, call.args, call.kwargs) if isinstance(call, Call) else (call, (), {})
    if not isinstance(target, nn.Module):
        kind, names = _POOLINGS.get(target, ("", ()))
        return kind, {**dict(zip(names, args, strict=False)), **kwargs}
    kind, names = _POOLINGS.get(type(target), ("", ()))
    if has_hooks(target) or has_own_forward(target):
        return "", {}
    return kind, {name: getattr(target, name) for name in names}


def pooling_of(call: Any) -> Pooling | None:
    """The call as a pooling by our kernels, on float32 and bfloat16 tensors of a CPU; None if they do not know it.

    Max poolings and averages without padding are known, and ``F.adaptive_avg_pool2d(x, 1)``. PyTorch's max pooling
    finds the places of the maxima as well, and its means start slowly between other layers.
    """
    kind, settings = _settings(call)
    if kind == "adaptive":
        size = settings.get("output_size")
        is_global = size == 1 or (isinstance(size, (tuple, list)) and tuple(size) == (1, 1))
        return _GlobalAverage(call) if is_global else None
    if not kind:
        return None
    kernel = _pair(settings.get("kernel_size"))
    stride = kernel if settings.get("stride") in (None, (), []) else _pair(settings["stride"])
    padding = _pair(settings.get("padding", 0))
    if kernel is None or stride is None or padding is None:
        return None
    ceil = settings.get("ceil_mode", False)
    if kind == "max":
        dilation = _pair(settings.get("dilation", 1))
        if dilation is None or settings.get("return_indices", False) is not False or type(ceil) is not bool:
            return None
        return _Max(call, kernel, stride, padding, dilation, ceil)
    if padding != (0, 0) or ceil is not False or settings.get("divisor_override") is not None:
        return None
    return _Average(call, kernel, stride)
