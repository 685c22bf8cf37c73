"""Winograd convolutions against direct ones: ``python -m benches.winograd [--batch 1 8] [--layout nchw]``.

For every 3x3 layer of stride 1 of ResNet-50, ResNet-26, VGG-16 and WRN-28-4 with at least 64 input channels: times of
F(4x4), F(2x2), the direct kernel, ``auto`` and the oracle (PyTorch's direct convolution on compact tensors), in
interleaved rounds of one process, and the largest error of each against float64, relative to the largest result. A
speed-up is a ratio of medians. ``--networks resnet50`` measures whole planned networks instead, with and without
``bk.use_winograd``. One thread unless ``--threads`` says otherwise.
"""

import argparse
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from benches import baselines, ours
from benches.cases import LAYOUTS, Case, Cell
from benches.network_models import DOMAIN, NETWORKS, NetworkCell, in_lists, swap_
from benches.problem import MEMORY_FORMATS, NumberStore, Problem, normal_tensors
from benches.tables import Table
from benches.timers import CpuClock, Timed, interleave

# network, size, C_in, C_out, occurrences; a test compares them with the networks. Those of WRN-28-4 are ResNet-26's.
LAYERS: tuple[Case, ...] = tuple(
    Case(network, size, size, C_in, C_out, 3, 1, count)
    for network, size, C_in, C_out, count in (
        ("resnet50", 56, 64, 64, 3),
        ("resnet50", 28, 128, 128, 3),
        ("resnet50", 14, 256, 256, 5),
        ("resnet50", 7, 512, 512, 2),
        ("resnet26", 32, 64, 64, 7),
        ("resnet26", 16, 128, 128, 7),
        ("resnet26", 8, 256, 256, 7),
        ("vgg16_bn", 224, 64, 64, 1),
        ("vgg16_bn", 112, 64, 128, 1),
        ("vgg16_bn", 112, 128, 128, 1),
        ("vgg16_bn", 56, 128, 256, 1),
        ("vgg16_bn", 56, 256, 256, 2),
        ("vgg16_bn", 28, 256, 512, 1),
        ("vgg16_bn", 28, 512, 512, 2),
        ("vgg16_bn", 14, 512, 512, 3),
    )
)
# Edges of the tiles; 0: direct.
FORCED = {"F(4x4)": 4, "F(2x2)": 2, "direct": 0}


def enter(backend: str, size: int) -> Callable[[], None]:
    """Return a function that sets the backend, and the tiles with which it computes whatever Winograd covers."""

    def set_both() -> None:
        ours.package().use_backend(backend)
        ours.library().force_winograd(size)

    return set_both


def variants(problem: Problem) -> dict[str, Timed]:
    """Return the kernels, ``auto`` and the oracle; ``auto`` has measured then."""
    timed: dict[str, Timed] = {}
    for name, size in FORCED.items():
        variant = ours.prepare("native", problem)
        timed[name] = Timed(variant.run, variant.inputs, enter("native", size))
    variant = ours.prepare("auto", problem)
    timed["auto"] = Timed(variant.run, variant.inputs, enter("auto", 0))
    variant = baselines.prepare("oracle", problem, CpuClock(), 1.0)
    timed["oracle"] = Timed(variant.run, variant.inputs, enter("auto", 0))
    for entry in timed.values():
        entry.enter()
        entry.run(entry.inputs[0])  # packs
    return timed


def relative_error(run: Callable[[Tensor], object], problem: Problem) -> float:
    """Return the largest error on the first input, relative to the largest result."""
    x = problem.inputs[0]
    weight, listed = problem.sliced_weight.double(), problem.in_index.long()
    expected = F.conv2d(x[:, listed].double(), weight, None, *problem.conv_args)
    return float((torch.as_tensor(run(x)).double() - expected).abs().max() / expected.abs().max())


def measure(cell: Cell, store: NumberStore, seconds: float) -> tuple[dict[str, float], dict[str, float], str]:
    """Return (median seconds, relative errors, what ``auto`` chose) of one cell."""
    problem = Problem.make(cell, store, torch.float32, torch.device("cpu"))
    timed = variants(problem)
    errors = {}
    for name in FORCED:
        timed[name].enter()
        errors[name] = relative_error(timed[name].run, problem)
    samples = interleave(timed, CpuClock(), seconds, max_rounds=200)
    enter("auto", 0)()
    stride, padding = problem.conv_args
    call = problem.inputs[0], problem.weight, None, problem.in_index, problem.out_index
    chosen = ours.library().explain(*call, [stride] * 2, [padding] * 4, [1, 1], 1)["backend"]
    return {name: statistics.median(times) for name, times in samples.items()}, errors, str(chosen)


