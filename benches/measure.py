"""From a cell to its rows: prepare the variants, check every result, time them in interleaved rounds."""

import statistics
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from benches import baselines, gate, ours
from benches.baselines import Variant
from benches.cases import Cell
from benches.machine import Roof
from benches.problem import NumberStore, Problem, normal_tensors
from benches.rows import Row, row_of, with_ratios
from benches.summary import NOISE
from benches.timers import Spread, clock, interleave

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# At least this many rounds, whatever the budget: fewer have no median worth the name.
MIN_ROUNDS = 5
MAX_ROUNDS = 50
# Rounds added where ``auto`` seems to lose.
CONFIRMING_ROUNDS = 21


def seems_to_lose(samples: Mapping[str, Sequence[float]]) -> bool:
    """Whether ``auto`` is slower than dense or gather + conv by more than noise."""
    rivals = [statistics.median(samples[name]) for name in ("dense", "best") if name in samples]
    return "auto" in samples and bool(rivals) and statistics.median(samples["auto"]) > (1 + NOISE) * min(rivals)


class Bench:
    """What all cells of one study share: device, dtype, random numbers, clock and roof.

    Args:
        device: Where to measure.
        dtype: ``float32`` or ``bfloat16``.
        roof: Peaks of the machine, or None to leave ``roof_share`` out.
    """

    def __init__(self, device: torch.device, dtype: str, roof: Roof | None = None) -> None:
        self.device = device
        self.dtype = dtype
        self.roof = roof
        self.store = NumberStore(DTYPES[dtype], device)
        self.clock = clock(device)
        self._dense_errors: dict[tuple[str, int, str], float] = {}

    def problem(self, cell: Cell) -> Problem:
        """Make the tensors of a cell."""
        with normal_tensors():
            return Problem.make(cell, self.store, DTYPES[self.dtype], self.device)

    def prepare(self, name: str, problem: Problem, pool_share: float = 1.0) -> Variant:
        """Prepare one variant or backend."""
        if name in ours.BACKENDS:
            return ours.prepare(name, problem)
        return baselines.prepare(name, problem, self.clock, pool_share)

    def gated(self, name: str, variant: Variant, problem: Problem, reference: Tensor) -> float:
        """Check a variant on the first input and return its largest error.

        Raises:
            WrongResultError: If the result is wrong, or ours is in another memory format than the input.
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
        # The same for all densities and lists: its float64 reference is the dearest of all.
        key = (problem.cell.case.network + problem.cell.case.shape, problem.cell.batch, problem.cell.layout)
        if key not in self._dense_errors:
            reference = gate.dense_reference(problem, problem.inputs[0])
            self._dense_errors[key] = gate.check(f"dense on {problem.cell.id}", result, reference, variant.length)
        return self._dense_errors[key]

    def rows(self, cell: Cell, names: Sequence[str], seconds: float) -> list[Row]:
        """Measure one cell.

        Args:
            cell: What to measure.
            names: Variants and backends.
            seconds: Time to spend, preparation and checks included; at least five rounds are made.

        Raises:
            WrongResultError: If any result is wrong; nothing of the cell is then returned.
        """
        start = time.perf_counter()
        with torch.inference_mode():
            problem = self.problem(cell)
            names = [name for name in names if baselines.applies(name, cell)]
            share = 1 / max(1, len(names) - 1)
            prepared = {name: self.prepare(name, problem, share) for name in names}
            reference = gate.kept_reference(problem, problem.inputs[0])
            errors = {name: self.gated(name, variant, problem, reference) for name, variant in prepared.items()}
            left = seconds - (time.perf_counter() - start)
            samples = interleave(prepared, self.clock, left, MIN_ROUNDS, MAX_ROUNDS)
            if seems_to_lose(samples):
                # A few rounds on a shared machine show losses that are not there: more rounds, for all variants alike.
                more = interleave(prepared, self.clock, 0.0, CONFIRMING_ROUNDS, CONFIRMING_ROUNDS)
                samples = {name: samples[name] + more[name] for name in samples}
        if any(name in ours.BACKENDS for name in names):
            ours.forget_packed()
        return with_ratios(
            self.row(name, prepared[name], problem, errors[name], Spread.of(samples[name])) for name in names
        )

    def row(self, name: str, variant: Variant, problem: Problem, error: float, spread: Spread) -> Row:
        """Put one variant's figures together, without the ratios."""
        cell = problem.cell
        flop, moved = problem.work(dense=name == "dense")
        return row_of(
            cell,
            spread,
            flop,
            **cell.facts,
            variant=name,
            candidate=variant.candidate,
            device=self.device.type,
            dtype=self.dtype,
            inputs="rotated" if problem.rotated else "warm",
            max_error=error,
            bytes=moved,
            roof_share=self.roof.seconds(flop, moved) / spread.p50 if self.roof else None,
        )
