"""Call overhead: a convolution of a single pixel, without autograd.

Compares op, function and layer of the package with ``F.conv2d`` on the compact tensors.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benches import gate, ours
from benches.cases import Case, Cell, draw
from benches.measure import DTYPES
from benches.problem import normal_tensors
from benches.rows import Row, row_of
from benches.summary import OVERHEAD
from benches.timers import Spread

CHANNELS, KEPT = 8, 4
VARIANTS = ("op", "functional", "layer", "conv2d")
CELL = Cell(Case(OVERHEAD, 1, 1, CHANNELS, CHANNELS, 1, 1, 1), 1, KEPT / CHANNELS, "in", "nchw")
# Per sample.
CALLS = 100
SAMPLES = 25


@normal_tensors()
def build_calls(
    device: torch.device, dtype: torch.dtype, names: tuple[str, ...] = VARIANTS
) -> dict[str, Callable[[], object]]:
    """Return the calls of the named variants."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, CHANNELS, 1, 1, generator=generator).to(device, dtype)
    weight = torch.randn(CHANNELS, CHANNELS, 1, 1, generator=generator).to(device, dtype)
    in_index = draw(CHANNELS, KEPT, generator).to(device)
    compact, sliced = x.index_select(1, in_index), weight.index_select(1, in_index)
    calls: dict[str, Callable[[], object]] = {}
    if "conv2d" in names:
        calls["conv2d"] = lambda: F.conv2d(compact, sliced)
    if set(names) & set(VARIANTS[:3]):
        bk = ours.package()
        bk.use_backend("auto")
        op = torch.ops.bap_kernels.gathered_conv2d.default
        calls["op"] = lambda: op(x, weight, None, in_index, None, [1, 1], [0, 0, 0, 0], [1, 1], 1, True)
        calls["functional"] = lambda: bk.gathered_conv2d(x, weight, None, in_index)
        conv = torch.nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False, device=device, dtype=dtype).requires_grad_(False)
        conv.weight.copy_(weight)
        layer = bk.nn.GatheredConv2d.from_conv2d(conv, bk.ChannelLists(in_index)).eval()
        calls["layer"] = lambda: layer(x)
    return {name: calls[name] for name in VARIANTS if name in names}


def check(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Compare all results with that of ``conv2d``, which must be among them; return the errors.

    Raises:
        WrongResultError: If a result is wrong.
    """
    reference = torch.as_tensor(calls["conv2d"]()).double()
    return {
        name: gate.check(f"{name} on a single pixel", torch.as_tensor(call()), reference, KEPT)
        for name, call in calls.items()
    }


def measure_overhead(device: torch.device, dtype: str, names: tuple[str, ...] = VARIANTS) -> list[Row]:
    """Time the calls in interleaved rounds of a hundred each."""
    with torch.inference_mode():
        by_name = build_calls(device, DTYPES[dtype], names)
        errors = check(by_name)
        samples: dict[str, list[float]] = {name: [] for name in by_name}
        for call in by_name.values():
            for _ in range(CALLS):
                call()
        for _ in range(SAMPLES):
            for name, call in by_name.items():
                start = time.perf_counter()
                for _ in range(CALLS):
                    call()
                samples[name].append((time.perf_counter() - start) / CALLS)
    fields: dict[str, Any] = {"network": OVERHEAD, "case": CELL.case.shape, "device": device.type, "dtype": dtype}
    return [
        row_of(CELL, Spread.of(seconds), **fields, cell=OVERHEAD, variant=name, max_error=errors[name])
        for name, seconds in samples.items()
    ]
