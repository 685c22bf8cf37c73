"""Trains the plain backbone on the source domain."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bap.config import Config
from bap.data import Domain
from bap.files import FileError, read_tensors, remove_leftovers, write_tensors
from bap.train.evaluate import Accuracy, accuracy_of
from bap.train.finite import CHECKED_EVERY, TrainError
from bap.train.network import plain_network
from bap.train.processes import Processes
from bap.train.resume import check_same_data, check_same_settings, data_fingerprint, weights_digest
from bap.train.run_log import Pace
from bap.train.schedule import learning_rate
from bap.train.state import load_state, save_state

__all__ = ["PRETRAINING", "check_backbone", "pretrain", "state_of"]

# Settings that the backbone's weights depend on.
PRETRAINING = (
    "data.suite",
    "data.images",
    "data.size",
    "data.crops",
    "data.full",
    "data.train_on",
    "model.name",
    "model.options",
    "schedule.batch",
    "run.seed",
    "pretrain.epochs",
    "pretrain.lr",
)
# Mixed precision changes them, too, but a study may compare it with the same backbone.
_COMPARED = (*PRETRAINING, "run.amp")


def state_of(path: str | Path) -> Path:
    """The file beside a backbone's in which a run that was stopped left its state."""
    return Path(path).with_suffix(".state.safetensors")


def check_backbone(path: str | Path, config: Config, source: str) -> dict[str, Any]:
    """Refuses the file of a backbone that was trained with other settings, or on another source.

    Returns:
        What the file says of the backbone: ``source``, ``config``, and the ``records`` of its epochs.

    Raises:
        ValueError: for other settings or another source.
        FileError: if the file is damaged, or of something else.
    """
    _, info = read_tensors(path)
    if not isinstance(info, dict) or not isinstance(info.get("config"), dict):
        raise FileError(f"pretrained(): expected {path} to be a backbone of bap pretrain, got another file.")
    if info.get("source") != source:
        raise ValueError(
            f"pretrained(): expected {path} to be trained on {source!r}, got {info.get('source')!r}. "
            "Hint: use another folder."
        )
    check_same_settings(info["config"], config, str(path), only=_COMPARED)
    return info


