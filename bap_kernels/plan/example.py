"""Learns a model's shapes where no example is at hand, from tensors without data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bap_kernels.plan.graph import Graph
from bap_kernels.plan.trace import trace

__all__ = ["trace_shapes"]

# Sides of square images, tried in order: what networks for photographs and for small images are made for.
_SIDES = (224, 64, 32, 299, 28)


def trace_shapes(
    op: str, model: nn.Module, example: Tensor | tuple[Any, ...] | None, domain: str | None, unread: bool = False
) -> Graph:
    """A graph of the model; without an example its ``expected`` holds no data.

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
    error: ValueError | None = None
    with FakeTensorMode(allow_non_fake_inputs=True):
        for side in _SIDES:
            shape = (1, first.in_channels, side, side)
            try:
                return trace(op, model, (torch.empty(shape, dtype=weight.dtype, device=weight.device),), domain, unread)
            except ValueError as refused:
                if "example_input" not in str(refused):
                    raise
                error = error or refused
    raise ValueError(
        f"{op}(): expected `model` to take one image, got an error on every size tried: {error}. "
        "Hint: give an `example_input`."
    ) from error