def geometric_mean(values: Sequence[float]) -> float:
    """Return it.

    Examples:
        >>> from benches.winograd import geometric_mean
        >>> geometric_mean([1.0, 4.0])
        2.0
    """
    return math.exp(sum(math.log(value) for value in values) / len(values))


def layers(options: argparse.Namespace, console: Console) -> None:
    """Measure the layers and print a table for each layout and batch."""
    store = NumberStore(torch.float32, torch.device("cpu"))
    for layout in options.layout:
        for batch in options.batch:
            rows, best = [], []
            for case in LAYERS:
                if options.only not in case.network:
                    continue
                cell = Cell(case, batch, options.density, options.lists, layout)
                times, errors, chosen = measure(cell, store, options.seconds)
                ours.clear_packed()
                gains = [times["oracle"] / times[name] for name in (*FORCED, "auto")]
                best.append((gains[-1], times["direct"] / times["auto"], times["direct"] / times["F(4x4)"]))
                macs = batch * case.H * case.W * cell.K_in * cell.K_out * 9
                rows.append(
                    [
                        f"{case.network} {case.shape}",
                        *(f"{times[name] * 1e3:.3f}" for name in ("oracle", *FORCED)),
                        *(f"{gain:.2f}" for gain in gains),
                        f"{best[-1][1]:.2f}",
                        f"{2e-9 * macs / times['auto']:.0f}",
                        *(f"{errors[name]:.1e}" for name in FORCED),
                        chosen,
                    ]
                )
            means = [geometric_mean([row[i] for row in best]) for i in range(3)]
            title = f"3x3, stride 1, batch {batch}, {layout}, {options.lists}-lists, density {options.density}"
            columns = [
                "layer",
                *(f"{name} ms" for name in ("oracle", *FORCED)),
                *(f"{name} / oracle" for name in (*FORCED, "auto")),
                "auto / direct",
                "direct GFLOP/s of auto",
                *(f"error {name}" for name in FORCED),
                "chosen",
            ]
            note = (
                f"Geometric means: auto over the oracle {means[0]:.2f}, auto over the direct kernel {means[1]:.2f}, "
                f"F(4x4) over the direct kernel {means[2]:.2f}."
            )
            table = Table(title, columns, rows, note)
            if console.is_terminal:
                console.print(table.rich())
            else:
                print(table.markdown(), flush=True)


def networks(options: argparse.Namespace) -> None:
    """Time whole planned networks with and without Winograd."""
    for name, layout, batch in itertools.product(options.networks, options.layout, options.batch):
        cell = NetworkCell(name, batch, options.density, layout)
        make, side = NETWORKS[name]
        with normal_tensors():
            torch.manual_seed(0)
            model = make().eval()
            model = swap_(model, in_lists(model, cell.density, cell.seed)).to(memory_format=MEMORY_FORMATS[layout])
            x = torch.randn(batch, 3, side, side).contiguous(memory_format=MEMORY_FORMATS[layout])
            planned = ours.package().plan(model, x, DOMAIN)
            timed, logits = {}, {}
            for allowed in (True, False):
                timed[str(allowed)] = Timed(planned, [x], functools.partial(ours.library().set_winograd, allowed))
                timed[str(allowed)].enter()
                logits[allowed] = planned(x)
            samples = interleave(timed, CpuClock(), 20 * options.seconds, max_rounds=40)
            ours.library().set_winograd(True)
        seconds = {key: statistics.median(times) for key, times in samples.items()}
        difference = float((logits[True] - logits[False]).abs().max() / logits[False].abs().max())
        print(
            f"{name} batch {batch} {layout}: with Winograd {seconds['True'] * 1e3:.2f} ms, without "
            f"{seconds['False'] * 1e3:.2f} ms, speed-up {seconds['False'] / seconds['True']:.2f}, "
            f"logits differ by {difference:.1e} of the largest",
            flush=True,
        )


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m benches.winograd", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--lists", choices=("in", "both"), default="in")
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.6, help="for each layer")
    parser.add_argument("--only", default="", help="layers of networks whose name holds this")
    parser.add_argument("--networks", nargs="*", choices=sorted(NETWORKS), default=[])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ours.package().use_winograd(True)
    ours.reset_choices()
    with torch.no_grad():
        if options.networks:
            networks(options)
        else:
            layers(options, Console())


if __name__ == "__main__":
    main()
