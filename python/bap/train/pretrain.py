"""Trains the plain backbone on the source domain."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from bap.config import Config
from bap.data import Domain
from bap.files import write_tensors
from bap.train.network import plain_network
from bap.train.processes import device_of
from bap.train.run_log import Pace
from bap.train.schedule import learning_rate
from bap.train.trainer import TrainError

__all__ = ["pretrain"]


def pretrain(config: Config, domain: Domain, path: str | Path | None = None, progress: bool = False) -> nn.Module:
    """A plain backbone, trained on one domain by SGD with a cosine schedule.

    Args:
        config: ``pretrain_epochs``, ``pretrain_lr``, ``batch``, ``seed`` and the model's settings are used.
        domain: the source.
        path: file for its weights, ``.safetensors``.
        progress: prints a line per epoch, and one in every ``log_every`` steps, to the error stream.

    Raises:
        FileError: if the file cannot be written.
        TrainError: if a loss is not finite.
    """
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    device = device_of(config.run.device)
    images = domain.splits.get("train")
    if images is None or not len(images) or images.labels is None:
        raise ValueError(f"pretrain(): expected {domain.name!r} to have images with labels in 'train', got none.")
    model = plain_network(config, len(domain.classes)).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), config.pretrain.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    pace = Pace(config.run.log_every, config.run.log_seconds)
    for epoch in range(config.pretrain.epochs):
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = config.pretrain.lr * learning_rate("cosine", epoch, config.pretrain.epochs)
        total, steps = 0.0, 0
        for x, y in domain.batches("train", config.schedule.batch, (config.run.seed, epoch, "pretrain")):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x.to(device)), y.to(device))
            loss.backward()
            optimizer.step()
            total, steps = total + float(loss.detach()), steps + 1
            if not math.isfinite(total):
                raise TrainError(
                    f"pretrain(): expected losses to stay finite, got another one in epoch {epoch + 1}. "
                    f"Hint: lower pretrain_lr, {config.pretrain.lr}."
                )
            if progress and pace.due(steps):
                print(
                    f"{domain.name} epoch {epoch + 1}/{config.pretrain.epochs}  step {steps}  "
                    f"mean loss {total / steps:.3f}",
                    file=sys.stderr,
                    flush=True,
                )
        if progress:
            seconds = time.perf_counter() - started
            print(
                f"{domain.name} epoch {epoch + 1}/{config.pretrain.epochs}  loss {total / steps:.3f}  {seconds:.1f} s",
                file=sys.stderr,
                flush=True,
            )
    model.eval()
    if path is not None:
        write_tensors(path, model.state_dict(), {"source": domain.name, "config": config.as_dict()})
    return model
