"""Most memory that a forward of a whole network takes, each variant measured in a process of its own."""

from collections.abc import Sequence

import torch

from benches import ours
from benches.memory import can_measure_peak, in_fresh_process, peak_bytes
from benches.networks import NetworkBench, NetworkCell


def network_peaks(cell: NetworkCell, names: Sequence[str], dtype: str) -> dict[str, int]:
    """Bytes that a forward takes at most beyond what is resident before it, {variant: bytes}; CPU only.

    Weights and packed weights are there before, and so is the input. Empty where this system cannot tell.
    """
    if not can_measure_peak():
        return {}
    return {name: in_fresh_process(_peak, cell, name, dtype) for name in names}


def _peak(cell: NetworkCell, name: str, dtype: str) -> int:
    ours.fresh_choices()
    bench = NetworkBench(torch.device("cpu"), dtype)
    with torch.inference_mode():
        timed = bench.prepare(cell, [name])[name]
        timed.enter()
        x = timed.inputs[0]
        # Twice: packing, choosing and compiling are over, and what stays resident of a call is there.
        timed.run(x)
        timed.run(x)
        return peak_bytes(lambda: timed.run(x))
