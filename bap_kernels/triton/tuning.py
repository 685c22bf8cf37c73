"""Tuning on request: each case that is met is measured with every configuration that fits, and the fastest is kept.

It is on inside ``bap_kernels.tune`` and with ``BAP_KERNELS_AUTOTUNE=1``, and off while a CUDA graph is captured. What
was measured is kept in ``BAP_KERNELS_CACHE_DIR``, a file for each kind of GPU, and taken by later runs unmeasured.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from bap_kernels._files import read_text, write_text
from bap_kernels.settings import settings
from bap_kernels.triton import configs
from bap_kernels.triton.configs import Config, Problem
from bap_kernels.triton.launch_spec import Launch, Target

__all__ = ["Tuned", "candidates", "file_of", "load", "save", "tune_case", "tuning"]

Make = Callable[[], Launch]


@dataclass(frozen=True)
class Tuned:
    """What tuning found for one case.

    Args:
        problem: the case.
        products: "16", "tf32" or "ieee".
        config: the fastest configuration.
        seconds: its time.
        table_seconds: that of the configuration that the table has.
    """

    problem: Problem
    products: str
    config: Config
    seconds: float
    table_seconds: float


_log: list[list[Tuned]] = []


@contextlib.contextmanager
def tuning() -> Iterator[list[Tuned]]:
    """Measures every case that is met inside; gives what was found."""
    tuned: list[Tuned] = []
    _log.append(tuned)
    try:
        yield tuned
    finally:
        _log.remove(tuned)


def candidates(products: str, capability: int) -> list[Config]:
    """Configurations worth measuring: those of all tables with these products, the architecture's own first."""
    own = configs.TABLE[configs.architecture(capability).table, products]
    others = [config for (_, kind), table in configs.TABLE.items() if kind == products for config in table.values()]
    return list(dict.fromkeys([*own.values(), *others]))


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    from triton.testing import do_bench_cudagraph

    run()
    # A graph: what the host spends on a launch is longer than many of these kernels.
    return do_bench_cudagraph(run, rep=10, return_mode="median") / 1e3


def _too_large() -> tuple[type[Exception], ...]:
    from triton.runtime.errors import OutOfResources, PTXASError

    return (OutOfResources, PTXASError)


def tune_case(problem: Problem, dtype: torch.dtype, target: Target, device: torch.device, make: Make) -> None:
    """Measures a case with every candidate, where tuning is on and the case is new; reads what is known of the device.

    Args:
        make: makes the case's launch with the configuration that :func:`bap_kernels.triton.configs.choose` then gives.
    """
    load(device)
    products, capability = target.products(dtype), target.capability
    key = (capability, products, problem)
    if not (_log or settings.autotune) or key in configs.tuned or configs.overridden():
        return
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return
    table = configs.from_table(problem.rows, problem.columns, products, capability)
    times = {}
    for config in dict.fromkeys([table, *candidates(products, capability)]):
        with configs.overriding(config), contextlib.suppress(*_too_large()):
            times[config] = _seconds(make().run, device)
    if table not in times:
        return
    best = min(times, key=lambda config: times[config])
    # A tie within the noise of the measurement leaves the table's.
    best = best if times[best] < 0.97 * times[table] else table
    configs.tuned[key] = best
    result = Tuned(problem, products, best, times[best], times[table])
    for log in _log:
        log.append(result)
    save(device)


def file_of(device: torch.device) -> Path | None:
    """Where the results for a device are kept; None keeps them in memory."""
    if settings.cache_dir is None:
        return None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return settings.cache_dir / f"triton-v1-{''.join(c if c.isalnum() else '-' for c in name)}.json"


@functools.cache
def load(device: torch.device) -> None:
    """Reads what earlier runs have measured on such a device, once; a file that is damaged counts as none."""
    file = file_of(device)
    text = read_text(file) if file else None
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
        for row in json.loads(text) if text else ():
            problem, config = Problem(**row["problem"]), Config(**row["config"])
            if all(isinstance(n, int) and n > 0 for n in astuple(config)):
                configs.tuned.setdefault((int(row["capability"]), str(row["products"]), problem), config)


def save(device: torch.device) -> None:
    """Writes everything that is known, as a whole file or not at all; a folder that cannot be written is no error."""
    file = file_of(device)
    if file is None:
        return
    rows: list[dict[str, Any]] = [
        {"capability": capability, "products": products, "problem": problem._asdict(), "config": vars(config)}
        for (capability, products, problem), config in configs.tuned.items()
    ]
    write_text(file, json.dumps(rows))
