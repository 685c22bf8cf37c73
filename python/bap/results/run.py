"""A run: train, project, test, count, score, and write the results."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

import bap_kernels as bk
from bap.config import Config, load_config
from bap.data import Domain
from bap.files import FileError, read_json, write_bytes, write_json
from bap.prune.counting import count
from bap.results.callbacks import Callback
from bap.results.scores import PUBLISHED_BASELINES, named_scores
from bap.train.budget import share
from bap.train.checkpoint import domain_spec, save_checkpoint
from bap.train.distill import DENSE, dense_settings, learns_from_dense
from bap.train.domains import check_source, load_domains, source_of, suite_of
from bap.train.evaluate import check_splits, evaluate, final_split
from bap.train.layer_times import LayerTimes, measure_layers
from bap.train.processes import Processes
from bap.train.resume import check_same_settings
from bap.train.sharing import intersection, union
from bap.train.trainer import STATE, Trainer, backend_of

__all__ = ["baseline_of", "is_finished", "read_accuracies", "results_of", "scored", "train_run"]


# Files that a study or a run makes itself; what is in them follows from other settings.
_FILES = ("model.weights", "switches.fixed", "distill.teacher")


def read_accuracies(path: str | Path) -> dict[str, float]:
    """{domain: accuracy in per cent} of a JSON file.

    Raises:
        FileError: if the file holds something else.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not content or {type(value) for value in content.values()} - {int, float}:
        raise FileError(f"baseline_of(): expected {path} to hold {{domain: accuracy in per cent}}, got something else.")
    return {name: float(value) for name, value in content.items()}


def baseline_of(config: Config, path: str | Path | None = None) -> dict[str, float]:
    """Accuracies in per cent that scores are relative to: of a file, or published ones; none for the built-in suite.

    Raises:
        FileError: if the file does not hold {domain: accuracy}.
    """
    return PUBLISHED_BASELINES.get(config.data.suite, {}) if path is None else read_accuracies(path)


def scored(results: Mapping[str, Any], baseline: Mapping[str, float]) -> dict[str, Any]:
    """{"scores": S, S_O, S_P, their product and each domain's summand}; nothing where a domain has no baseline.

    Args:
        results: with ``accuracy`` in per cent by domain, the relative ``flop`` and ``params`` of ``cost``, and
            ``protocol``, which says of which suite and split they are.
        baseline: {domain: accuracy in per cent}.
    """
    accuracy, cost = results["accuracy"], results["cost"]
    if not set(accuracy) <= set(baseline):
        return {}
    protocol = results.get("protocol") or {}
    scores = named_scores(
        accuracy, baseline, cost["flop"], cost["params"], protocol.get("data"), protocol.get("evaluated_on", "test")
    )
    return {"scores": scores}


def results_of(trainer: Trainer, baseline: Mapping[str, float], split: str | None = None) -> dict[str, Any]:
    """Accuracies, budgets, sharing, costs and scores of a trained network.

    Args:
        trainer: after its last epoch.
        baseline: {domain: accuracy in per cent}; scores are left out where a domain has none.
        split: of the accuracy, for all domains; None: see :func:`final_split`.
    """
    processes, config = trainer.processes, trainer.config
    split = final_split(trainer.domains, config.data.evaluate_on) if split is None else split
    accuracy = {}
    with bk.use_backend(backend_of(config)):
        for name, domain in trainer.domains.items():
            counted = evaluate(trainer.model, domain, split, rank=processes.rank, world=processes.world)
            accuracy[name] = counted.percent
    example = torch.zeros(1, 3, trainer.size, trainer.size, device=processes.device)
    cost = count(trainer.model, example)
    masks = trainer.bank.masks().cpu().double()
    total = float(trainer.costs.sum())
    suite = suite_of(config)
    results: dict[str, Any] = {
        "split": split,
        "domains": list(accuracy),
        "protocol": {
            "data": config.data.suite,
            "domains": len(accuracy),
            "of": len(suite),
            "missing": [name for name in suite if name not in accuracy],
            "whole": config.data.built_in or config.data.full,
            "source": source_of(config, accuracy),
            "source_mode": config.data.source_mode,
            "trained_on": config.data.train_on,
            "evaluated_on": split,
            "images": {name: len(domain.splits[split]) for name, domain in trainer.domains.items()},
        },
        "accuracy": accuracy,
        "mean_accuracy": sum(accuracy.values()) / len(accuracy),
        "beta": trainer.beta,
        "measure": trainer.config.budget.measure,
        "sharing": trainer.config.sharing.loss,
        "kept": {name: float(share(trainer.bank.mask(name).cpu(), trainer.costs)) for name in trainer.domains},
        "projected_off": trainer.projected_off,
        "given_back": trainer.given_back,
        "intersection": float(intersection(masks, trainer.costs)) / total,
        "union": float(union(masks, trainer.costs)) / total,
        "cost": cost.as_dict(),
    }
    return results | scored(results, baseline)


def _read_times(path: Path, layers: Sequence[str]) -> LayerTimes:
    content = read_json(path)
    try:
        times = LayerTimes({name: float(content["per_channel"][name]) for name in layers}, float(content["fixed"]))
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"train_run(): expected {path} to hold times of the layers, got {error!r}.") from None
    positive = all(math.isfinite(value) and value > 0 for value in times.per_channel.values())
    if not positive or not 0 <= times.fixed < math.inf:
        raise FileError(f"train_run(): expected {path} to hold positive times, got others.")
    return times


