"""The steps of a planned network that are convolutions.

Weights are read from the model's own parameters at every call; only filters of depthwise and grouped convolutions,
folded with their batch norm, are copies.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bap_kernels._load import _C
from bap_kernels.functional import plain_conv2d
from bap_kernels.plan.steps import Env, Step, selected

__all__ = ["ConvStep", "DepthwiseStep", "GroupedStep"]

_fused = torch.ops.bap_kernels._gathered_conv2d_fused.default
_CPU_BACKENDS = ("auto", "heuristic", "native", "aten")


class ConvStep(Step):
    """A convolution with lists and all that was fused into it.

    Attributes:
        out_max: the largest result that the ReLU leaves; None: there is none.
        cast: the dtype in which it computes under autocast; None: the weight's.
        dual_store: the slot of a second, compact store of the result's channels ``dual_index``; None: there is none.
    """

    out_max: float | None = None
    dual_store: int | None = None
    dual_index: Tensor | None = None

    def __init__(
        self,
        conv: nn.Conv2d,
        padding: tuple[int, int, int, int],
        lists: tuple[Tensor | None, Tensor | None, Tensor | None],
        before: tuple[Tensor | None, Tensor | None, bool],
        after: tuple[Tensor | None, Tensor | None],
        relu: bool,
        reads: tuple[int, ...],
        out: int,
        cast: torch.dtype | None = None,
    ) -> None:
        self.cast = cast
        self.parameters: dict[str, Any] = conv._parameters
        self.stride, self.padding, self.dilation = tuple(conv.stride), padding, tuple(conv.dilation)
        self.in_index, self.out_index, self.weight_index = lists
        self.before, self.after = before, after
        self.relu = relu
        self.reads, self.out = reads, out
        self.residual = reads[1] if len(reads) > 1 else None
        self._options: tuple[Any, ...] = (self.stride, self.padding, self.dilation, 1)

    def __call__(self, env: Env) -> None:  # noqa: D102
        parameters = self.parameters
        weight, bias = parameters["weight"], parameters["bias"]
        residual = None if self.residual is None else env[self.residual]
        x = env[self.reads[0]]
        if self.cast is not None:
            x, weight, bias = x.to(self.cast), weight.to(self.cast), None if bias is None else bias.to(self.cast)
        lists = (self.in_index, self.out_index)
        fusion: Any = (*self.before, *self.after, residual, self.relu, True, self.weight_index, self.dual_index)
        fusion += (self.out_max,)
        if torch.compiler.is_compiling():
            result = _fused(x, weight, bias, *lists, *self._options, *fusion)
        else:
            result = _C.gathered_conv2d_fused(x, weight, bias, *lists, *self._options, *fusion)
        env[self.out], second = result
        if self.dual_store is not None:
            env[self.dual_store] = second

    def join(self, run: _C.StepRun, freed: tuple[int, ...]) -> bool:  # noqa: D102
        lists = (self.in_index, self.out_index, self.weight_index, self.dual_index)
        after = (*self.after, self.relu)
        slots = (self.reads[0], self.residual, self.out, self.dual_store)
        run.add_conv(*slots, freed, self.parameters, lists, self._options, self.before, after, self.out_max, self.cast)
        return True

    @property
    def writes(self) -> tuple[int, ...]:  # noqa: D102
        return (self.out,) if self.dual_store is None else (self.out, self.dual_store)

    @property
    def kind(self) -> str:
        """Its name in the table, with what it does."""
        parts = ["norm+" if self.before[0] is not None else "", "relu+" if self.before[2] else "", "conv"]
        parts += ["+norm" if self.after[1] is not None else "", "+add" if self.residual is not None else ""]
        return "".join(parts) + _name_of_relu(self.relu, self.out_max)


class DepthwiseStep(Step):
    """A depthwise convolution of compact tensors; its filters are copies with the batch norm folded in.

    On a GPU, and where one of its backends is named, it is PyTorch's: these backends have no depthwise kernels.

    Args:
        options: stride, padding, dilation and groups.
        sides: the padding of four sides.
        weight, bias: the filters.
        relu, out_max: what follows, as in :class:`ConvStep`.
        x, out: slots.
        cast: as in :class:`ConvStep`.
    """

    def __init__(
        self,
        options: tuple[Any, ...],
        sides: tuple[int, int, int, int],
        weight: Tensor,
        bias: Tensor | None,
        relu: bool,
        out_max: float | None,
        x: int,
        out: int,
        cast: torch.dtype | None = None,
    ) -> None:
        self.weight, self.bias = weight, bias
        self.options = options
        self.relu, self.out_max = relu, out_max
        self.reads, self.out = (x,), out
        self.cast = cast
        stride, _, dilation, groups = options
        self._options: tuple[Any, ...] = (stride, sides, dilation, groups)

    def __call__(self, env: Env) -> None:  # noqa: D102
        x, weight, bias = env[self.reads[0]], self.weight, self.bias
        compiling = torch.compiler.is_compiling()
        if x.device.type != "cpu" or not (compiling or _C.get_backend() in _CPU_BACKENDS):
            y = plain_conv2d(x, weight, bias, *self.options)
            if self.relu:
                y = torch.relu_(y) if self.out_max is None else F.hardtanh_(y, 0.0, self.out_max)
            env[self.out] = y
            return
        if self.cast is not None:
            x, weight, bias = x.to(self.cast), weight.to(self.cast), None if bias is None else bias.to(self.cast)
        fusion: Any = (None, None, False, None, None, None, self.relu, True, None, None, self.out_max)
        if compiling:
            result = _fused(x, weight, bias, None, None, *self._options, *fusion)
        else:
            result = _C.gathered_conv2d_fused(x, weight, bias, None, None, *self._options, *fusion)
        env[self.out] = result[0]

    def join(self, run: _C.StepRun, freed: tuple[int, ...]) -> bool:  # noqa: D102
        parameters = {"weight": self.weight, "bias": self.bias}
        before, after = (None, None, False), (None, None, self.relu)
        fused = (self._options, before, after, self.out_max, self.cast)
        run.add_conv(self.reads[0], None, self.out, None, freed, parameters, (None,) * 4, *fused)
        return True

    @property
    def kind(self) -> str:
        """Its name in the table, with what it does."""
        return "depthwise" + _name_of_relu(self.relu, self.out_max)


class GroupedStep(Step):
    """A grouped convolution of whole groups, of whose result ``index`` is kept; None keeps all.

    Args:
        options: stride, padding, dilation and groups.
        weight, bias: the filters, copies with the batch norm folded in.
        x, out: slots.
    """

    index: Tensor | None = None

    def __init__(self, options: tuple[Any, ...], weight: Tensor, bias: Tensor | None, x: int, out: int) -> None:
        self.weight, self.bias = weight, bias
        self.options = options
        self.reads, self.out = (x,), out

    def __call__(self, env: Env) -> None:  # noqa: D102
        y = plain_conv2d(env[self.reads[0]], self.weight, self.bias, *self.options)
        env[self.out] = y if self.index is None else selected(y, self.index)


def _name_of_relu(relu: bool, out_max: float | None) -> str:
    return ("+relu" if out_max is None else f"+relu{out_max:g}") if relu else ""
