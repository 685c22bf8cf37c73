"""Fixtures of the benchmarks, and a description of the machine for ``--benchmark-json``."""

import itertools
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from benches import gate, memory, ours
from benches.cases import Cell
from benches.machine import commit, cpu_model, versions
from benches.measure import Bench
from benches.network_models import NetworkCell
from benches.networks import NetworkBench
from benches.problem import Problem
from benches.timers import CpuClock, Timed

memory.keep_freed()
CPU = torch.device("cpu")
# There are thousands of benchmarks.
SECONDS_EACH = 0.1
MIN_ROUNDS, MAX_ROUNDS = 3, 50


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Add versions and threads, on which results depend."""
    machine_info["bap_kernels"] = {
        "commit": commit(),
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


class LayerBench(Bench):
    """A bench that caches the tensors of the last cell, whose variants follow one another."""

    def __init__(self) -> None:
        super().__init__(CPU, "float32")
        self.tensors: Callable[[Cell], tuple[Problem, Tensor]] = lru_cache(maxsize=1)(self._tensors)

    def _tensors(self, cell: Cell) -> tuple[Problem, Tensor]:
        problem = self.problem(cell)
        return problem, gate.kept_reference(problem, problem.inputs[0])


class WholeBench(NetworkBench):
    """A bench of networks that caches the float64 logits of the last cell."""

    def __init__(self) -> None:
        super().__init__(CPU, "float32")
        self.logits: Callable[[NetworkCell], Tensor] = lru_cache(maxsize=1)(self._logits)

    def _logits(self, cell: NetworkCell) -> Tensor:
        return self.reference(cell, self.inputs(cell)[0])


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def layer_bench() -> LayerBench:
    """Return the bench of single layers."""
    return LayerBench()


@pytest.fixture(scope="session")
def network_bench() -> WholeBench:
    """Return the bench of whole networks."""
    return WholeBench()


@pytest.fixture(scope="session")
def require_backend() -> Iterator[Callable[[str], None]]:
    """Return a function that skips the benchmark if a backend cannot run here."""
    used: list[str] = []

    def require(name: str) -> None:
        if name not in ours.BACKENDS:
            return
        if not used:
            ours.reset_choices()
            used.append(name)
        if reason := ours.library().unsupported_reason(name):
            pytest.skip(f"{name}: {reason}")

    yield require
    if used:
        ours.package().use_backend("auto")
        ours.clear_packed()


@pytest.fixture
def time_in_rounds(benchmark: Any) -> Callable[[Timed], None]:
    """Return a function that benchmarks a prepared variant for about a tenth of a second with rotating inputs."""

    def run(timed: Timed) -> None:
        timed.enter()
        inputs = itertools.cycle([*timed.inputs[1:], timed.inputs[0]])
        seconds = CpuClock()(timed.run, timed.inputs[0])
        rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(SECONDS_EACH / seconds)))
        benchmark.pedantic(
            timed.run,
            setup=lambda: ((next(inputs),), {}),
            rounds=rounds,
            warmup_rounds=1,
        )

    return run
