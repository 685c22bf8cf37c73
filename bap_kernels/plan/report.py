"""What each swapped layer of a network does on an example, how long it takes, the chosen backend and why."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bap_kernels._arguments import check_module
from bap_kernels._load import _C
from bap_kernels.flow.graph import first_reasons
from bap_kernels.functional import four_sided
from bap_kernels.nn.conv import GatheredConv2d
from bap_kernels.nn.swap import skipped
from bap_kernels.plan.planned import PlannedNetwork
from bap_kernels.plan.roofline import limit_of, measured_roofline
from bap_kernels.plan.trace import not_taken

__all__ = ["LayerReport", "NetworkReport", "report"]

_ROUNDS = 5


@dataclass(frozen=True)
class LayerReport:
    """One call of one layer.

    Attributes:
        name: the layer's.
        reads, writes: (kept, all) channels.
        macs: (kept, all) multiply-adds.
        bytes: (kept, all) bytes of the channels that are read and written and of the weight's slices.
        seconds: median time of the layer on its input; None for a backend that cannot be timed on the host.
        dense_seconds: of the dense convolution on the same input.
        backend: what ran it.
        why: how that was chosen, and why others were not; and why the weight is packed or compared at every call, where
            it is.
        limit: why it gains less over the dense convolution than its work lets it; empty where it does not.
        roofline_fraction: time that the machine's peaks allow for the kept work, over ``seconds``; above 1 where data
            stays in a cache, or where Winograd multiplies less often than ``macs`` says.
    """

    name: str
    reads: tuple[int, int]
    writes: tuple[int, int]
    macs: tuple[int, int]
    bytes: tuple[int, int]
    seconds: float | None
    dense_seconds: float | None
    backend: str
    why: str
    limit: str
    roofline_fraction: float | None = None

    @property
    def roof_share(self) -> float | None:
        """Deprecated: :attr:`roofline_fraction`."""
        warnings.warn(
            "LayerReport.roof_share is deprecated; use `roofline_fraction`.", DeprecationWarning, stacklevel=2
        )
        return self.roofline_fraction


@dataclass(frozen=True)
class NetworkReport:
    """All layers, in the order in which they ran; printing it shows a table.

    Attributes:
        layers: what ran.
        not_served: {layer: reason}, as :func:`bap_kernels.nn.skipped` gives it.
        verdicts: {kernel family: (verdict, reason)} on the GPU that it ran on; empty on CPUs. See
            :func:`bap_kernels.verify`.
    """

    layers: tuple[LayerReport, ...]
    not_served: dict[str, str] = field(default_factory=dict)
    verdicts: dict[str, tuple[str, str]] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [("layer", "reads", "writes", "MMAC", "of all", "MB", "ms", "x dense", "of roofline", "backend", "why")]
        for layer in self.layers:
            faster = layer.dense_seconds / layer.seconds if layer.seconds and layer.dense_seconds else None
            rows.append(
                (
                    layer.name,
                    f"{layer.reads[0]}/{layer.reads[1]}",
                    f"{layer.writes[0]}/{layer.writes[1]}",
                    f"{layer.macs[0] / 1e6:.2f}",
                    f"{layer.macs[0] / max(layer.macs[1], 1):.0%}",
                    f"{layer.bytes[0] / 1e6:.2f}",
                    "-" if layer.seconds is None else f"{layer.seconds * 1e3:.3f}",
                    "-" if faster is None else f"{faster:.2f}",
                    "-" if layer.roofline_fraction is None else f"{layer.roofline_fraction:.0%}",
                    layer.backend,
                    "; ".join(part for part in (layer.why, layer.limit) if part),
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(10)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[10]]) for row in rows
        ]
        kept, whole = (sum(layer.macs[side] for layer in self.layers) for side in (0, 1))
        lines.append(f"{len(self.layers)} layers, {kept:,} of {whole:,} MACs ({kept / max(whole, 1):.0%})")
        if self.not_served:
            lines.append(f"not served: {first_reasons(self.not_served, 10)}")
        if self.verdicts:
            left_out = {family: f"{name}, {why}" for family, (name, why) in self.verdicts.items() if name != "ok"}
            lines.append(f"kernel families: {len(self.verdicts) - len(left_out)} of {len(self.verdicts)} verified")
            lines += [f"  {family}: {why}" for family, why in left_out.items()]
        return "\n".join(lines)


def _medians(*runs: Callable[[], Any]) -> list[float]:
    """Median times; the rounds are interleaved, so that what else the machine does falls on all alike."""
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(_ROUNDS + 1):
        for run, its in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            if turn:
                its.append(time.perf_counter() - start)
    return [statistics.median(its) for its in times]


def _why(choice: dict[str, Any], on_gpu: bool = False) -> tuple[str, str]:
    """(backend, how it was chosen) from the library's own account."""
    named = _C.get_backend()
    own = ("cuda", "triton") if on_gpu else ("native",)
    reasons = [f"no {name}: {reason}" for name, reason in choice["unsupported"].items() if name in own and reason]
    if named == "heuristic":
        chosen = "aten" if on_gpu or choice["unsupported"].get("native") else "native"
        return chosen, "; ".join(["by the rule of use_backend('heuristic')", *reasons])
    if named != "auto":
        return named, "; ".join(["named by use_backend", *reasons])
    times = {name: f"{name} {seconds:.0f}" for name, seconds in choice["candidates"].items()}
    if choice["backend"] is None:
        return "auto", "; ".join(["nothing to choose for an empty call", *reasons])
    if len(times) < 2:
        return choice["backend"], "; ".join(["the only candidate", *reasons])
    if choice["backend"].startswith("winograd"):
        reasons.append("the roofline counts the multiplications of a direct convolution, so more than 100% is possible")
    return choice["backend"], "; ".join([f"measured in us: {', '.join(times.values())}", *reasons])


