"""Milliseconds of every switched convolution on this machine, so that a budget can be given in milliseconds.

The time of a layer that reads k of its C channels is fitted by t(k) = fixed + slope · k: the slope is what a channel
costs. The fit is of medians, for k of 1/4, 1/2, 3/4 and all channels.
"""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

import bap_kernels as bk
from bap.models import evaluating
from bap.prune.layers import switched_layers

__all__ = ["LayerTimes", "measure_layers"]


@dataclass(frozen=True)
class LayerTimes:
    """Measured milliseconds of one call.

    Args:
        per_channel: {layer: slope}, at least a thousandth of the layer's dense time shared by its channels, so that
            no channel is free.
        fixed: sum over the layers of what they take without any channel.
    """

    per_channel: dict[str, float]
    fixed: float


def _keep(inputs: dict[str, Tensor], name: str, module: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
    inputs.setdefault(name, given[0].detach())


def _median(layer: nn.Module, x: Tensor, rounds: int) -> float:
    times = []
    for number in range(rounds + 2):
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        started = time.perf_counter()
        layer(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        if number >= 2:
            times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


@torch.no_grad()
def measure_layers(model: nn.Module, example: Tensor, rounds: int = 9, backend: str | None = None) -> LayerTimes:
    """Measures the layers of a model one by one, in eval mode, on the inputs that they get.

    Args:
        model: a model that went through :func:`bap_kernels.nn.switch_`, with an active domain; it is not changed.
        example: (N, 3, H, W), as in deployment.
        rounds: calls of which the median is taken.
        backend: kernels to measure; None: the active ones.

    Raises:
        ValueError: if the model has no switches that ``example`` reaches.
    """
    inputs: dict[str, Tensor] = {}
    layers = dict(switched_layers(model))
    handles = [layer.register_forward_hook(partial(_keep, inputs, name)) for name, layer in layers.items()]
    try:
        with evaluating(model):
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    if not inputs:
        raise ValueError("measure_layers(): expected `model` to have switches that `example` reaches, got none.")
    per_channel, fixed = {}, 0.0
    for name, x in inputs.items():
        layer = layers[name]
        # A copy for inference, with lists of its own.
        gathered = copy.deepcopy(layer).to_gathered().eval()
        width = layer.in_channels
        widths = sorted({max(1, width * part // 4) for part in (1, 2, 3, 4)})
        times = []
        for kept in widths:
            index = [round(channel) for channel in np.linspace(0, width - 1, kept)]
            lists = bk.ChannelLists(sorted(set(index)))
            gathered.attach({"measured": lists})
            gathered.set_domain("measured")
            if backend is None:
                times.append(_median(gathered, x, rounds))
            else:
                with bk.use_backend(backend):
                    times.append(_median(gathered, x, rounds))
        slope = float(np.polyfit(widths, times, 1)[0]) if len(widths) > 1 else times[0] / width
        slope = max(slope, 1e-3 * times[-1] / width)
        per_channel[name] = slope
        fixed += max(0.0, times[-1] - slope * width)
    return LayerTimes(per_channel, fixed)
