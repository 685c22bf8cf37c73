"""Memory of layers that meet inputs of many sizes, under a limit for packed weights.

Every size is a new case for `auto`, for oneDNN and, before its limit, for the cache of packed weights. This runs layers
on inputs of as many sizes as are asked for and prints, along the way, the process's memory (resident set), what the
cache of packed weights says that it holds, and how many cases have been measured. The growth that is left comes from
oneDNN's own cache of primitives (1024 of them, unless ONEDNN_PRIMITIVE_CACHE_CAPACITY says otherwise) and from the
table of choices.

    python -m tools.memory_of_sizes --sizes 10000 --limit-mib 64
"""

from __future__ import annotations

import argparse
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
    """Memory of this process that is in RAM."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def sizes(count: int) -> list[tuple[int, int]]:
    """Pairs (height, width), each once; large and small ones mixed, so that what calls need does not grow with them."""
    side = 4
    while (side - 3) ** 2 < count:
        side += 1
    every = [(height, width) for height in range(4, side + 1) for width in range(4, side + 1)]
    random.Random(0).shuffle(every)
    return every[:count]


def layers() -> list[nn.Module]:
    """A layer with 64 weights, which no input should make large, and one of 576 KiB with lists of half its channels."""
    small = bk.nn.GatheredConv2d(4, 4, 2)
    large = bk.nn.GatheredConv2d(128, 128, 3, padding=1)
    large.channels = bk.ChannelLists(range(0, 128, 2), range(0, 128, 2))
    return [small.eval(), large.eval()]


def measure(
    count: int, limit_bytes: int, every: int, large_every: int = 10
) -> Iterator[tuple[int, int, int, int, int]]:
    """Runs the layers and gives (sizes so far, resident bytes, packed weights, their bytes, measured cases) as it goes.

    Args:
        count: sizes.
        limit_bytes: for packed weights.
        every: sizes between two rows.
        large_every: the large layer meets one of so many sizes, as measuring its candidates takes long.
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
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, default=10_000)
    parser.add_argument("--limit-mib", type=int, default=64)
    parser.add_argument("--every", type=int, default=1000, help="sizes between two rows")
    parser.add_argument("--large-every", type=int, default=20, help="the large layer meets one of so many sizes")
    given = parser.parse_args()
    _C.set_choice_file("")  # a table of its own: it would fill the user's
    first, start = resident_bytes(), time.perf_counter()
    print(f"limit {given.limit_mib} MiB, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'sizes':>8}  {'RSS MiB':>8}  {'more':>6}  {'packed':>6}  {'MiB':>6}  {'cases':>6}")
    print(f"{0:>8}  {first / MIB:>8.1f}  {0:>6.1f}  {0:>6}  {0:>6.2f}  {0:>6}")
    for number, resident, entries, packed, cases in measure(
        given.sizes, given.limit_mib * MIB, given.every, given.large_every
    ):
        more = (resident - first) / MIB
        row = f"{number:>8}  {resident / MIB:>8.1f}  {more:>6.1f}  {entries:>6}  {packed / MIB:>6.2f}  {cases:>6}"
        print(row, flush=True)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
