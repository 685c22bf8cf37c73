"""Which filters and batch-norm channels each domain of a network needs: those that something reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bap_kernels.flow.liveness import Liveness
from bap_kernels.flow.norms import norm_parts
from bap_kernels.flow.ops import Call
from bap_kernels.nn.module_copy import copy_modules
from bap_kernels.plan.recording import Recording
from bap_kernels.plan.trace import same_widths, trace

__all__ = ["live_channels"]

_CONVS = ("conv", "depthwise", "grouped")


def live_channels(
    op: str, model: nn.Module, example_input: Tensor | tuple[Any, ...], domains: Iterable[str]
) -> dict[str, dict[str, Tensor]]:
    """{domain: {layer: (C_out,) bool}} of convolutions and batch norms: the channels of their results that are read.

    A filter is live if a consumer of its result reads it, directly or through batch norms, activations, pooling, sums
    and concatenations. What has no rule reads everything. Layers that the example does not reach are left out.

    Args:
        op: the caller's name, for messages.
        model: any network, with lists or switches as they are; its mode does not matter.
        example_input: what the model is called with. It is run on it once for all domains.
        domains: as for :func:`bap_kernels.set_domain`.

    Raises:
        ValueError: as :func:`bap_kernels.plan`, for unknown domains and models that cannot be recorded.
    """
    model = copy_modules(model).eval()
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    recording: Recording | None = None
    live: dict[str, dict[str, Tensor]] = {}
    for domain in domains:
        graph = trace(op, model, inputs, domain, unread=True, recording=recording)
        recording = graph.recording if same_widths(model) else None
        read = Liveness(graph, constants=False, extents=False).live
        layers = live[domain] = {}
        for operation in graph.ops:
            masks = {}
            if operation.kind in _CONVS or operation.kind == "norm":
                masks[operation.name] = torch.from_numpy(read[operation.output])
            elif isinstance(operation.call, Call) and isinstance(operation.call.target, nn.Module):
                masks = _all_channels(operation.name, operation.call.target)
            for name, mask in masks.items():
                # A layer that is used twice needs what either result needs.
                layers[name] = mask | layers.get(name, torch.zeros_like(mask))
    return live


def _all_channels(prefix: str, root: nn.Module) -> dict[str, Tensor]:
    """Masks of all channels for the layers of a module without a rule."""
    masks = {}
    for name, module in root.named_modules(prefix=prefix):
        parts = norm_parts(module)
        channels = module.out_channels if isinstance(module, nn.Conv2d) else None if parts is None else parts.channels
        if channels is not None:
            masks[name] = torch.ones(channels, dtype=torch.bool)
    return masks