def _layer_times(config: Config, suite: Mapping[str, Domain], path: Path | None, resume: bool) -> LayerTimes:
    """Milliseconds of the layers, the same on all processes and after a resumption, as they define the budget."""
    probe = Trainer(config.replace(measure="mac", budget_ms=None), suite).open()
    file = None if path is None else path / "layer_times.json"
    times: list[Any] = [None]
    if probe.processes.first:
        if file is not None and resume and file.exists():
            times = [_read_times(file, probe.bank.names)]
        else:
            example = torch.zeros(1, 3, probe.size, probe.size, device=probe.processes.device)
            times = [measure_layers(probe.model, example)]
            if file is not None:
                write_json(file, asdict(times[0]))
    if probe.processes.world > 1:
        torch.distributed.broadcast_object_list(times)
    return times[0]


def _is_run(path: Path) -> bool:
    return any((path / name).exists() for name in ("metrics.jsonl", STATE, "results.json", "checkpoint"))


def is_finished(path: Path, config: Config) -> bool:
    """Whether a run is finished; one with other settings is refused."""
    if not (path / "results.json").exists():
        return False
    # The weights are compared by their own settings.
    compared = [name for name in config.by_name() if name not in _FILES]
    check_same_settings(load_config(path / "config.yaml").as_dict(), config, str(path), only=compared)
    return True


def _check_folder(config: Config, path: Path, resume: bool) -> None:
    """Refuses to start in the folder of another run, or to go on with other settings."""
    if not resume and _is_run(path):
        raise ValueError(f"train_run(): expected {path} to have no run, got one. Hint: --resume goes on with it.")
    known = path / "config.yaml"
    # If there is a state, the trainer compares with the settings in it.
    if resume and known.exists() and not (path / STATE).exists():
        check_same_settings(load_config(known).as_dict(), config, str(known))


def train_run(
    config: Config,
    folder: str | Path | None,
    resume: bool = False,
    baseline: Mapping[str, float] | None = None,
    domains: Mapping[str, Domain] | None = None,
    progress: bool | None = None,
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any]:
    """Trains a network and writes config.yaml, metrics.jsonl, curves, results.json and the checkpoint into a folder.

    The folder is locked meanwhile, see :func:`bap.train.lock.folder_lock`. A group of processes that is joined here is
    left when the process ends, whatever happens: to join one anew, while the same torchrun goes on, would wait for
    ever.

    Args:
        config: the settings. The teacher ``dense`` is the dense network of these settings, which is trained first, in
            the subfolder ``dense``, if it is not there.
        folder: for everything; None writes nothing.
        resume: go on from the state in the folder, if there is one; its settings must be these, but for
            :data:`bap.train.resume.MAY_CHANGE`.
        baseline: for the scores, see :func:`results_of`.
        domains: the data; None loads what the settings name.
        progress: prints a line per epoch; None: on a terminal.
        callbacks: told of the start, of every epoch and of the end.

    Returns:
        The results, as in results.json.

    Raises:
        ValueError: for settings or data that cannot be used, for a folder with another run if ``resume`` is off, and
            for other settings than those of the run if it is on.
        FileError: if files cannot be written, or are damaged, or another run writes into the folder.
        TrainError: if a loss or a parameter is not finite.
    """
    path = None if folder is None else Path(folder)
    dense: Config | None = None
    if learns_from_dense(config):
        if path is None:
            raise ValueError("train_run(): expected a folder, where the teacher 'dense' is trained, got None.")
        dense = dense_settings(config)
        config = config.replace(teacher=str(path / DENSE / "checkpoint"))
    elif config.distill.teacher == DENSE:
        # With a weight of 0 nobody teaches.
        config = config.replace(teacher=None)
    with Processes(config.run.device).lock(path):
        if path is not None:
            _check_folder(config, path, resume)
        if domains is None:
            check_source(config, config.data.domains or suite_of(config))
        suite = dict(domains) if domains is not None else load_domains(config)
        if domains is None:
            # An extract has what its folder has.
            check_source(config, suite)
        check_splits(suite, config.data.evaluate_on)
        final_split(suite, config.data.evaluate_on)
        if dense is not None and path is not None and not is_finished(path / DENSE, dense):
            train_run(dense, path / DENSE, True, baseline, suite, progress)
        times = _layer_times(config, suite, path, resume) if config.budget.measure == "time" else None
        trainer = Trainer(config, suite, path, resume, progress, times).open()
        first = trainer.processes.first
        if path is not None and first:
            write_bytes(path / "config.yaml", yaml.safe_dump(config.as_dict(), sort_keys=False).encode())
        started = time.perf_counter()
        told = callbacks if first else ()
        for callback in told:
            callback.started(config, path)

        def tell(record: dict[str, Any]) -> None:
            for callback in told:
                callback.epoch_ended(record)

        trainer.fit(after_epoch=tell)
        results = results_of(trainer, baseline if baseline is not None else baseline_of(config))
        results["seconds"] = time.perf_counter() - started
        # Of all epochs, also those before a resumption; without evaluation.
        results["training_seconds"] = sum(record["seconds"] for record in trainer.log.records)
        if path is not None and first:
            specs = {
                name: domain_spec(domain, results["kept"][name], results["accuracy"][name], results["split"])
                for name, domain in suite.items()
            }
            save_checkpoint(path / "checkpoint", trainer.model, config, specs)
            write_json(path / "results.json", results)
        for callback in told:
            callback.ended(results)
        trainer.processes.wait()
        return results
