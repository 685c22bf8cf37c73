"""Memory of layers with inputs of many sizes, under a limit for packed weights.

Every size is a new case for `auto`, for oneDNN and, up to its limit, for the cache of packed weights. The tool runs
layers on inputs of many sizes and prints the resident set of the process, the packed weights and the number of measured
cases. The remaining growth comes from oneDNN's cache of primitives (1024 of them by default, see
ONEDNN_PRIMITIVE_CACHE_CAPACITY) and from the table of choices.

    python -m tools.memory_of_sizes --sizes 10000 --limit-mib 64
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import bap_kernels as bk
from bap_kernels._load import _C

MIB = 2**20


def resident_bytes() -> int:
    """Resident set of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def sizes(count: int) -> list[tuple[int, int]]:
    """Return different pairs (height, width), shuffled so that scratch memory does not grow with the count."""
    sides = range(4, 4 + math.isqrt(max(count - 1, 0)) + 1)
    pairs = list(itertools.product(sides, sides))
    random.Random(0).shuffle(pairs)
    return pairs[:count]


def layers() -> list[nn.Module]:
    """Return a layer with 64 weights, and one with 576 KiB of weights and lists of half of the channels."""
    small = bk.nn.GatheredConv2d(4, 4, 2)
    large = bk.nn.GatheredConv2d(128, 128, 3, padding=1)
    large.channels = bk.ChannelLists(range(0, 128, 2), range(0, 128, 2))
    return [small.eval(), large.eval()]


def measure(
    count: int, limit_bytes: int, every: int, large_every: int = 10
) -> Iterator[tuple[int, int, int, int, int]]:
    """Run the layers and yield (sizes so far, resident bytes, packed weights, their bytes, measured cases).

    Args:
        count: Number of sizes.
        limit_bytes: For packed weights.
        every: Sizes between two rows.
        large_every: The large layer runs on one of so many sizes, because measuring its candidates is slow.
    """
    bk.set_packed_cache_limit(limit_bytes)
    small, large = layers()
    with torch.no_grad():
        for number, size in enumerate(sizes(count), 1):
            small(torch.randn(1, 4, *size))
            if number % large_every == 0:
                large(torch.randn(1, 128, *size))
            if number % every == 0 or number == count:
                packed = bk.packed_cache_info()
                yield number, resident_bytes(), packed["entries"], packed["bytes"], len(bk.choices())


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.memory_of_sizes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sizes", type=int, default=10_000)
    parser.add_argument("--limit-mib", type=int, default=64)
    parser.add_argument("--every", type=int, default=1000, help="sizes between two rows")
    parser.add_argument("--large-every", type=int, default=20, help="run the large layer on one of so many sizes")
    options = parser.parse_args()
    _C.set_choice_file("")  # so that the cases do not fill the user's file
    first, start = resident_bytes(), time.perf_counter()
    print(f"limit {options.limit_mib} MiB, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'sizes':>8}  {'RSS MiB':>8}  {'more':>6}  {'packed':>6}  {'MiB':>6}  {'cases':>6}")
    print(f"{0:>8}  {first / MIB:>8.1f}  {0:>6.1f}  {0:>6}  {0:>6.2f}  {0:>6}")
    for number, resident, entries, packed, cases in measure(
        options.sizes, options.limit_mib * MIB, options.every, options.large_every
    ):
        more = (resident - first) / MIB
        row = f"{number:>8}  {resident / MIB:>8.1f}  {more:>6.1f}  {entries:>6}  {packed / MIB:>6.2f}  {cases:>6}"
        print(row, flush=True)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
