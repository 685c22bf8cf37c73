"""The network of one replica: all domains, planned once, for batches that mix them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

import bap_kernels as bk
from bap.data.transform import normalised
from bap.prune.deploy import deploy
from bap.serve.requests import domain_inputs
from bap.serve.settings import ServeSettings
from bap.train.checkpoint import load_checkpoint
from bap.train.trainer import backend_of

__all__ = ["Answer", "Query", "ServedNetwork", "answer_each"]

TOP = 5
# (domain, pixels (size, size, 3), uint8)
Query: TypeAlias = tuple[str, np.ndarray]
# [(number of the class, its probability)], most probable first; or what went wrong.
Answer: TypeAlias = list[tuple[int, float]] | str


class ServedNetwork:
    """A checkpoint's network, which is loaded, pruned and planned once.

    Every domain's plan is made, and called, before the first request. Nothing is measured while requests wait, unless
    the backend is ``auto``.

    Args:
        settings: of the service.

    Raises:
        FileError: if the checkpoint cannot be loaded.
        PruneError: if pruning changes an output by more than rounding.
    """

    def __init__(self, settings: ServeSettings) -> None:
        model, config, specs = load_checkpoint(settings.checkpoint, settings.domains)
        self.inputs = domain_inputs(config, specs)
        self.numbers = {name: number for number, name in enumerate(self.inputs)}
        self._threads = settings.cpus
        self._backend = backend_of(config.replace(backend=settings.backend, device="cpu"))
        size = next(iter(self.inputs.values())).size
        self._use_settings()
        self._planned = deploy(model, torch.zeros(1, 3, size, size)).planned
        blank = np.zeros((size, size, 3), np.uint8)
        for count in {1, settings.max_batch}:
            for name in self.inputs:
                self.answer([(name, blank)] * count)

    def _use_settings(self) -> None:
        """Both belong to the calling thread."""
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        bk.use_backend(self._backend)

    def logits(self, queries: Sequence[Query]) -> Tensor:
        """(N, most classes of a domain), float32; -inf beyond the classes of a sample's domain."""
        self._use_settings()
        inputs = [self.inputs[name] for name, _ in queries]
        x = torch.stack([normalised(pixels, d.mean, d.std) for (_, pixels), d in zip(queries, inputs, strict=True)])
        with torch.inference_mode():
            bk.set_domain(self._planned, torch.tensor([self.numbers[name] for name, _ in queries]))
            result: Tensor = self._planned(x)
        return result.float()

    def answer(self, queries: Sequence[Query]) -> list[Answer]:
        """The most probable classes of each image."""
        answers: list[Answer] = []
        for (name, _), row in zip(queries, self.logits(queries), strict=True):
            classes = len(self.inputs[name].classes)
            top = row[:classes].softmax(0).topk(min(TOP, classes))
            answers.append(list(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
        return answers


def answer_each(network: ServedNetwork, queries: Sequence[Query]) -> list[Answer]:
    """The answers to a batch; if it fails, each query is tried alone, so that one does not spoil the others."""
    try:
        return network.answer(queries)
    except Exception as error:
        if len(queries) == 1:
            return [f"{type(error).__name__}: {error}"]
    return [answer for query in queries for answer in answer_each(network, [query])]
