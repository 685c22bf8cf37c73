"""Time of one packed weight for all in-lists over a copy for each: ``python -m benches.packed_memory``.

The native kernels compute every layer of a network with an in-list, from a packed copy of its own (``fast``) and from
the packed weight that all lists share (``shared``), in rounds whose order changes. Results must be equal, bit for bit.
Ratios above 1 are what sharing costs. Run it on a machine that does nothing else.
"""

import argparse
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from benches import ours
from benches.cases import BATCHES, CASES, DENSITIES, LAYOUTS, MIN_MEAN_CHANNELS, Case

FORMATS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}
WAYS = ("direct", "winograd")
POOL_BYTES = 32 << 20


def ratio_of(case: Case, batch: int, density: float, layout: str, way: str, seconds: float) -> tuple[float, float]:
    """Return (time with the shared weight over that with a copy, seconds with a copy).

    Raises:
        RuntimeError: If the results differ.
    """
    library, op = ours.library(), torch.ops.bap_kernels.gathered_conv2d.default
    generator = torch.Generator().manual_seed(0)
    shape = (batch, case.C_in, case.H, case.W)
    count = max(2, min(16, POOL_BYTES // (4 * math.prod(shape))))
    inputs = [torch.randn(shape, generator=generator).contiguous(memory_format=FORMATS[layout]) for _ in range(count)]
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
            raise RuntimeError(f"ratio_of(): expected equal results for {case.shape}, got different ones.")
        times = _times(run, inputs, seconds)
    finally:
        library.force_winograd(0)
        library.set_packed_memory("auto")
        library.clear_packed_cache()
    own, shared = (statistics.median(times[memory]) for memory in ("fast", "shared"))
    return shared / own, own


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


def rows(options: argparse.Namespace) -> Iterator[tuple[str, Case, int, float, str, float, float]]:
    """Measure and yield (way, case, batch, density, layout, ratio, seconds)."""
    for way in options.ways.split(","):
        for case in CASES:
            if case.network != options.network or case.C_in < MIN_MEAN_CHANNELS:
                continue
            if way == "winograd" and (case.kernel, case.stride) != (3, 1):
                continue
            for batch in map(int, options.batch.split(",")):
                for density in map(float, options.density.split(",")):
                    for layout in options.layout.split(","):
                        measured = ratio_of(case, batch, density, layout, way, options.seconds)
                        yield way, case, batch, density, layout, *measured


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    command = argparse.ArgumentParser(prog="python -m benches.packed_memory", description=__doc__)
    command.add_argument("--network", default="resnet50")
    command.add_argument("--batch", default=",".join(map(str, BATCHES)))
    command.add_argument("--density", default=",".join(map(str, DENSITIES)))
    command.add_argument("--layout", default=",".join(LAYOUTS))
    command.add_argument("--ways", default=",".join(WAYS))
    command.add_argument("--seconds", type=float, default=0.3, help="of each row (default: %(default)s)")
    command.add_argument("--threads", type=int, help="threads (default: PyTorch's)")
    options = command.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    ours.package().use_backend("native")
    groups: dict[str, list[float]] = {}
    print(f"{torch.get_num_threads()} threads, {ours.library().isa()}, {ours.library().cpu_model()}")
    for way, case, batch, density, layout, ratio, seconds in rows(options):
        print(f"{way} {case.shape} b{batch} d{density} {layout}: {ratio:.3f}, {seconds * 1e6:.0f} us")
        groups.setdefault(f"{way}, {layout}, {case.kernel}x{case.kernel}, batch {batch}", []).append(ratio)
    print("\n| | rows | geometric mean | worst |\n|---|---|---|---|")
    for name, ratios in groups.items():
        print(f"| {name} | {len(ratios)} | {statistics.geometric_mean(ratios):.3f} | {max(ratios):.3f} |")
    ours.package().use_backend("auto")
    return 0


if __name__ == "__main__":
    sys.exit(main())
