"""How busy 2 to 64 threads are in the native CPU kernels, without having them.

The kernels themselves cut each call into tasks for a number of threads and note them with their estimated cycles
(``_C.record_tasks``), computing nothing. The tool shares out each parallel region's tasks as ``at::parallel_for`` does,
in runs of neighbours fixed beforehand, and adds up the time until the last thread is done. The idle share is what is
left of threads x time. Waking threads, memory bandwidth and caches that cores share are not simulated.

    python -m tools.simulate_threads --threads 2,4,8,16,32,64
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

import bap_kernels as bk
from bap_kernels._load import _C
from benches.cases import CASES, MIN_MEAN_CHANNELS, Case

THREADS = (2, 4, 8, 16, 32, 64)
FORMATS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}
KINDS = ("direct", "winograd", "gradients", "winograd gradients", "switches")
Regions = list[tuple[int, list[float]]]


@dataclass(frozen=True)
class Busy:
    """Cycles of one call.

    Args:
        work: Of all tasks.
        time: Until the last thread is done, all regions one after the other.
        alone: Of this, in regions of one task.
    """

    work: float
    time: float
    alone: float


def busy(regions: Regions, threads: int) -> Busy:
    """Share out the regions of a call among threads."""
    time = alone = 0.0
    for grain, cycles in regions:
        if not cycles:
            continue
        used = min(threads, math.ceil(len(cycles) / grain))
        chunk = math.ceil(len(cycles) / used)
        longest = max(sum(cycles[first : first + chunk]) for first in range(0, len(cycles), chunk))
        time += longest
        alone += longest if len(cycles) == 1 else 0.0
    return Busy(sum(sum(cycles) for _, cycles in regions), time, alone)


def regions_of(case: Case, batch: int, layout: str, kind: str, threads: int, density: float = 0.5) -> Regions:
    """Note the regions of a layer with an in-list, for a number of threads.

    Args:
        case: The layer.
        batch: N.
        layout: ``channels_last`` or ``nchw``.
        kind: Of `KINDS`: the forward by direct or Winograd kernels, with a weight packed before; the gradients of input
            and weight, with half of the switches on, by either; the direct ones with the gradient of the switches.
        threads: How many the kernels are to cut for.
        density: Share of the listed channels.
    """
    x = torch.ones(batch, case.C_in, case.H, case.W).contiguous(memory_format=FORMATS[layout])
    weight = torch.ones(case.C_out, case.C_in, case.kernel, case.kernel)
    kept = torch.arange(case.C_in)[:: round(1 / density)]
    dy = torch.ones(batch, case.C_out, *case.output_size).contiguous(memory_format=FORMATS[layout])
    switch = torch.zeros(case.C_in).index_fill_(0, kept, 1)
    options = ([case.stride] * 2, [case.padding] * 4, [1, 1], 1)
    before = torch.get_num_threads(), _C.forced_winograd()
    torch.set_num_threads(threads)
    try:
        with bk.use_backend("native"):
            _C.force_winograd(4 if kind.startswith("winograd") else 0)
            if kind in ("direct", "winograd"):
                op = torch.ops.bap_kernels.gathered_conv2d
                # The first region packs the weight.
                return _C.record_tasks(lambda: op(x, weight, None, kept.int(), None, *options))[1:]
            backward = torch.ops.bap_kernels.switched_conv2d_backward
            mask = [True, True, False, kind == "switches"]
            return _C.record_tasks(lambda: backward(dy, x, weight, switch, *options, True, mask))
    finally:
        torch.set_num_threads(before[0])
        _C.force_winograd(before[1])


def cases(kind: str, network: str = "resnet50") -> Iterator[Case]:
    """The layers of a network that a kind is for."""
    for case in CASES:
        covered = not kind.startswith("winograd") or (case.kernel, case.stride) == (3, 1)
        if case.network == network and case.C_in >= MIN_MEAN_CHANNELS and covered:
            yield case


def network_idle(kind: str, batch: int, layout: str, threads: int, network: str = "resnet50") -> tuple[float, float]:
    """Return the idle share of all layers of a network, each as often as it occurs, and the share of serial time."""
    work = time = alone = 0.0
    for case in cases(kind, network):
        one = busy(regions_of(case, batch, layout, kind, threads), threads)
        work, time, alone = work + case.count * one.work, time + case.count * one.time, alone + case.count * one.alone
    # Not below 0 by rounding.
    return max(0.0, 1 - work / (threads * time)), alone / time


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    command = argparse.ArgumentParser(
        prog="python -m tools.simulate_threads", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    command.add_argument("--threads", default=",".join(map(str, THREADS)))
    command.add_argument("--network", default="resnet50")
    command.add_argument("--batch", default="1,8")
    command.add_argument("--layers", action="store_true", help="a line for each layer, too")
    options = command.parse_args(arguments)
    counts = [int(count) for count in options.threads.split(",")]
    print("| idle share of | " + " | ".join(f"{count} threads" for count in counts) + " |")
    print("|---" * (len(counts) + 1) + "|")
    for kind in KINDS:
        for batch in map(int, options.batch.split(",")):
            for layout in FORMATS:
                shares = [network_idle(kind, batch, layout, count, options.network)[0] for count in counts]
                print(f"| {kind}, {layout}, batch {batch} | " + " | ".join(f"{share:.0%}" for share in shares) + " |")
                for case in cases(kind, options.network) if options.layers else ():
                    each = [busy(regions_of(case, batch, layout, kind, count), count) for count in counts]
                    idle = [1 - one.work / (count * one.time) for one, count in zip(each, counts, strict=True)]
                    print(f"|   {case.shape} | " + " | ".join(f"{share:.0%}" for share in idle) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
