"""The table over budgets, sharing losses and seeds of one suite; stopped, it goes on where it was."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bap.config import Config
from bap.data import Domain
from bap.files import read_json, write_bytes, write_json
from bap.network import load_domains, source_of
from bap.pretrain import pretrain
from bap.run import scored, train_run

__all__ = ["pretrained", "study", "study_table"]


def pretrained(config: Config, domains: dict[str, Domain], folder: Path, progress: bool = False) -> Path:
    """File with the backbone of a seed, trained on the source if it is not there yet."""
    path = folder / f"backbone_seed{config.seed}.safetensors"
    if not path.exists():
        pretrain(config, domains[source_of(config, domains)], path, progress)
    return path


def _baseline(config: Config, domains: dict[str, Domain], folder: Path) -> dict[str, float]:
    """Accuracy of a whole network for each domain, all of it trained from the source's: what S is relative to."""
    made = {}
    for name, domain in domains.items():
        path = folder / f"finetune_{name}_seed{config.seed}"
        if not (path / "results.json").exists():
            alone = dataclasses.replace(
                config, beta=1.0, sharing=None, train_backbone=True, lr_backbone=config.lr_head / 2, source=name
            )
            train_run(alone, path, resume=True, baseline={}, domains={name: domain}, progress=False)
        made[name] = read_json(path / "results.json")["accuracy"][name]
    return made


def study(
    config: Config,
    folder: str | Path,
    betas: Sequence[float] = (1.0, 0.75, 0.5, 0.25),
    sharings: Sequence[str | None] = (None, "int", "union", "jaccard"),
    seeds: Sequence[int] = (0, 1, 2),
    baseline: bool = True,
    say: Callable[[str], None] = print,
) -> Path:
    """Runs what is not there yet, and writes study.json and study.md.

    Args:
        config: settings that all runs share; seed, budget and sharing loss are set here.
        folder: for the runs; finished ones are kept, an unfinished one goes on from its last epoch.
        betas, sharings, seeds: the cells.
        baseline: also trains a whole network for each domain and seed, which S needs.
        say: told of every finished run.

    Returns:
        The path of study.md.
    """
    folder = Path(folder)
    domains = load_domains(config)
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        base = dataclasses.replace(config, seed=seed)
        weights = str(pretrained(base, domains, folder))
        base = dataclasses.replace(base, weights=weights)
        reference = _baseline(base, domains, folder) if baseline else {}
        if reference:
            write_json(folder / f"baseline_seed{seed}.json", reference)
        for beta in betas:
            for sharing in sharings:
                path = folder / f"beta{beta:g}_{sharing or 'none'}_seed{seed}"
                if not (path / "results.json").exists():
                    one = dataclasses.replace(base, beta=beta, sharing=sharing)
                    done = train_run(one, path, resume=True, baseline=reference, domains=domains, progress=False)
                    say(f"{path.name}: accuracy {done['mean_accuracy']:.2f} %, Params {done['cost']['params']:.3f}")
                # A cell may have been run before its baseline was.
                results = read_json(path / "results.json")
                rows.append({"seed": seed, **results, **scored(results, reference)})
                write_json(
                    folder / "study.json", {"config": config.as_dict(), "torch": torch.__version__, "rows": rows}
                )
                write_bytes(folder / "study.md", (study_table(rows) + "\n").encode())
    return folder / "study.md"


def _shown(values: Sequence[float], digits: int) -> str:
    if not values:
        return "–"
    text = f"{statistics.fmean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def study_table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of means, and ± the standard deviation over the seeds where there are several."""
    cells: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["beta"], row["sharing"] or "none"), []).append(row)
    names = list(rows[0]["accuracy"])
    head = [
        "β",
        "sharing",
        "seeds",
        *names,
        "mean",
        "S",
        "FLOP ×",
        "exact FLOP ×",
        "Params ×",
        "union",
        "∩",
        "projected",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (beta, sharing), found in sorted(cells.items(), key=lambda item: -item[0][0]):
        line = [f"{beta:g}", sharing, str(len(found))]
        line += [_shown([one["accuracy"][name] for one in found], 1) for name in names]
        line.append(_shown([one["mean_accuracy"] for one in found], 1))
        line.append(_shown([one["scores"]["S"] for one in found if "scores" in one], 0))
        line += [_shown([one["cost"][key] for one in found], 3) for key in ("flop", "exact_flop", "params")]
        line += [_shown([one[key] for one in found], 3) for key in ("union", "intersection")]
        line.append(_shown([sum(one["projected_off"].values()) for one in found], 0))
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)
