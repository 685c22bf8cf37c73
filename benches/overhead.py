"""What one call costs beside its work: a convolution of a single pixel, without autograd.

The op, the function and the layer of the package stand beside ``F.conv2d`` on the compact tensors.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benches import gate, ours
from benches.cases import draw
from benches.measure import DTYPES
from benches.problem import normal_tensors
from benches.rows import Row
from benches.summary import OVERHEAD
from benches.timers import Spread

CHANNELS, KEPT = 8, 4
BASELINES = ("op", "functional", "layer", "conv2d")
CALLS = 100
SAMPLES = 25


def calls(
    device: torch.device, dtype: torch.dtype, names: tuple[str, ...] = BASELINES
) -> dict[str, Callable[[], object]]:
    """Build the calls of the named variants; tensors are made as a user makes them, outside inference mode."""
    with normal_tensors():
        return _calls(device, dtype, names)


def _calls(device: torch.device, dtype: torch.dtype, names: tuple[str, ...]) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, CHANNELS, 1, 1, generator=generator).to(device, dtype)
    weight = torch.randn(CHANNELS, CHANNELS, 1, 1, generator=generator).to(device, dtype)
    in_index = draw(CHANNELS, KEPT, generator).to(device)
    compact, sliced = x.index_select(1, in_index), weight.index_select(1, in_index)
    found: dict[str, Callable[[], object]] = {}
    if "conv2d" in names:
        found["conv2d"] = lambda: F.conv2d(compact, sliced)
    if set(names) & set(BASELINES[:3]):
        bk = ours.package()
        bk.use_backend("auto")
        op = torch.ops.bap_kernels.gathered_conv2d.default
        found["op"] = lambda: op(x, weight, None, in_index, None, [1, 1], [0, 0, 0, 0], [1, 1], 1, True)
        found["functional"] = lambda: bk.gathered_conv2d(x, weight, None, in_index)
        conv = torch.nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False, device=device, dtype=dtype).requires_grad_(False)
        conv.weight.copy_(weight)
        layer = bk.nn.GatheredConv2d.from_conv2d(conv, bk.ChannelLists(in_index)).eval()
        found["layer"] = lambda: layer(x)
    return {name: found[name] for name in BASELINES if name in names}


def gated(made: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Compare all results with that of ``conv2d``, which must be among them, and return the errors.

    Raises:
        WrongResultError: If a result is wrong.
    """
    reference = torch.as_tensor(made["conv2d"]()).double()
    return {
        name: gate.check(f"{name} on a single pixel", torch.as_tensor(call()), reference, KEPT)
        for name, call in made.items()
    }


def measure_overhead(device: torch.device, dtype: str, names: tuple[str, ...] = BASELINES) -> list[Row]:
    """Time the calls in interleaved rounds of a hundred each."""
    with torch.inference_mode():
        made = calls(device, DTYPES[dtype], names)
        errors = gated(made)
        samples: dict[str, list[float]] = {name: [] for name in made}
        for call in made.values():
            for _ in range(CALLS):
                call()
        for _ in range(SAMPLES):
            for name, call in made.items():
                start = time.perf_counter()
                for _ in range(CALLS):
                    call()
                samples[name].append((time.perf_counter() - start) / CALLS)
    rows = []
    for name in made:
        spread = Spread.of(samples[name])
        rows.append(
            Row(
                network=OVERHEAD,
                case=f"1x1-{CHANNELS}-{CHANNELS}-k1s1",
                cell=OVERHEAD,
                variant=name,
                candidate="",
                device=device.type,
                dtype=dtype,
                layout="nchw",
                batch=1,
                density=KEPT / CHANNELS,
                lists="in",
                seed=0,
                threads=torch.get_num_threads(),
                inputs="warm",
                rounds=SAMPLES,
                p20_s=spread.p20,
                p50_s=spread.p50,
                p80_s=spread.p80,
                max_error=errors[name],
            )
        )
    return rows
