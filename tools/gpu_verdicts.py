"""The verifier's verdicts on the kernels, for the report of a GPU."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any


def read_verdicts(out: Path) -> dict[str, dict[str, Any]]:
    """The verdicts by family that the verifier has left in the report's cache, of the build that it saw last."""
    try:
        content = json.loads((out / "cache/verdicts-v1.json").read_text(encoding="utf-8"))
        return content["devices"][-1]["families"]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return {}


def verdict_table(verdicts: dict[str, dict[str, Any]]) -> str:
    """Verdicts as Markdown: kernels by math modes, then the reasons of those that are not ok.

    Examples:
        >>> from tools.gpu_verdicts import verdict_table
        >>> found = {"cuda/halo/tf32": {"verdict": "ok"}, "cuda/pack/tf32": {"verdict": "hang", "reason": "no end"}}
        >>> print(verdict_table(found))
        | kernel | tf32 |
        |---|---|
        | cuda/halo | ok |
        | cuda/pack | hang |
        <BLANKLINE>
        - cuda/pack/tf32: hang, no end
        <BLANKLINE>
    """
    maths = list(dict.fromkeys(family.rpartition("/")[2] for family in verdicts))
    kernels = list(dict.fromkeys(family.rpartition("/")[0] for family in verdicts))
    lines = [f"| kernel | {' | '.join(maths)} |", f"|---|{'---|' * len(maths)}"]
    for kernel in kernels:
        cells = [verdicts.get(f"{kernel}/{math}", {}).get("verdict", "–") for math in maths]
        lines.append(f"| {kernel} | {' | '.join(cells)} |")
    left_out = [(name, each) for name, each in verdicts.items() if each["verdict"] != "ok"]
    lines += ["", *(f"- {name}: {each['verdict']}, {each['reason'].replace('|', '/')}" for name, each in left_out)]
    return "\n".join(lines) + "\n"


def not_verified(verdicts: dict[str, dict[str, Any]], math: str) -> list[str]:
    """Backends that must not be named in a bench of a math mode: a family of theirs is not ok there, or has no verdict.

    Examples:
        >>> from tools.gpu_verdicts import not_verified
        >>> not_verified({"cuda/halo/tf32": {"verdict": "ok"}, "triton/pack/tf32": {"verdict": "hang"}}, "tf32")
        ['triton']
        >>> not_verified({}, "tf32")
        ['triton', 'cuda']
    """
    unverified = []
    for backend in ("triton", "cuda"):
        own = [each for name, each in verdicts.items() if name.startswith(f"{backend}/") and name.endswith(f"/{math}")]
        if not own or any(each["verdict"] != "ok" for each in own):
            unverified.append(backend)
    return unverified


def summary_of(verdicts: dict[str, dict[str, Any]]) -> str:
    """How many families have which verdict."""
    counts = Counter(each["verdict"] for each in verdicts.values())
    return ", ".join(f"{count} {name}" for name, count in counts.items())
