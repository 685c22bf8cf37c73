"""Measures a cell: prepares the variants, checks every result, times them in interleaved rounds."""

import statistics
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from benches import baselines, gate, ours
from benches.baselines import Variant
from benches.cases import Cell
from benches.machine import Roofline
from benches.problem import NumberStore, Problem
from benches.rows import Row, row_of, with_ratios
from benches.summary import NOISE
from benches.timers import Spread, clock, interleave

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Independent of the budget: the median of fewer rounds says little.
MIN_ROUNDS = 5
MAX_ROUNDS = 50
# Rounds added if ``auto`` seems to be slower.
CONFIRMING_ROUNDS = 21


def seems_to_lose(samples: Mapping[str, Sequence[float]]) -> bool:
    """Whether ``auto`` is slower than dense or gather + conv by more than noise."""
    baselines = [statistics.median(samples[name]) for name in ("dense", "gather_conv") if name in samples]
    return "auto" in samples and bool(baselines) and statistics.median(samples["auto"]) > (1 + NOISE) * min(baselines)


class Bench:
    """Measures the cells of one study on one device, in one dtype.

    Args:
        device: ``cpu`` or ``cuda``.
        dtype: ``float32`` or ``bfloat16``.
        roofline: Peaks of the machine; without them rows have no ``roofline_share``.
    """

    def __init__(self, device: torch.device, dtype: str, roofline: Roofline | None = None) -> None:
        self.device = device
        self.dtype = dtype
        self.roofline = roofline
        self.store = NumberStore(DTYPES[dtype], device)
        self.clock = clock(device)
        self._dense_errors: dict[tuple[str, int, str], float] = {}

    def problem(self, cell: Cell) -> Problem:
        """Return the tensors of a cell."""
        return Problem.make(cell, self.store, DTYPES[self.dtype], self.device)

    def prepare(self, name: str, problem: Problem, pool_share: float = 1.0) -> Variant:
        """Prepare a baseline or a backend."""
        if name in ours.BACKENDS:
            return ours.prepare(name, problem)
        return baselines.prepare(name, problem, self.clock, pool_share)

    def check(self, name: str, variant: Variant, problem: Problem, reference: Tensor) -> float:
        """Check a variant on the first input and return its largest error.

        Raises:
            WrongResultError: If the result is wrong, or has another memory format than it must have.
        """
        variant.enter()
        result = torch.as_tensor(variant.run(variant.inputs[0]))
        if name in ours.BACKENDS or variant.same_layout:
            gate.check_layout(name, result, problem.cell.layout)
        if name == "dense":
            return self._dense_error(result, variant, problem)
        if variant.all_outputs and problem.out_index is not None:
            result = result.index_select(1, problem.out_index)
        return gate.check(f"{name} on {problem.cell.id}", result, reference, variant.length)

    def _dense_error(self, result: Tensor, variant: Variant, problem: Problem) -> float:
        # The same for all densities and lists; its float64 reference is the most expensive one.
        key = (problem.cell.case.network + problem.cell.case.shape, problem.cell.batch, problem.cell.layout)
        if key not in self._dense_errors:
            reference = gate.dense_reference(problem, problem.inputs[0])
            self._dense_errors[key] = gate.check(f"dense on {problem.cell.id}", result, reference, variant.length)
        return self._dense_errors[key]

    def rows(self, cell: Cell, names: Sequence[str], seconds: float) -> list[Row]:
        """Measure one cell.

        Args:
            cell: The cell.
            names: Baselines and backends.
            seconds: Time to spend, with preparation and checks; at least five rounds are run.

        Raises:
            WrongResultError: If any result is wrong.
        """
        start = time.perf_counter()
        with torch.inference_mode():
            problem = self.problem(cell)
            names = [name for name in names if baselines.applies(name, cell)]
            share = 1 / max(1, len(names) - 1)
            prepared = {name: self.prepare(name, problem, share) for name in names}
            reference = gate.kept_reference(problem, problem.inputs[0])
            errors = {name: self.check(name, variant, problem, reference) for name, variant in prepared.items()}
            remaining = seconds - (time.perf_counter() - start)
            samples = interleave(prepared, self.clock, remaining, MIN_ROUNDS, MAX_ROUNDS)
            if seems_to_lose(samples):
                # On a shared machine a few rounds show losses by chance: run more rounds of all variants.
                more = interleave(prepared, self.clock, 0.0, CONFIRMING_ROUNDS, CONFIRMING_ROUNDS)
                samples = {name: samples[name] + more[name] for name in samples}
        if any(name in ours.BACKENDS for name in names):
            ours.clear_packed()
        return with_ratios(
            self.row(name, prepared[name], problem, errors[name], Spread.of(samples[name])) for name in names
        )

    def row(self, name: str, variant: Variant, problem: Problem, error: float, spread: Spread) -> Row:
        """Return the row of one variant, without speed-ups."""
        cell = problem.cell
        flop, moved = problem.work(dense=name == "dense")
        return row_of(
            cell,
            spread,
            flop,
            **cell.row_fields,
            variant=name,
            candidate=variant.candidate,
            device=self.device.type,
            dtype=self.dtype,
            inputs="rotated" if problem.rotated else "warm",
            max_error=error,
            bytes=moved,
            roofline_share=self.roofline.seconds(flop, moved) / spread.p50 if self.roofline else None,
        )
