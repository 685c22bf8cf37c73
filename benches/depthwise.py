"""Depthwise convolutions on CPUs: ``python -m benches.depthwise [--batch 1 8] [--layout nchw]``.

For every depthwise layer of MobileNet-V2 and the 5x5 ones of MobileNet-V3, dense on compact tensors with a share of the
channels, with bias and ReLU6: times of our kernel, of ``auto``, of PyTorch's convolution with a pass for the ReLU6, and
of oneDNN's with a fused clamp, in interleaved rounds of one process. A speed-up is a ratio of medians; it is over the
faster of the latter two.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from benches import ours
from benches.cases import LAYOUTS
from benches.problem import MEMORY_FORMATS
from benches.tables import Table
from benches.timers import CpuClock, Timed, interleave
from benches.winograd import geometric_mean


@dataclass(frozen=True)
class Layer:
    """A depthwise layer of a network.

    Args:
        network: Its name.
        size: Rows and columns of the input.
        channels: Their number.
        kernel: Rows and columns of the filters.
        stride: Of both axes.
        count: How often the network has it.
    """

    network: str
    size: int
    channels: int
    kernel: int
    stride: int
    count: int


LAYERS: Sequence[Layer] = (
    Layer("mobilenet_v2", 112, 32, 3, 1, 1),
    Layer("mobilenet_v2", 112, 96, 3, 2, 1),
    Layer("mobilenet_v2", 56, 144, 3, 1, 1),
    Layer("mobilenet_v2", 56, 144, 3, 2, 1),
    Layer("mobilenet_v2", 28, 192, 3, 1, 2),
    Layer("mobilenet_v2", 28, 192, 3, 2, 1),
    Layer("mobilenet_v2", 14, 384, 3, 1, 4),
    Layer("mobilenet_v2", 14, 576, 3, 1, 2),
    Layer("mobilenet_v2", 14, 576, 3, 2, 1),
    Layer("mobilenet_v2", 7, 960, 3, 1, 3),
    Layer("mobilenet_v3_large", 56, 72, 5, 2, 1),
    Layer("mobilenet_v3_large", 28, 120, 5, 1, 2),
    Layer("mobilenet_v3_large", 14, 672, 5, 2, 1),
    Layer("mobilenet_v3_large", 7, 960, 5, 1, 2),
)
# Inputs of one layer, together larger than most outer caches, as far as so many pay.
_POOL_BYTES, _MOST_INPUTS = 64 << 20, 32


def call_of(weight: Tensor, bias: Tensor, stride: int) -> Callable[[Tensor], Tensor]:
    """Return our convolution with ReLU6 as a function of the input."""
    pad, channels = weight.shape[-1] // 2, weight.shape[0]
    options = ((stride, stride), (pad,) * 4, (1, 1), channels)
    fusion = (None, None, False, None, None, None, True, True, None, None, 6.0)
    return lambda x: ours.library().gathered_conv2d_fused(x, weight, bias, None, None, *options, *fusion)[0]


def variants(inputs: list[Tensor], weight: Tensor, bias: Tensor, stride: int) -> dict[str, Timed]:
    """Return the ways to compute one layer; ``auto`` has measured then."""
    pad, channels = weight.shape[-1] // 2, weight.shape[0]

    def enter(backend: str) -> Callable[[], None]:
        return lambda: ours.library().set_backend(backend)

    def by_torch(x: Tensor) -> Tensor:
        return F.hardtanh_(F.conv2d(x, weight, bias, stride, pad, 1, channels), 0.0, 6.0)

    def by_onednn(x: Tensor) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(
            x, weight, bias, [pad] * 2, [stride] * 2, [1, 1], channels, "hardtanh", [0.0, 6.0], ""
        )

    timed = {backend: Timed(call_of(weight, bias, stride), inputs, enter(backend)) for backend in ("native", "auto")}
    timed |= {"torch": Timed(by_torch, inputs), "oneDNN": Timed(by_onednn, inputs)}
    expected = by_torch(inputs[0])
    for name, entry in timed.items():
        entry.enter()
        error = float((torch.as_tensor(entry.run(inputs[0])) - expected).abs().max())
        if error > 1e-4:
            raise AssertionError(f"{name} is wrong: an error of {error:.1e}")
    return timed


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m benches.depthwise", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--density", type=float, nargs="+", default=[1.0, 0.5], help="share of the channels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.6, help="for each layer")
    parser.add_argument("--only", default="", help="layers of networks whose name holds this")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ours.reset_choices()
    console = Console()
    with torch.inference_mode():
        for layout in options.layout:
            for batch in options.batch:
                for density in options.density:
                    table = measure(options, layout, batch, density)
                    if console.is_terminal:
                        console.print(table.rich())
                    else:
                        print(table.markdown(), flush=True)


def measure(options: argparse.Namespace, layout: str, batch: int, density: float) -> Table:
    """Measure all layers in one layout, and return their table."""
    rows, gains = [], []
    for layer in LAYERS:
        if options.only not in layer.network:
            continue
        size, channels, kernel, stride = layer.size, layer.channels, layer.kernel, layer.stride
        torch.manual_seed(0)
        # Ragged: trained lists have odd lengths.
        kept = channels if density == 1 else round(channels * density) + 1
        weight, bias = torch.randn(kept, 1, kernel, kernel), torch.randn(kept)
        copies = max(1, min(_MOST_INPUTS, _POOL_BYTES // (4 * batch * kept * size * size)))
        inputs = [
            torch.randn(batch, kept, size, size).contiguous(memory_format=MEMORY_FORMATS[layout]) for _ in range(copies)
        ]
        samples = interleave(variants(inputs, weight, bias, stride), CpuClock(), options.seconds, max_rounds=200)
        ours.library().set_backend("auto")
        seconds = {name: statistics.median(times) for name, times in samples.items()}
        best = min(seconds["torch"], seconds["oneDNN"])
        gains.append((best / seconds["native"], best / seconds["auto"]))
        out = (size - 1) // stride + 1
        macs, floats = batch * kept * out * out * kernel * kernel, batch * kept * (size * size + out * out)
        rows.append(
            [
                f"{layer.network} {kernel}x{kernel}/{stride} {kept} at {size}x{size}, {layer.count} times",
                *(f"{seconds[name] * 1e6:.0f}" for name in ("native", "auto", "torch", "oneDNN")),
                *(f"{gain:.2f}" for gain in gains[-1]),
                f"{2e-9 * macs / seconds['native']:.0f}",
                f"{4e-9 * floats / seconds['native']:.0f}",
            ]
        )
    means = [geometric_mean([gain[i] for gain in gains]) for i in range(2)]
    columns = ["layer", "native µs", "auto µs", "torch µs", "oneDNN µs", "native", "auto", "GFLOP/s", "GB/s"]
    title = f"depthwise, ReLU6, batch {batch}, {layout}, density {density}, {torch.get_num_threads()} threads"
    note = f"Geometric means of the speed-ups: native {means[0]:.2f}, auto {means[1]:.2f}."
    return Table(title, columns, rows, note)


if __name__ == "__main__":
    main()