class _Pretraining:
    """A network with its optimiser, and the epochs that are done."""

    def __init__(self, config: Config, domain: Domain) -> None:
        self.config, self.domain = config, domain
        self.processes = Processes(config.run.device)
        self.model = plain_network(config, len(domain.classes)).to(self.processes.device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), config.pretrain.lr, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        self.scaler = torch.amp.GradScaler(self.processes.device.type, enabled=config.run.amp == "fp16")
        self.records: list[dict[str, Any]] = []
        split = config.data.evaluate_on
        images = domain.splits.get(split)
        labelled = images is not None and len(images) > 0 and images.labels is not None
        self.evaluated_on = split if labelled and split != "train" else None
        self._pace = Pace(config.run.log_every, config.run.log_seconds)

    def save(self, path: Path) -> None:
        progress = {
            "records": self.records,
            "scaler": self.scaler.state_dict(),
            "config": self.config.as_dict(),
            "data": data_fingerprint({self.domain.name: self.domain}),
            "weights": weights_digest(self.config),
        }
        save_state(path, self.model, {"sgd": self.optimizer}, progress)

    def load(self, path: Path) -> None:
        try:
            progress = load_state(path, self.model, {"sgd": self.optimizer}, self._check_same)
            self.records = list(progress["records"])
            self.scaler.load_state_dict(progress["scaler"])
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise FileError(f"pretrain(): expected {path} to be a state of bap pretrain, got {error!r}.") from None

    def _check_same(self, progress: Mapping[str, Any], path: Path) -> None:
        digests = {"model.weights": progress["weights"]}
        check_same_settings(progress["config"], self.config, str(path), 0, digests, (*_COMPARED, "model.weights"))
        check_same_data(progress["data"], {self.domain.name: self.domain}, path)

    def train_epoch(self, run: nn.Module, progress: bool) -> None:
        """Adds the record of an epoch."""
        config, processes, epoch = self.config, self.processes, len(self.records)
        epochs, name, device = config.pretrain.epochs, self.domain.name, processes.device
        started = time.perf_counter()
        # Users of the global generator, such as dropout, draw the same numbers after a resumption.
        torch.manual_seed(config.run.seed * 1_000_003 + epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = config.pretrain.lr * learning_rate("cosine", epoch, epochs)
        run.train()
        seen = Accuracy()
        checked_every = 1 if device.type == "cpu" else CHECKED_EVERY
        key = (config.run.seed, epoch, "pretrain")
        batches = self.domain.batches("train", config.schedule.batch, key, processes.rank, processes.world)
        for step, (images, labels) in enumerate(batches, 1):
            x, y = images.to(device), labels.to(device)
            self.optimizer.zero_grad(set_to_none=True)
            with processes.autocast(config.run.amp):
                logits = run(x)
            loss = F.cross_entropy(logits.float(), y)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            seen.add(logits.detach(), y, loss)
            if step % checked_every == 0:
                self._check_finite(seen)
            if progress and self._pace.due(step):
                _say(f"{name} epoch {epoch + 1}/{epochs}  step {step}  mean loss {seen.mean_loss:.3f}")
        self._check_finite(seen)
        total = seen.reduced()
        record: dict[str, Any] = {"epoch": epoch + 1, "loss": total.mean_loss, "accuracy": total.percent}
        text = f"loss {record['loss']:.3f}"
        if self.evaluated_on is not None:
            counts = accuracy_of(self.model, self.domain, self.evaluated_on, 128, None, processes.rank, processes.world)
            record |= {"evaluated": counts.percent, "split": self.evaluated_on}
            text += f"  {self.evaluated_on} {counts.percent:.1f} %"
        record["seconds"] = time.perf_counter() - started
        self.records.append(record)
        if progress:
            _say(f"{name} epoch {epoch + 1}/{epochs}  {text}  {record['seconds']:.1f} s")

    def _check_finite(self, seen: Accuracy) -> None:
        if not math.isfinite(seen.loss):
            raise TrainError(
                f"pretrain(): expected losses to stay finite, got another one in epoch {len(self.records) + 1}. "
                f"Hint: lower pretrain_lr, {self.config.pretrain.lr}."
            )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def pretrain(
    config: Config, domain: Domain, path: str | Path | None = None, progress: bool = False, resume: bool = False
) -> nn.Module:
    """A plain backbone, trained on one domain by SGD with a cosine schedule; under torchrun by several processes.

    After every epoch its state is written beside the file, and the accuracy on ``data.evaluate_on`` is measured where
    the domain has labels of it. A run that goes on from the state gives the weights of one that was not stopped.

    Args:
        config: ``pretrain_epochs``, ``pretrain_lr``, ``batch``, ``amp``, ``seed`` and the model's settings are used.
        domain: the source.
        path: file for its weights, ``.safetensors``; its info has the records of all epochs.
        progress: prints a line per epoch, and one in every ``log_every`` steps, to the error stream.
        resume: go on from the state beside the file, if there is one.

    Raises:
        ValueError: if the domain has no images with labels, or the state is of other settings or data.
        FileError: if a file cannot be written, or the state is damaged.
        TrainError: if a loss is not finite.
    """
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    images = domain.splits.get("train")
    if images is None or not len(images) or images.labels is None:
        raise ValueError(f"pretrain(): expected {domain.name!r} to have images with labels in 'train', got none.")
    training = _Pretraining(config, domain)
    processes = training.processes
    state = None if path is None else state_of(path)
    if state is not None and resume and state.exists():
        training.load(state)
    run = processes.parallel(training.model)
    while len(training.records) < config.pretrain.epochs:
        training.train_epoch(run, progress and processes.first)
        if state is not None and processes.first:
            training.save(state)
    training.model.eval()
    if path is not None and state is not None and processes.first:
        info = {"source": domain.name, "config": config.as_dict(), "records": training.records}
        write_tensors(path, training.model.state_dict(), info)
        # Only now: what is on the disk is the whole run, or its last state.
        state.unlink(missing_ok=True)
        remove_leftovers(state.parent, state.name)
    processes.wait()
    return training.model