def _explained(name: str, layer: GatheredConv2d, x: Tensor, y: Tensor) -> LayerReport:
    lists = layer.channels
    K_in, K_out = (all_of if kept is None else kept for kept, all_of in zip(lists.counts, _widths(layer), strict=True))
    taps = layer.weight.shape[2] * layer.weight.shape[3]
    pixels_in, pixels_out = x.shape[0] * x.shape[-2] * x.shape[-1], y.shape[0] * y.shape[-2] * y.shape[-1]
    size = layer.weight.element_size()
    macs, moved = [], []
    for reads, writes in ((K_in, K_out), _widths(layer)):
        per_filter = taps * (reads if layer.groups == 1 else 1)
        macs.append(pixels_out * writes * per_filter)
        moved.append(size * (pixels_in * reads + pixels_out * writes + writes * per_filter))
    padding = (0, 0, 0, 0)
    if layer.padding_mode == "zeros":
        padding = four_sided("report", layer.padding, layer.kernel_size, layer.stride, layer.dilation)  # type: ignore[arg-type]
    tensors = (x, layer.weight, layer.bias, lists.in_index, lists.out_index)
    choice = _C.explain(*tensors, layer.stride, padding, layer.dilation, layer.groups)
    backend, why = _why(choice, x.is_cuda)
    why = "; ".join(part for part in (why, choice["packed"]) if part)
    seconds = dense = fraction = None
    limit = ""
    if x.device.type == "cpu":
        seconds, dense = _medians(lambda: layer(x), lambda: layer._conv_forward(x, layer.weight, layer.bias))
        peaks = measured_roofline(x.dtype, torch.get_num_threads())
        fraction = peaks.fraction(macs[0], moved[0], seconds)
        sides = (macs[0], macs[1]), (moved[0], moved[1]), (seconds, dense)
        limit = limit_of(peaks, backend, *sides, K_out, taps * (K_in if layer.groups == 1 else 1))
    channels = (K_in, layer.in_channels), (K_out, layer.out_channels)
    work = (macs[0], macs[1]), (moved[0], moved[1])
    return LayerReport(name, *channels, *work, seconds, dense, backend, why, limit, fraction)


def _widths(layer: nn.Conv2d) -> tuple[int, int]:
    return layer.in_channels, layer.out_channels


def report(model: nn.Module, example_input: Tensor | tuple[Any, ...]) -> NetworkReport:
    """Reports what each swapped layer of a network does: runs the network once, and each layer some times more.

    Args:
        model: a swapped network in eval mode, with the domain set that is to be looked at.
        example_input: what to call it with: a tensor, or a tuple of all arguments.

    Raises:
        ValueError: if no layer was swapped, the model is in training mode or does not take the example, or it is a
            planned network, whose steps are shown by printing it.

    Examples:
        >>> import torch, bap_kernels as bk
        >>> from torch import nn
        >>> model = bk.swap_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)).eval())
        >>> bk.set_domain(bk.attach_(model, {"birds": {"1": bk.ChannelLists([1, 4])}}), "birds")
        >>> [(layer.name, layer.reads, layer.macs) for layer in bk.report(model, torch.randn(1, 3, 8, 8)).layers]
        [('0', (3, 3), (7776, 7776)), ('1', (2, 8), (288, 1152))]
    """
    check_module("report", model)
    if isinstance(model, PlannedNetwork):
        raise ValueError(
            "report(): expected `model` to be a network of layers, got a planned one. Hint: print(planned) shows its "
            "steps; report its `model`."
        )
    layers = {module: name for name, module in model.named_modules() if isinstance(module, GatheredConv2d)}
    if not layers:
        raise ValueError("report(): expected `model` to have swapped layers, got none. Hint: call swap_ first.")
    if model.training:
        raise ValueError("report(): expected `model` to be in eval mode, got training mode. Hint: call model.eval().")
    seen: list[tuple[GatheredConv2d, Tensor, Tensor]] = []

    def note(layer: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        assert isinstance(layer, GatheredConv2d)
        # What follows may write to it.
        x = args[0].detach().clone(memory_format=torch.preserve_format)
        seen.append((layer, x if x.dim() == 4 else x.unsqueeze(0), y if y.dim() == 4 else y.unsqueeze(0)))

    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        with torch.no_grad():
            model(*inputs)
    except Exception as error:
        raise not_taken("report", inputs, error) from error
    finally:
        for handle in handles:
            handle.remove()
    verdicts = next((_C.verdicts(x.get_device()) for _, x, _ in seen if x.is_cuda), {})
    with torch.no_grad():
        rows = tuple(_explained(layers[layer], layer, x, y) for layer, x, y in seen)
    return NetworkReport(rows, skipped(model), verdicts)
