"""A whole run: train, project, test, count, score, and write everything down."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

import bap_kernels as bk
from bap.budget import share
from bap.checkpoint import save_checkpoint
from bap.config import Config
from bap.counting import count
from bap.data import Domain
from bap.evaluate import evaluate
from bap.files import FileError, read_json, write_bytes, write_json
from bap.metrics import DECATHLON_BASELINE, SKETCH_BASELINE, domain_scores, scores
from bap.network import load_domains
from bap.sharing import intersection, union
from bap.timing import measure_layers
from bap.train import Trainer, backend_of

__all__ = ["baseline_of", "results_of", "scored", "train_run"]


def baseline_of(config: Config, path: str | Path | None = None) -> dict[str, float]:
    """Accuracies in per cent that scores are relative to: of a file, or published ones; none for the embedded suite.

    Raises:
        FileError: if the file does not hold {domain: accuracy}.
    """
    if path is None:
        return {"embedded": {}, "decathlon": DECATHLON_BASELINE, "sketch": SKETCH_BASELINE}[config.data]
    read = read_json(path)
    if not isinstance(read, dict) or not all(isinstance(one, (int, float)) for one in read.values()):
        raise FileError(f"baseline_of(): expected {path} to hold {{domain: accuracy in per cent}}, got something else.")
    return {name: float(value) for name, value in read.items()}


def scored(results: Mapping[str, Any], baseline: Mapping[str, float]) -> dict[str, Any]:
    """{"scores": S, S_O, S_P, their product and each domain's summand}; nothing where a domain has no baseline.

    Args:
        results: with ``accuracy`` in per cent by domain and the relative ``flop`` and ``params`` of ``cost``.
        baseline: {domain: accuracy in per cent}.
    """
    accuracy, cost = results["accuracy"], results["cost"]
    if not set(accuracy) <= set(baseline):
        return {}
    whole = scores(accuracy, baseline, cost["flop"], cost["params"])
    return {
        "scores": {
            "S": whole.s,
            "S_O": whole.s_o,
            "S_P": whole.s_p,
            "combined": whole.combined,
            "domains": domain_scores(accuracy, baseline),
        }
    }


def results_of(trainer: Trainer, baseline: Mapping[str, float], split: str = "test") -> dict[str, Any]:
    """Accuracies, budgets, sharing, costs and scores of a trained network.

    Args:
        trainer: after its last epoch.
        baseline: {domain: accuracy in per cent}; scores are left out where a domain has none.
        split: of the accuracy.
    """
    processes = trainer.processes
    accuracy = {}
    with bk.use_backend(backend_of(trainer.config)):
        for name, domain in trainer.domains.items():
            used = split if split in domain.splits and domain.splits[split].labels is not None else "val"
            found = evaluate(trainer.model, domain, used, rank=processes.rank, world=processes.world)
            accuracy[name] = found.percent
    example = torch.zeros(1, 3, trainer.size, trainer.size, device=processes.device)
    cost = count(trainer.model, example)
    masks = trainer.bank.masks().cpu().double()
    total = float(trainer.costs.sum())
    made: dict[str, Any] = {
        "accuracy": accuracy,
        "mean_accuracy": sum(accuracy.values()) / len(accuracy),
        "beta": trainer.beta,
        "measure": trainer.config.measure,
        "sharing": trainer.config.sharing,
        "kept": {name: float(share(trainer.bank.mask(name).cpu(), trainer.costs)) for name in trainer.domains},
        "projected_off": trainer.taken,
        "intersection": float(intersection(masks, trainer.costs)) / total,
        "union": float(union(masks, trainer.costs)) / total,
        "cost": cost.as_dict(),
    }
    return made | scored(made, baseline)


def _layer_times(
    config: Config, suite: Mapping[str, Domain], path: Path | None, resume: bool
) -> tuple[dict[str, float], float]:
    """Milliseconds of the layers, the same on all processes and after a resumption: others would be another budget."""
    probe = Trainer(Config(**{**config.as_dict(), "measure": "mac", "budget_ms": None}), suite)
    known = None if path is None else path / "layer_times.json"
    held: list[Any] = [None]
    if probe.processes.first:
        if known is not None and resume and known.exists():
            held = [read_json(known)]
        else:
            example = torch.zeros(1, 3, probe.size, probe.size, device=probe.processes.device)
            times = measure_layers(probe.model, example)
            held = [{"per_channel": times.per_channel, "fixed": times.fixed}]
            if known is not None:
                write_json(known, held[0])
    if probe.processes.world > 1:
        torch.distributed.broadcast_object_list(held)
    return held[0]["per_channel"], held[0]["fixed"]


def train_run(
    config: Config,
    folder: str | Path | None,
    resume: bool = False,
    baseline: Mapping[str, float] | None = None,
    domains: Mapping[str, Domain] | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Trains a network and writes config.yaml, metrics.jsonl, curves, results.json and the checkpoint into a folder.

    Args:
        config: the settings.
        folder: for everything; None writes nothing.
        resume: go on from the state in the folder.
        baseline: for the scores, see :func:`results_of`.
        domains: the data; None loads what the settings name.
        progress: prints a line per epoch; None: on a terminal.

    Returns:
        The results, as in results.json.

    Raises:
        ValueError: for settings or data that cannot be used, and for a folder with another run if ``resume`` is off.
        FileError: if files cannot be written, or are damaged.
    """
    suite = dict(domains) if domains is not None else load_domains(config)
    path = None if folder is None else Path(folder)
    if path is not None and not resume and (path / "metrics.jsonl").exists():
        raise ValueError(f"train_run(): expected {path} to have no run, got one. Hint: --resume goes on with it.")
    milliseconds, fixed = None, 0.0
    if config.measure == "time":
        milliseconds, fixed = _layer_times(config, suite, path, resume)
    trainer = Trainer(config, suite, path, resume, progress, milliseconds, fixed)
    first = trainer.processes.first
    if path is not None and first:
        write_bytes(path / "config.yaml", yaml.safe_dump(config.as_dict(), sort_keys=False).encode())
    started = time.perf_counter()
    trainer.fit()
    results = results_of(trainer, baseline if baseline is not None else baseline_of(config))
    results["seconds"] = time.perf_counter() - started
    if path is not None and first:
        facts = {
            name: {
                "classes": list(domain.classes),
                "size": domain.size,
                "mean": list(domain.mean),
                "std": list(domain.std),
                "kept": results["kept"][name],
                "accuracy": results["accuracy"][name],
            }
            for name, domain in suite.items()
        }
        save_checkpoint(path / "checkpoint", trainer.model, config, facts)
        write_json(path / "results.json", results)
    trainer.processes.wait()
    return results
