"""Hours and memory of a run, extrapolated from measured steps, and what such a step consists of."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

import bap_kernels as bk
from bap.config import Config
from bap.data import DECATHLON, Arrays, Domain
from bap.models import MODELS
from bap.results.step_profile import profile_step
from bap.train.evaluate import Accuracy
from bap.train.optimizers import parameters_by_kind
from bap.train.trainer import Trainer, backend_of

__all__ = ["PUBLISHED_IMAGES", "estimate"]

# Training images of the domains beside ImageNet; those of ImageNet-to-Sketch are of its folders [Q].
PUBLISHED_IMAGES: dict[str, dict[str, tuple[int, int]]] = {
    "decathlon": {name: (spec[0][0], spec[0][1]) for name, spec in DECATHLON.items() if name != "imagenet12"},
    "sketch": {
        "cubs_cropped": (200, 5994),
        "stanford_cars_cropped": (196, 8144),
        "flowers": (102, 2040),
        "wikiart": (195, 42129),
        "sketches": (250, 16000),
    },
}


def estimate(config: Config, steps: int = 3, images: Mapping[str, tuple[int, int]] | None = None) -> dict[str, Any]:
    """Measures steps on random images and extrapolates; image loading is left out.

    Args:
        config: the settings; its data are not read, its weights not loaded.
        steps: measured after two that warm up; the median counts.
        images: {domain: (classes, training images)}; None takes the published numbers of the suite.

    Returns:
        Seconds of a step on one batch, these steps and the hours of the run on one process, and the most memory in use;
        what a teacher takes is left out. ``trained``: numbers that are trained, by kind. ``profile``: a step's
        :class:`bap.results.step_profile.StepProfile`.

    Raises:
        ValueError: if the suite's numbers are not known.
    """
    known = PUBLISHED_IMAGES.get(config.data.suite) if images is None else images
    if not known:
        raise ValueError(f"estimate(): expected `images` for {config.data.suite!r}, got None.")
    size = config.data.size or MODELS[config.model.name].size
    pixels = torch.zeros(config.schedule.batch, 3, size, size, dtype=torch.uint8).random_(0, 256)
    split = Arrays(pixels, torch.zeros(config.schedule.batch, dtype=torch.int64))
    domains = {
        name: Domain(name, tuple(map(str, range(classes))), {"train": split, config.data.evaluate_on: split}, size)
        for name, (classes, _) in known.items()
    }
    measure = "mac" if config.budget.measure == "time" else config.budget.measure
    config = config.replace(weights=None, teacher=None, distill_weight=0.0, fixed=None, measure=measure, budget_ms=None)
    config = config.replace(source=next(iter(known)))
    trainer = Trainer(config, domains, progress=False).open()
    trainer.ddp_model.train()
    device = trainer.processes.device
    times = []
    with bk.use_backend(backend_of(config)):
        for number in range(steps + 2):
            name = list(known)[number % len(known)]
            x, y = next(domains[name].batches("train", config.schedule.batch, (number,)))
            started = time.perf_counter()
            trainer._step(name, x, y, Accuracy())
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number >= 2:
                times.append(time.perf_counter() - started)
        profiled = profile_step(lambda: trainer._step(name, x, y, Accuracy()), device)
    seconds = statistics.median(times)
    batches = [count // config.schedule.batch for _, count in known.values()]
    # A joint step has a batch of every domain.
    joint = config.schedule.round_robin == "joint"
    each = (config.schedule.steps or max(batches)) * len(batches) if joint else sum(batches)
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "model": config.model.name,
        "batch": config.schedule.batch,
        "size": size,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "seconds_per_step": seconds,
        "steps": each * config.schedule.epochs,
        "hours": each * config.schedule.epochs * seconds / 3600,
        "peak_bytes": memory,
        "trained": {
            kind: sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
            for kind, parameters in parameters_by_kind(trainer.model).items()
        },
        "profile": asdict(profiled),
    }
