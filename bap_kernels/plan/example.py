"""Finds the shapes of a model's tensors on an example, or on random images where none is given."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bap_kernels.flow.arguments import tensors_of
from bap_kernels.flow.graph import Graph
from bap_kernels.plan.trace import run_masked, trace

__all__ = ["conv_macs", "trace_shapes"]

# Sides of square images, tried in order: what networks for photographs and for small images are made for.
_SIDES = (224, 64, 32, 299, 28)
# A tensor larger than this says that the network is not for images of that size, such as attention over their pixels.
_MOST_BYTES = 2**30


def trace_shapes(
    op: str, model: nn.Module, example: Tensor | tuple[Any, ...] | None, domain: str | None, unread: bool = False
) -> Graph:
    """A graph of the model; of a model on the meta device its ``expected`` holds no data.

    Args:
        op: the caller's name, for messages.
        model: in eval mode.
        example: what to call it with; None tries one square image with as many channels as the first convolution reads.
        domain: whose lists.
        unread: keep operations whose result nothing reads.

    Raises:
        ValueError: as :func:`~bap_kernels.plan.trace.trace`, and if no example was given and none fits.
    """
    if example is not None:
        return trace(op, model, example if isinstance(example, tuple) else (example,), domain, unread)
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None:
        raise ValueError(f"{op}(): expected `model` to have convolutions, got none.")
    weight = first.weight
    # Code may look at the types of tensors and at numbers in them, so tensors without data serve models on meta only.
    is_meta = any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    error: ValueError | None = None
    with FakeTensorMode(allow_non_fake_inputs=True) if is_meta else contextlib.nullcontext():
        for side in _SIDES:
            shape = (1, first.in_channels, side, side)
            if is_meta:
                image = torch.empty(shape, dtype=weight.dtype, device=weight.device)
            else:
                image = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
            if not is_meta and _is_too_large(model, image, domain):
                error = error or ValueError(f"on an image of {side} x {side} pixels it makes tensors of over 1 GiB")
                continue
            try:
                return trace(op, model, (image,), domain, unread)
            except ValueError as refused:
                if "example_input" not in str(refused):
                    raise
                error = error or refused
    raise ValueError(
        f"{op}(): expected `model` to take one image, got an error on every size tried: {error}. "
        "Hint: give an `example_input`."
    ) from error


class _Bounded(TorchDispatchMode):
    """Raises at the first tensor of more than `_MOST_BYTES`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_of(result):
            if tensor.numel() * tensor.element_size() > _MOST_BYTES:
                raise _TooLargeError
        return result


class _TooLargeError(BaseException):
    """Not caught by a model's code."""


def _is_too_large(model: nn.Module, image: Tensor, domain: str | None) -> bool:
    """Whether a made-up image would take much memory and time; found without data, where the model's code allows it."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _Bounded():
            run_masked(model, domain, (torch.empty_like(image),), False)
    except _TooLargeError:
        return True
    except Exception:  # code that looks at numbers in tensors
        return False
    return False


def conv_macs(model: nn.Module, example: Tensor | tuple[Any, ...] | None, graph: Graph, domain: str | None) -> int:
    """Multiply-adds of every convolution that one call of a model runs, swapped or not, all channels kept.

    Args:
        model: in eval mode.
        example: what it is called with; None: images of the graph's size.
        graph: of the model.
        domain: one of the model's.
    """
    total = 0

    def count(conv: nn.Module, _: Any, y: Any) -> None:
        nonlocal total
        if isinstance(conv, nn.Conv2d) and isinstance(y, Tensor):
            total += y.numel() * (conv.in_channels // conv.groups) * conv.kernel_size[0] * conv.kernel_size[1]

    def inputs() -> tuple[Any, ...]:
        if example is not None:
            return example if isinstance(example, tuple) else (example,)
        device = next((parameter.device for parameter in model.parameters()), None)
        values = [op.output for op in graph.ops if op.kind == "input"]
        return tuple(torch.zeros(value.shape or (), dtype=value.dtype, device=device) for value in values)

    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            run_masked(model, domain, inputs(), False, count)
    except Exception:  # code that looks at numbers in tensors
        total = 0
        run_masked(model, domain, inputs(), False, count)
    return total
