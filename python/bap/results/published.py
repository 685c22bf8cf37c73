"""Rows of published tables, each with the mark that says how far it was checked.

[P]: stated in a published abstract, caption, table or public code that was read. [Q]: quoted from memory of the paper.
A score that is computed here, from the accuracies of the row, has no mark: accuracies are printed with two digits,
which moves S by up to 0.6 %.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bap.results.scores import DECATHLON_BASELINE, SKETCH_BASELINE, score

__all__ = ["DECATHLON_ROWS", "SKETCH_ROWS", "PublishedRow"]


@dataclass(frozen=True)
class PublishedRow:
    """One row: relative FLOP and Params are None where they are not known.

    Args:
        method: name of the method.
        s: its score S, as published; None where only accuracies are.
        flop, params: relative to the backbone.
        mark: ``"P"`` or ``"Q"``, of what is published.
        recomputed: S by :func:`bap.results.scores.score` from the row's accuracies, where these are known.
        accuracy: {domain: per cent}, as published; empty where it is not known.
    """

    method: str
    s: float | None
    flop: float | None
    params: float | None
    mark: str
    recomputed: float | None = None
    accuracy: Mapping[str, float] = field(default_factory=dict)


_ORDER = tuple(DECATHLON_BASELINE)
# Accuracies in per cent in the order of the table: Flowers before Omniglot, as in DECATHLON_BASELINE [P].
SCRATCH = dict(zip(_ORDER, (59.87, 57.10, 75.73, 91.20, 37.77, 96.55, 56.30, 88.74, 96.63, 43.27), strict=True))
PIGGYBACK = dict(zip(_ORDER, (57.69, 65.29, 79.87, 96.99, 57.45, 97.27, 79.09, 87.63, 97.24, 47.48), strict=True))
# Read from a figure of VICO-UoE/UniversalRepresentations (Li, Liu and Bilen, IJCV 2023), a ResNet-26: all domains in
# one network trained jointly; URL, the same distilled from single networks; URL with parallel adapters [P].
JOINT = dict(zip(_ORDER, (59.30, 67.21, 79.60, 97.08, 57.66, 97.28, 83.88, 87.41, 96.39, 45.76), strict=True))
URL = dict(zip(_ORDER, (61.45, 74.35, 80.45, 97.55, 59.57, 98.24, 86.73, 89.72, 96.95, 49.01), strict=True))
URL_ADAPTERS = dict(zip(_ORDER, (61.97, 77.17, 82.31, 97.58, 60.69, 98.75, 87.28, 90.40, 97.14, 51.89), strict=True))


def _row(
    method: str, s: float | None, flop: float | None, params: float, accuracy: Mapping[str, float]
) -> PublishedRow:
    return PublishedRow(method, s, flop, params, "P", score(accuracy, DECATHLON_BASELINE), accuracy)


DECATHLON_ROWS = (
    _row("Scratch", 1625, 1.0, 10.0, SCRATCH),
    _row("Finetune", 2500, 1.0, 10.0, DECATHLON_BASELINE),
    _row("Piggyback", 2838, 1.0, 1.28, PIGGYBACK),
    _row("Joint training, ResNet-26", 2866, 1.0, 1.0, JOINT),
    _row("URL, ResNet-26", None, 1.0, 1.0, URL),
    _row("URL + parallel adapters, ResNet-26", None, None, 2.0, URL_ADAPTERS),
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
