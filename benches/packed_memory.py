"""Time of one packed weight for all in-lists over a copy for each: ``python -m benches.packed_memory``.

The native kernels compute every layer of a network with an in-list, from a packed copy of its own (``fast``) and from
the packed weight that all lists share (``shared``), in rounds whose order changes. Results must be equal, bit for bit.
Ratios above 1 are what sharing costs; the last table tells layers that ``auto`` shares from those that it does not. By
default it takes about a minute. Run it on a machine that does nothing else.
"""

import argparse
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benches import ours
from benches.cases import BATCHES, CASES, DENSITIES, LAYOUTS, MIN_MEAN_CHANNELS, Case

FORMATS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}
WAYS = ("direct", "winograd")
POOL_BYTES = 32 << 20


@dataclass(frozen=True)
class Row:
    """One layer: whether ``auto`` shares its weight, time shared over own, seconds with a copy of its own."""

    auto_shares: bool
    ratio: float
    seconds: float


def measure(case: Case, batch: int, density: float, layout: str, way: str, seconds: float) -> Row:
    """Time one layer in about so many seconds.

    Raises:
        RuntimeError: If the results differ.
    """
    library, op = ours.library(), torch.ops.bap_kernels.gathered_conv2d.default
    generator = torch.Generator().manual_seed(0)
    shape = (batch, case.C_in, case.H, case.W)
    count = max(2, min(16, POOL_BYTES // (4 * math.prod(shape))))
    first = torch.randn(shape, generator=generator).contiguous(memory_format=FORMATS[layout])
    inputs = [first, *(first.clone() for _ in range(count - 1))]
    weight = torch.randn(case.C_out, case.C_in, case.kernel, case.kernel, generator=generator)
    kept = torch.randperm(case.C_in, generator=generator)[: max(1, round(case.C_in * density))]
    in_index = kept.sort().values.int()
    rest = ([case.stride] * 2, [case.padding] * 4, [1, 1], 1, True)

    def run(memory: str, x: torch.Tensor) -> torch.Tensor:
        library.set_packed_memory(memory)
        result: torch.Tensor = op(x, weight, None, in_index, None, *rest)
        return result

    library.force_winograd(4 if way == "winograd" else 0)
    try:
        if not torch.equal(run("fast", inputs[0]), run("shared", inputs[0])):
            raise RuntimeError(f"measure(): expected equal results for {case.shape}, got different ones.")
        times = _times(run, inputs, seconds)
        library.clear_packed_cache()
        run("auto", inputs[0])
        auto_shares = not any(of_lists for _, _, of_lists in library.kept_packed(weight, in_index, None, None))
    finally:
        library.force_winograd(0)
        library.set_packed_memory("auto")
        library.clear_packed_cache()
    own, shared = (statistics.quantiles(times[memory], n=4)[0] for memory in ("fast", "shared"))
    return Row(auto_shares, shared / own, own)


def _times(
    run: Callable[[str, torch.Tensor], torch.Tensor], inputs: Sequence[torch.Tensor], seconds: float
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {"fast": [], "shared": []}
    order, end, turn = list(times), time.perf_counter() + seconds, 0
    while time.perf_counter() < end or turn < 10:
        random.Random(turn).shuffle(order)
        for memory in order:
            turn += 1
            x = inputs[turn % len(inputs)]
            start = time.perf_counter()
            run(memory, x)
            times[memory].append(time.perf_counter() - start)
    return times


def layers(options: argparse.Namespace) -> list[tuple[str, Case, int, float, str]]:
    """Return (way, case, batch, density, layout) of every row."""
    return [
        (way, case, batch, density, layout)
        for way in options.ways.split(",")
        for case in CASES
        if case.network == options.network and case.C_in >= MIN_MEAN_CHANNELS
        if way != "winograd" or (case.kernel, case.stride) == (3, 1)
        for batch in map(int, options.batch.split(","))
        for density in map(float, options.density.split(","))
        for layout in options.layout.split(",")
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    command = argparse.ArgumentParser(prog="python -m benches.packed_memory", description=__doc__)
    command.add_argument("--network", default="resnet50")
    command.add_argument("--batch", default=",".join(map(str, BATCHES)))
    command.add_argument("--density", default="0.5", help=f"such as {','.join(map(str, DENSITIES))}")
    command.add_argument("--layout", default=",".join(LAYOUTS))
    command.add_argument("--ways", default=",".join(WAYS))
    command.add_argument("--seconds", type=float, default=40, help="of all rows together (default: %(default)s)")
    command.add_argument("--threads", type=int, help="threads (default: PyTorch's)")
    options = command.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    ours.package().use_backend("native")
    groups: dict[str, list[float]] = {}
    print(f"{torch.get_num_threads()} threads, {ours.library().isa()}, {ours.library().cpu_model()}")
    chosen = layers(options)
    for way, case, batch, density, layout in chosen:
        row = measure(case, batch, density, layout, way, options.seconds / len(chosen))
        kept = "one for all" if row.auto_shares else "one for each"
        print(f"{way} {case.shape} b{batch} d{density} {layout}: {row.ratio:.3f}, {row.seconds * 1e6:.0f} us, {kept}")
        groups.setdefault(f"{way}, {layout}, {case.kernel}x{case.kernel}, batch {batch}", []).append(row.ratio)
        groups.setdefault(f"{way}, auto: {kept}", []).append(row.ratio)
    print("\n| | rows | geometric mean | worst |\n|---|---|---|---|")
    for name, ratios in sorted(groups.items()):
        print(f"| {name} | {len(ratios)} | {statistics.geometric_mean(ratios):.3f} | {max(ratios):.3f} |")
    ours.package().use_backend("auto")
    return 0


if __name__ == "__main__":
    sys.exit(main())
