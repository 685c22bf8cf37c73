r"""Scores of multi-domain learning (Visual Decathlon), from test errors E in [0, 1].

    S = Σ_d α_d max(0, E_d^max − E_d)^γ,   γ = 2,   E_d^max = 2 E_d^base,   α_d = 1000 (E_d^max)^(−γ)      [P]
    S_O = S / FLOP,   S_P = S / Params                                                                    [Q]
    combined = S_O S_P                                                                                    [R]

A perfect domain gives 1000, one as good as the baseline 250. FLOP and Params are relative to the backbone, see
:mod:`bap.prune.counting`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "DECATHLON_BASELINE",
    "PUBLISHED_BASELINES",
    "SKETCH_BASELINE",
    "Scores",
    "domain_scores",
    "named_scores",
    "score",
    "scores",
    "shown_score",
]

# Accuracies in per cent: the decathlon's "finetune" row [P].
DECATHLON_BASELINE = {
    "imagenet12": 59.87,
    "aircraft": 60.34,
    "cifar100": 82.12,
    "daimlerpedcls": 92.82,
    "dtd": 55.53,
    "gtsrb": 97.53,
    "vgg-flowers": 81.41,
    "omniglot": 87.69,
    "svhn": 96.55,
    "ucf101": 51.20,
}
# ResNet-50, one network for each domain [P].
SKETCH_BASELINE = {
    "imagenet": 76.16,
    "cubs_cropped": 82.83,
    "stanford_cars_cropped": 91.83,
    "flowers": 96.56,
    "wikiart": 75.60,
    "sketches": 80.78,
}
PUBLISHED_BASELINES = {"decathlon": DECATHLON_BASELINE, "sketch": SKETCH_BASELINE}


def domain_scores(accuracy: Mapping[str, float], baseline: Mapping[str, float], gamma: float = 2.0) -> dict[str, float]:
    """The contribution of each domain to S.

    Args:
        accuracy: {domain: test accuracy in per cent}.
        baseline: the same of the baseline, for at least these domains.
        gamma: γ.

    Raises:
        ValueError: if a domain has no baseline, an accuracy is outside [0, 100], or a baseline is 100, for which the
            score is not defined.

    Examples:
        >>> from bap.results.scores import domain_scores
        >>> domain_scores({"a": 100.0, "b": 80.0, "c": 10.0}, {"a": 70.0, "b": 80.0, "c": 60.0})
        {'a': 1000.0, 'b': 250.0, 'c': 0.0}
    """
    points = {}
    for name, value in accuracy.items():
        if name not in baseline:
            raise ValueError(f"domain_scores(): expected `baseline` to have {name!r}, got {sorted(baseline)}.")
        for kind, percent in (("accuracy", value), ("baseline", baseline[name])):
            if not 0 <= percent <= 100:
                raise ValueError(
                    f"domain_scores(): expected `{kind}` in per cent, from 0 to 100, got {percent} for {name!r}."
                )
        most = 2 * (1 - baseline[name] / 100)
        if most <= 0:
            raise ValueError(
                f"domain_scores(): expected `baseline` below 100, got {baseline[name]} for {name!r}, "
                "for which the score is not defined."
            )
        error = 1 - value / 100
        points[name] = round(1000 * (max(0.0, most - error) / most) ** gamma, 9)
    return points


def score(accuracy: Mapping[str, float], baseline: Mapping[str, float], gamma: float = 2.0) -> float:
    """S: the sum of :func:`domain_scores`.

    Examples:
        >>> from bap.results.scores import DECATHLON_BASELINE, score
        >>> score(DECATHLON_BASELINE, DECATHLON_BASELINE)
        2500.0
    """
    return sum(domain_scores(accuracy, baseline, gamma).values())


@dataclass(frozen=True)
class Scores:
    """S, and the scores derived from it.

    Args:
        s: S.
        flop: mean multiply-adds of the domains, relative to the backbone.
        params: parameters of all domains together, relative to the backbone.
    """

    s: float
    flop: float
    params: float

    @property
    def s_o(self) -> float:
        """S_O = S / FLOP [Q]."""
        return self.s / self.flop

    @property
    def s_p(self) -> float:
        """S_P = S / Params [Q]."""
        return self.s / self.params

    @property
    def combined(self) -> float:
        """S_O S_P [R]."""
        return self.s_o * self.s_p


def scores(
    accuracy: Mapping[str, float], baseline: Mapping[str, float], flop: float, params: float, gamma: float = 2.0
) -> Scores:
    """S, S_O, S_P and the combined score.

    Args:
        accuracy, baseline, gamma: as in :func:`domain_scores`.
        flop: relative multiply-adds, positive.
        params: relative parameters, positive.

    Raises:
        ValueError: if ``flop`` or ``params`` is not positive.

    Examples:
        >>> from bap.results.scores import scores
        >>> result = scores({"a": 80.0}, {"a": 80.0}, flop=0.5, params=1.25)
        >>> result.s, result.s_o, result.s_p, result.combined
        (250.0, 500.0, 200.0, 100000.0)
    """
    for name, value in (("flop", flop), ("params", params)):
        if not value > 0:
            raise ValueError(f"scores(): expected `{name}` to be positive, got {value}.")
    return Scores(score(accuracy, baseline, gamma), flop, params)


def named_scores(
    accuracy: Mapping[str, float],
    baseline: Mapping[str, float],
    flop: float,
    params: float,
    data: str | None = None,
    split: str = "test",
) -> dict[str, Any]:
    """:func:`scores` for JSON, named so that a part of a benchmark is not taken for the whole.

    The keys are ``S``, ``S_O``, ``S_P`` and ``combined`` for test accuracies of all domains. They end in ``_partial``
    where domains of the benchmark or of the baseline are missing, and in ``_val`` for validation accuracies.

    Args:
        accuracy, baseline, flop, params: as in :func:`scores`.
        data: the suite, ``"decathlon"`` or ``"sketch"``, whose published baseline says which domains there are.
        split: of the accuracies.

    Examples:
        >>> from bap.results.scores import DECATHLON_BASELINE, named_scores
        >>> named = named_scores({"dtd": 60.0}, DECATHLON_BASELINE, 1.0, 1.0, "decathlon", "val")
        >>> list(named)[:2], named["coverage"]
        (['S_partial_val', 'S_O_partial_val'], '1 of 10 domains')
    """
    published = PUBLISHED_BASELINES.get(data or "", {})
    whole = set(baseline) | set(published)
    end = ("" if set(accuracy) >= whole else "_partial") + ("" if split == "test" else f"_{split}")
    result = scores(accuracy, baseline, flop, params)
    return {
        f"S{end}": result.s,
        f"S_O{end}": result.s_o,
        f"S_P{end}": result.s_p,
        f"combined{end}": result.combined,
        "coverage": f"{len(accuracy)} of {len(whole)} domains",
        "split": split,
        "published_baseline": bool(published) and all(baseline[name] == published.get(name) for name in accuracy),
        "domains": domain_scores(accuracy, baseline),
    }


def shown_score(named: Mapping[str, Any] | None) -> tuple[float, str] | None:
    """S of :func:`named_scores`, and what must stand beside it: "" only for test accuracies of all domains.

    Examples:
        >>> from bap.results.scores import shown_score
        >>> shown_score({"S_partial_val": 250.0, "coverage": "1 of 10 domains", "split": "val"})
        (250.0, '1 of 10 domains, val')
    """
    for key, value in (named or {}).items():
        if key == "S" or key.startswith(("S_partial", "S_val", "S_train")):
            notes = [str((named or {}).get("coverage"))] if "partial" in key else []
            split = (named or {}).get("split", "split not recorded")
            return float(value), ", ".join(notes + ([] if split == "test" else [split]))
    return None
