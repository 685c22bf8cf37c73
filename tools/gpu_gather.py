"""Checks and times `_channel_gather_cuda` against `index_select` on a GPU; prints one line of JSON.

python -m tools.gpu_gather [--quick]

The report of gpu_report.py runs it in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial

import torch

import bap_kernels  # noqa: F401  registers the operators

# N, C_in, H, W; 7x7 planes of bfloat16 allow words of 2 bytes only.
SHAPES = [(32, 64, 56, 56), (32, 256, 56, 56), (32, 512, 28, 28), (32, 1024, 14, 14), (32, 2048, 7, 7), (2, 33, 5, 3)]
# Larger than the second-level cache of today's devices.
FLUSH_BYTES = 256 * 2**20


def median_us(function: Callable[[], object], rounds: int, flush: torch.Tensor) -> float:
    """Median time of one call in microseconds, with a cold second-level cache."""
    times = []
    for _ in range(rounds + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.fill_(1)
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times[3:])


def main() -> None:
    """Runs every shape in both layouts; raises at the first wrong result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    rounds = 10 if parser.parse_args().quick else 40
    gather = torch.ops.bap_kernels._channel_gather_cuda
    generator = torch.Generator().manual_seed(0)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    ratios = {}
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            channels = shape[1]
            index = torch.randperm(channels, generator=generator)[: channels // 2].sort().values.int().cuda()
            for layout in (torch.contiguous_format, torch.channels_last):
                x = torch.randn(shape, generator=generator).to("cuda", dtype).to(memory_format=layout)
                # The rows variant: a wider parent makes the planes' rows separate runs.
                for name, part in (("", x), ("-sliced", x[..., 1:])):
                    torch.testing.assert_close(gather(part, index), part.index_select(1, index), rtol=0, atol=0)
                    ours = median_us(partial(gather, part, index), rounds, flush)
                    theirs = median_us(partial(part.index_select, 1, index), rounds, flush)
                    kind = "nhwc" if layout == torch.channels_last else "nchw"
                    key = f"{'x'.join(map(str, shape))}-{str(dtype)[6:]}-{kind}{name}"
                    ratios[key] = {"us": round(ours, 1), "index_select_us": round(theirs, 1)}
    speed_ups = [row["index_select_us"] / row["us"] for row in ratios.values()]
    summary = {"cases": len(ratios), "geomean_over_index_select": round(statistics.geometric_mean(speed_ups), 3)}
    print(json.dumps({**summary, "rows": ratios}))


if __name__ == "__main__":
    main()
