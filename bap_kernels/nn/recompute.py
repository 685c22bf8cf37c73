"""Regions of a network whose inner tensors are computed again in the backward instead of being kept.

A step of training keeps, for each convolution after batch norm and ReLU, the input of the batch norm and that of the
convolution. In a region that reads the first and ends with the convolution only the first stays, and batch norm and
ReLU, which cost little, run twice. The convolution that ends a region is not computed again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from bap_kernels._arguments import check_module
from bap_kernels.layer_kinds import DomainLayer
from bap_kernels.nn.in_backward import replaying
from bap_kernels.nn.per_domain import PerDomain

__all__ = ["RecomputedForward", "held_input", "is_recomputed", "recompute", "recompute_"]


class _Hold(torch.autograd.Function):
    """Saves its input as checkpointing does, for the convolution that reads the result."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.save_for_backward(input)
        return input.view_as(input)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return grad_output


@contextlib.contextmanager
def held_input(input: Tensor) -> Iterator[Tensor]:
    """In a checkpoint, lets the op that is called on the result save its input at once, before it computes anything.

    Recomputing stops as soon as all that the backward needs is there again. An operator of a library saves after its
    forward, and would be computed again for nothing.
    """
    if not torch.is_grad_enabled() or not input.requires_grad:
        yield input
        return
    kind = input.device.type
    if torch.is_autocast_enabled(kind) and input.dtype != torch.float64:
        # The op would save its own cast of it.
        input = input.to(torch.get_autocast_dtype(kind))
    held = _Hold.apply(input)
    node = held.grad_fn
    place = held.data_ptr(), held.shape, held.stride(), held.dtype

    def pack(tensor: Tensor) -> Any:
        same = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) == place
        return node if same else tensor

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed.saved_tensors[0]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield held


_ABSENT = object()


def _state_names(module: nn.Module) -> tuple[str, ...]:
    """Attributes that decide what a forward computes and that may have changed by the time of the backward."""
    return ("training", module._state_name, "_mixed") if isinstance(module, DomainLayer) else ("training",)


def _used_modules(module: nn.Module) -> Iterator[nn.Module]:
    """A module and those inside it, repeats included; of layers with domains only the modules of domains in use."""
    yield module
    children: Iterable[nn.Module | None] = module._modules.values()
    if isinstance(module, PerDomain):
        children = [module._active] if module._mixed is None else module._mixed.states
    for child in children:
        if child is not None:
            yield from _used_modules(child)


class _Replay:
    """The state of a region's modules at its forward; as a context it brings that state back for a second forward."""

    def __init__(self, module: nn.Module) -> None:
        modules = list(dict.fromkeys(_used_modules(module)))
        # These may be outside of the region.
        asked = [layer for module in modules if isinstance(module, DomainLayer) for layer in module._also_asks()]
        self.then = [
            (module.__dict__, name, module.__dict__.get(name, _ABSENT))
            for module in dict.fromkeys([*modules, *asked])
            for name in _state_names(module)
        ]
        # Running statistics were updated in the first forward; the second one updates copies.
        self.buffers = [module._buffers for module in modules if module.training and module._buffers]
        self.now: list[Any] = []
        self.kept: list[dict[str, Tensor | None]] = []

    def __enter__(self) -> None:
        self.now = [values.get(name, _ABSENT) for values, name, _ in self.then]
        self.kept = [dict(buffers) for buffers in self.buffers]
        for values, name, value in self.then:
            _put(values, name, value)
        for buffers in self.buffers:
            buffers.update({name: value.clone() for name, value in buffers.items() if value is not None})
        self.replaying = replaying(True)

    def __exit__(self, *error: object) -> None:
        replaying(self.replaying)
        for (values, name, _), value in zip(self.then, self.now, strict=True):
            _put(values, name, value)
        for buffers, kept in zip(self.buffers, self.kept, strict=True):
            buffers.update(kept)


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    if value is _ABSENT:
        values.pop(name, None)
    else:
        values[name] = value


def _recomputed(function: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # A compiler decides by itself what it computes again; torch.fx records what is inside.
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or _is_recorded(args, kwargs):
        return function(*args, **kwargs)
    replay = _Replay(module)
    return checkpoint(
        function, *args, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), replay), **kwargs
    )


def recompute(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Calls a module and keeps none of the tensors inside it; the backward computes them again from the inputs.

    It is :func:`torch.utils.checkpoint.checkpoint` (not reentrant) for layers with domains. The second forward sees the
    domain or the mixed batch and the mode of the first, whatever was set meanwhile, so one backward can serve the
    losses of several domains; running statistics of batch norm change once, and forwards are counted once. A
    :class:`~bap_kernels.nn.SwitchedConv2d` at the end of the module is not computed again. Forward hooks of the module
    run twice. Under torch.compile the module is called as it is: the compiler decides what to recompute.

    Args:
        module: best a batch norm, a ReLU and a convolution in :class:`torch.nn.Sequential`. Of a network of them a
            step keeps one tensor for each convolution, the input of its batch norm, and not two. Of a whole residual
            block it keeps the input only, but its inner convolutions run again.
        args, kwargs: for the module.

    Returns:
        What the module returns; gradients are the same too.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import bap_kernels as bk
        >>> part = bk.nn.switch_(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)), ["birds"])
        >>> bk.set_domain(part, "birds")
        >>> bk.nn.recompute(part, torch.randn(2, 8, 5, 5)).sum().backward()
        >>> part[0].domains["birds"].num_batches_tracked
        tensor(1)
    """
    check_module("recompute", module, "module")
    return _recomputed(module, module, *args, **kwargs)


def _is_recorded(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(isinstance(leaf, torch.fx.Proxy) for leaf in tree_leaves((args, kwargs)))


class RecomputedForward:
    """Takes the place of a module's forward.

    Attributes:
        module: whose forward it is.
        own: a forward that the module had as an attribute before, such as a wrapper of another library; None: that of
            its class.
    """

    def __init__(self, module: nn.Module, own: Callable[..., Any] | None = None) -> None:
        self.module = module
        self.own = own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the forward, and keeps none of the tensors inside it."""
        module = self.module
        forward = type(module).forward.__get__(module) if self.own is None else self.own
        return _recomputed(forward, module, *args, **kwargs)


def is_recomputed(module: nn.Module) -> bool:
    """Whether :func:`recompute_` chose this module."""
    return isinstance(module.__dict__.get("forward"), RecomputedForward)


def recompute_(model: nn.Module, filter_fn: Callable[[nn.Module, str], bool]) -> nn.Module:
    """Makes chosen modules of a model run as by :func:`recompute` from now on, in place; keys and hooks stay.

    Args:
        model: any module.
        filter_fn: ``filter_fn(module, name) -> bool``; True chooses a module, and its inner modules are then not asked.

    Returns:
        ``model``.

    Raises:
        ValueError: if nothing was chosen.

    Examples:
        >>> import torchvision
        >>> import bap_kernels as bk
        >>> model = torchvision.models.resnet18()
        >>> model = bk.nn.recompute_(model, lambda module, name: type(module).__name__ == "BasicBlock")
    """
    check_module("recompute_", model)
    chosen: list[str] = []
    for name, module in model.named_modules():
        inside = any(not other or name.startswith(other + ".") for other in chosen)
        if not inside and filter_fn(module, name):
            chosen.append(name)
            if not is_recomputed(module):
                module.forward = RecomputedForward(module, module.__dict__.get("forward"))
    if not chosen:
        raise ValueError("recompute_(): expected `filter_fn` to choose a module of `model`, got none.")
    return model
