"""What a study runs: budgets, sharing losses and seeds, variants of the method, and baselines."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bap.config import LOSSES, Config, Distill, full_names, override_values
from bap.results.compare import BASELINES, MATCHES
from bap.train.distill import learns_from_dense
from bap.train.pretrain import PRETRAINING

__all__ = ["Cell", "StudyGrid"]

# What a variant may not change: the cell says it, or all runs of a seed have it in common.
_OF_THE_STUDY = {*PRETRAINING, "budget.beta", "data.domains", "data.source", "data.evaluate_on", "model.weights"}


@dataclass(frozen=True)
class Cell:
    """One run of the method.

    Args:
        beta: its budget.
        sharing: its sharing loss, which a variant may change.
        seed: of everything random.
        variant: its name, or "".
    """

    beta: float
    sharing: str | None
    seed: int
    variant: str = ""

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return f"beta{self.beta:g}_{self.variant or self.sharing or 'none'}_seed{self.seed}"


@dataclass(frozen=True)
class StudyGrid:
    """The runs of a study.

    Args:
        betas, sharings, seeds: the cells.
        baseline: also trains a whole network for each domain and seed, which S needs.
        compare: baselines to run beside the cells of the first sharing loss, see :mod:`bap.results.compare`.
        match: what they are matched on, of :data:`bap.results.compare.MATCHES`.
        variants: {name: ``group.name=value`` overrides}: the method with other settings, beside the same cells. The
            teacher ``dense`` is the dense network that the study trains for each seed.

    Raises:
        ValueError: for unknown baselines and names, and settings that a variant cannot have.

    Examples:
        >>> from bap.results.grid import StudyGrid
        >>> grid = StudyGrid((0.5,), ("union", None), (0,), variants={"annealed": ["anneal=cubic"]})
        >>> [cell.name for cell in grid.cells(0)]
        ['beta0.5_union_seed0', 'beta0.5_none_seed0', 'beta0.5_annealed_seed0']
    """

    betas: Sequence[float] = (1.0, 0.75, 0.5, 0.25)
    sharings: Sequence[str | None] = (None, *LOSSES)
    seeds: Sequence[int] = (0, 1, 2)
    baseline: bool = True
    compare: Sequence[str] = ()
    match: Sequence[str] = MATCHES
    variants: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for names, allowed in ((self.compare, BASELINES), (self.match, MATCHES)):
            unknown = [value for value in names if value not in allowed]
            if unknown:
                raise ValueError(f"study(): expected baselines and matches to be among {list(allowed)}, got {unknown}.")
        taken = {"none", *LOSSES, *BASELINES}
        for name, overrides in self.variants.items():
            if name in taken or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", name):
                raise ValueError(
                    "study(): expected the name of a variant to be of letters, digits, '.', '+' and '-', and none of "
                    f"{sorted(taken)}, got {name!r}."
                )
            fixed = sorted(_OF_THE_STUDY & override_values(overrides).keys())
            if fixed:
                raise ValueError(
                    f"study(): expected variants to leave what all runs of a study share, got {', '.join(fixed)} in "
                    f"{name!r}. Hint: set it for the whole study, or make another one."
                )

    @property
    def reference(self) -> str | None:
        """The sharing loss of the cells that variants and baselines stand beside."""
        return next((sharing for sharing in self.sharings if sharing is not None), None)

    def cells(self, seed: int) -> list[Cell]:
        """The cells of a seed, those of variants last."""
        plain = [Cell(beta, sharing, seed) for beta in self.betas for sharing in self.sharings]
        return plain + [Cell(beta, self.reference, seed, name) for beta in self.betas for name in self.variants]

    def settings(self, config: Config, cell: Cell) -> Config:
        """Settings of a cell; its teacher may still be named ``dense``."""
        changes: dict[str, Any] = {"seed": cell.seed, "beta": cell.beta, "sharing": cell.sharing}
        return config.replace(**{**full_names(changes), **override_values(self.variants.get(cell.variant, ()))})

    def needs_dense(self, config: Config) -> bool:
        """Whether a cell learns from the dense network of its seed."""
        return self.teaching(config) is not None

    def teaching(self, config: Config) -> Distill | None:
        """How the first cell that learns from the dense network does so; None if there is none."""
        settings = (self.settings(config, cell) for cell in self.cells(0))
        return next((each.distill for each in settings if learns_from_dense(each)), None)
