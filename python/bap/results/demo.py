"""The demo on the built-in suite: minutes on two cores."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import bap_kernels as bk
from bap.config import load_config
from bap.files import write_json
from bap.prune.deploy import deploy, speed_report
from bap.prune.prune import prune_
from bap.results.report import make_report, results_table, speed_table
from bap.results.run import train_run
from bap.results.study import pretrained
from bap.train.checkpoint import load_checkpoint, save_checkpoint
from bap.train.distill import DENSE, dense_settings, learns_from_dense
from bap.train.domains import load_domains
from bap.train.evaluate import evaluate
from bap.train.lock import folder_lock
from bap.train.trainer import backend_of

__all__ = ["BUILTIN_RECIPE", "run_demo"]

# The recipe of the built-in suite, also in configs/builtin.yaml.
BUILTIN_RECIPE: dict[str, Any] = {
    "data": {"suite": "builtin"},
    "model": {"name": "resnet26", "options": {"widths": [16, 32, 64], "blocks": [2, 2, 2]}},
    "switches": {"freeze_at": 0.5},
    "budget": {"multiplier_rate": 0.1},
    "sharing": {"loss": "union", "weight": 0.125, "relaxed": True, "temperature": 1e-2},
    "distill": {"teacher": "dense", "weight": 0.25},
    "optimiser": {"lr_switch": 2e-4, "lr_norm": 1e-2, "lr_head": 5e-2, "train_backbone": True, "lr_backbone": 2e-2},
    "schedule": {"epochs": 8, "batch": 32, "round_robin": "batch", "decay": "cosine"},
    "pretrain": {"epochs": 40, "lr": 0.02},
}


def run_demo(
    out: str | Path, overrides: Iterable[str] = (), say: Callable[[str], None] = print, progress: bool = False
) -> dict[str, Any]:
    """Pre-trains the source, trains jointly dense and then at β = .5, prunes, evaluates, measures, reports.

    Args:
        out: folder for everything.
        overrides: settings, as ``name=value``.
        say: told what happens.
        progress: whether training prints its own lines, to the error stream.

    Returns:
        Time, accuracies before and after pruning, costs, what the narrow network takes, and the path of the report.

    Raises:
        ValueError: for settings that cannot be used, or that are not those of the runs in the folder.
        FileError: if files cannot be written, or another run writes into the folder.
        PruneError: if pruning changed the answers of a domain.
    """
    config, out = load_config(overrides=overrides, base=BUILTIN_RECIPE), Path(out)
    with folder_lock(out):
        started = time.perf_counter()
        domains = load_domains(config)
        say(f"pre-training the source for {config.pretrain.epochs} epochs ...")
        config = config.replace(weights=str(pretrained(config, domains, out, progress)))
        runs = []
        # The dense network is what the other one is compared with, and learns from.
        dense = dense_settings(config)
        if learns_from_dense(config):
            config = config.replace(teacher=str(out / DENSE / "checkpoint"))
        for path, settings in ((out / DENSE, dense), (out / f"beta{config.budget.beta:g}", config)):
            budget = settings.budget.beta
            say(f"training {len(domains)} domains for {settings.schedule.epochs} epochs at budget {budget:g} ...")
            results = train_run(settings, path, resume=True, baseline={}, domains=domains, progress=progress)
            runs.append((path, results))
        model, _, specs = load_checkpoint(path / "checkpoint")
        size = next(iter(domains.values())).size
        images = {name: next(domain.batches("test", 32))[0] for name, domain in domains.items()}
        with bk.use_backend(backend_of(config)):
            pruning = prune_(model, torch.zeros(1, 3, size, size), images)
        save_checkpoint(out / "pruned", model, config, specs, kept=(pruning.rows, pruning.columns))
        pruned, _, _ = load_checkpoint(out / "pruned")
        with bk.use_backend(backend_of(config)):
            accuracy = {name: evaluate(pruned, domain).percent for name, domain in domains.items()}
        example = torch.zeros(8, 3, size, size)
        served = speed_report(model, deploy(model, example, images), example)
        write_json(out / "speed.json", served)
        report = make_report([folder for folder, _ in runs], out / "report", speed_table(served))
        say(results_table([(folder.name, run) for folder, run in runs]))
        say(speed_table(served))
        before, after = pruning.before, pruning.after
        say(
            f"pruned: {before.params:.3f} -> {after.params:.3f} of the backbone's parameters for {len(domains)} "
            f"domains, {after.flop:.3f} of its multiply-adds ({after.exact_flop:.3f} without dead filters); "
            f"largest change of an output {pruning.largest_change:.1e}"
        )
        return {
            "seconds": time.perf_counter() - started,
            "accuracy": results["accuracy"],
            "accuracy_after_pruning": accuracy,
            "params": {"before": before.params, "after": after.params},
            "flop": after.flop,
            "exact_flop": after.exact_flop,
            "bytes": {
                "model": (path / "checkpoint" / "model.safetensors").stat().st_size,
                "pruned": (out / "pruned" / "model.safetensors").stat().st_size,
            },
            "served": served,
            "report": str(report),
        }
