"""Times the host side of a call of the Triton backend, from its arguments to the driver; needs no GPU.

    python -m tools.launch_overhead [--rounds N] [--device cuda]

By default a fake driver compiles kernels and drops launches; the cost of the real driver is included with
``--device cuda``. Prints one line of JSON: microseconds of a call with prepared launches, and with
Triton's own launcher.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from bap_kernels._load import _C
from bap_kernels.triton import ops
from bap_kernels.triton.launch_spec import Launch

ARCH = 90


class StandIn:
    """A driver that compiles for sm_90 and drops launches; ``launched`` holds their arguments if ``keep`` is set."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []
        self.keep = False
        properties = {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132, "warpSize": 32}
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: properties,
            load_binary=lambda *arguments: (1, 1, 32, 0, 1024),
            unload_module=lambda module: None,
        )

    def get_current_target(self) -> Any:
        """Return the architecture to compile for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", ARCH, 32)

    def get_current_device(self) -> int:
        """Return the first device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return the default stream."""
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Return the function that would call the driver."""

        def launch(*arguments: Any) -> None:
            if self.keep:
                self.launched.append(arguments)

        return launch


@contextmanager
def stand_in() -> Iterator[StandIn]:
    """Replace the driver with a `StandIn`."""
    from triton.runtime import driver

    active, fake = driver._active, StandIn()
    driver.set_active(fake)
    try:
        yield fake
    finally:
        driver._active = active


def calls(device: str = "cpu") -> dict[str, Callable[[], None]]:
    """Return one call for each kernel family."""
    channels, kept = 64, 32
    generator = torch.Generator().manual_seed(0)
    weight = {kernel: torch.randn(channels, channels, kernel, kernel, generator=generator).half() for kernel in (1, 3)}
    blocks = torch.cat([torch.arange(16 * b, 16 * b + 16) for b in (0, 2)]).int()
    scattered = torch.randperm(channels, generator=generator)[:kept].sort().values.int()
    nchw = torch.randn(2, channels, 8, 8, generator=generator).half()
    channels_last = nchw.contiguous(memory_format=torch.channels_last)

    def call(x: torch.Tensor, kernel: int, index: torch.Tensor) -> Callable[[], None]:
        x, w, index = (tensor.to(device) for tensor in (x, weight[kernel], index))
        out, padding = torch.empty_like(x), (kernel // 2,) * 4
        arguments = (out, x, w, index, None, (1, 1), padding, (1, 1))
        packed = _C.pack_weight(w, None, index, by_input=False)
        return lambda: ops.gathered_conv2d(*arguments, packed=packed)

    return {
        "NCHW 1x1": call(nchw, 1, scattered),
        "3x3 over blocks": call(channels_last, 3, blocks),
        "3x3 with a copy": call(channels_last, 3, scattered),
    }


def microseconds(call: Callable[[], None], rounds: int) -> float:
    """Median time of a call in groups of ten; a GPU is synchronised before each group."""
    for _ in range(20):
        call()
    times = []
    for _ in range(rounds):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            call()
        times.append((time.perf_counter() - start) / 10 * 1e6)
    return round(statistics.median(times), 1)


def main() -> None:
    """Print both times of every call."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.launch_overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    rounds, figures = options.rounds, {}
    with stand_in() if options.device == "cpu" else contextlib.nullcontext():
        for name, call in calls(options.device).items():
            prepared, run = microseconds(call, rounds), Launch.run
            Launch.run = Launch.run_by_triton  # type: ignore[method-assign]
            try:
                figures[name] = {"prepared_us": prepared, "triton_us": microseconds(call, rounds)}
            finally:
                Launch.run = run  # type: ignore[method-assign]
    reach = "up_to_the_driver" if options.device == "cpu" else "of_a_call"
    print(json.dumps({f"host_microseconds_{reach}": figures}))


if __name__ == "__main__":
    main()
