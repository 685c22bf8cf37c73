"""Rows of published tables, each with the mark that says how far it was checked.

[P]: stated in a published abstract, caption, table or public code that was read. [Q]: quoted from memory of the paper.
A score that is computed here, from the accuracies of the row, has no mark: accuracies are printed with two digits,
which moves S by up to 0.6 %.
"""

from __future__ import annotations

from dataclasses import dataclass

from bap.results.scores import DECATHLON_BASELINE, SKETCH_BASELINE, score

__all__ = ["DECATHLON_ROWS", "SKETCH_ROWS", "PublishedRow"]


@dataclass(frozen=True)
class PublishedRow:
    """One row: relative FLOP and Params are None where they are not known.

    Args:
        method: name of the method.
        s: its score S, as published.
        flop, params: relative to the backbone.
        mark: ``"P"`` or ``"Q"``, of what is published.
        recomputed: S by :func:`bap.results.scores.score` from the row's accuracies, where these are known.
    """

    method: str
    s: float
    flop: float | None
    params: float | None
    mark: str
    recomputed: float | None = None


_ORDER = tuple(DECATHLON_BASELINE)
# Accuracies in per cent in the order of the table: Flowers before Omniglot, as in DECATHLON_BASELINE [P].
SCRATCH = dict(zip(_ORDER, (59.87, 57.10, 75.73, 91.20, 37.77, 96.55, 56.30, 88.74, 96.63, 43.27), strict=True))
PIGGYBACK = dict(zip(_ORDER, (57.69, 65.29, 79.87, 96.99, 57.45, 97.27, 79.09, 87.63, 97.24, 47.48), strict=True))

DECATHLON_ROWS = (
    PublishedRow("Scratch", 1625, 1.0, 10.0, "P", score(SCRATCH, DECATHLON_BASELINE)),
    PublishedRow("Finetune", 2500, 1.0, 10.0, "P", score(DECATHLON_BASELINE, DECATHLON_BASELINE)),
    PublishedRow("Piggyback", 2838, 1.0, 1.28, "P", score(PIGGYBACK, DECATHLON_BASELINE)),
    PublishedRow("BA2 beta=1.00", 3199, 0.646, 1.03, "Q"),
    PublishedRow("BA2 beta=0.75", 3063, 0.612, None, "Q"),
    PublishedRow("BA2 beta=0.50", 2999, 0.543, None, "Q"),
    PublishedRow("BA2 beta=0.25", 2538, 0.325, None, "Q"),
)
SKETCH_ROWS = (
    PublishedRow("Finetune, ResNet-50", 1500, 1.0, 6.0, "P", score(SKETCH_BASELINE, SKETCH_BASELINE)),
    PublishedRow("BA2 beta=1.00, ResNet-50", 1265, None, None, "Q"),
    PublishedRow("BA2 beta=0.75, ResNet-50", 1006, None, None, "Q"),
    PublishedRow("BA2 beta=0.50, ResNet-50", 1012, None, None, "Q"),
    PublishedRow("BA2 beta=0.25, ResNet-50", 755, None, None, "Q"),
)
