"""Large batches on CPUs: the leading steps of a plan take them in chunks whose tensors stay in the cache.

A batch that is walked step by step leaves the cache between any two steps, and results beyond what the allocator keeps
are mapped anew in each of them. Every sample's result is computed as in a batch of the chunk's size.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bap_kernels.flow.arguments import tensors_of
from bap_kernels.flow.ops import Call
from bap_kernels.plan.conv_steps import ConvStep, DepthwiseStep, GroupedStep
from bap_kernels.plan.joined import join
from bap_kernels.plan.steps import (
    BinaryStep,
    BufferStep,
    CatStep,
    Env,
    FetchStep,
    InputStep,
    MapStep,
    NormStep,
    Step,
    ViewStep,
)

__all__ = ["Chunks", "held_bytes", "samples_in_chunk"]

_BY_SAMPLE = (
    *(InputStep, ConvStep, DepthwiseStep, GroupedStep, NormStep),
    *(CatStep, BufferStep, ViewStep, FetchStep, MapStep, BinaryStep),
)
# Of the last cache: weights need some of it, too.
_CACHE_SHARE = 5 / 8
# Tensors that leave the cache a little cost less than small batches do.
_WORTHWHILE = 2
_USUAL_CACHE = 32 << 20
# Fewer samples than that leave threads idle where images are small.
_SAMPLES_PER_THREAD = 2


def _cache_bytes() -> int:
    try:
        return os.sysconf("SC_LEVEL3_CACHE_SIZE") or _USUAL_CACHE
    except (ValueError, OSError):
        return _USUAL_CACHE


CACHE_BYTES = _cache_bytes()


def samples_in_chunk(samples: int, bytes_per_sample: float, threads: int) -> int:
    """How many samples the leading steps should take at a time; all of them where chunks would not pay.

    Args:
        samples: of the batch.
        bytes_per_sample: most bytes that these steps hold at once, for each sample.
        threads: of PyTorch.

    Examples:
        >>> samples_in_chunk(4, 2.0**20, 2), samples_in_chunk(64, 6 * 2.0**20, 1) <= 32
        (4, True)
    """
    room = _CACHE_SHARE * CACHE_BYTES
    if samples * bytes_per_sample <= _WORTHWHILE * room:
        return samples
    most = max(int(room / bytes_per_sample), _SAMPLES_PER_THREAD * threads)
    # Chunks of one size: each size has backends of its own.
    for size in range(min(most, samples), most // 2, -1):
        if samples % size == 0:
            return size
    return -(-samples // -(-samples // most))


def held_bytes(env: Env, but: Tensor | None = None) -> int:
    """Bytes of the tensors in a list of slots, those of views once, and without what ``but`` is a view of."""
    storages = [tensor.untyped_storage() for tensor in tensors_of(env)]
    held = {storage._cdata: storage.nbytes() for storage in storages}
    if but is not None:
        held.pop(but.untyped_storage()._cdata, None)
    return sum(held.values())


def _is_by_sample(step: Step) -> bool:
    """Whether sample i of what a step writes depends on sample i of what it reads alone."""
    if type(step) not in _BY_SAMPLE:
        return False
    call = getattr(step, "call", None)
    # A constant may have an entry for each sample.
    return not (isinstance(call, Call) and tensors_of((call.args, call.kwargs)))


class Chunks:
    """The leading steps that compute each sample by itself.

    Attributes:
        end: how many steps they are; 0: the batch is never cut.

    Args:
        steps: of the plan, in order.
        freed: the slots that are emptied after each of them.
        inputs: the slots of the plan's inputs.
        slots: how many slots the plan has.
    """

    def __init__(
        self, steps: Sequence[Step], freed: Sequence[tuple[int, ...]], inputs: Sequence[int], slots: int
    ) -> None:
        self.end = next((number for number, step in enumerate(steps) if not _is_by_sample(step)), len(steps))
        self._order = list(zip(steps[: self.end], freed, strict=False))
        self._joined = join(self._order, slots)
        written = {slot for step, _ in self._order for slot in step.writes}
        read = {slot for step, _ in self._order for slot in step.reads}
        emptied = {slot for _, slots in self._order for slot in slots}
        # Those that later steps or the caller read.
        self._live = sorted(written - emptied)
        starts = [slot for slot in inputs if slot in read]
        self._input = starts[0] if len(starts) == 1 else -1
        if self._input < 0 or self._input in self._live:
            self.end = 0
        # Of the input's bytes, so many are held at once at most; known after the first run.
        self._bytes_per_byte = 0.0

    def size(self, env: Env) -> int:
        """The samples to take at a time, of a batch whose input is in its slot; 0: the steps take the whole batch."""
        x = env[self._input] if self.end else None
        if not isinstance(x, Tensor) or x.dim() != 4 or x.device.type != "cpu" or self._bytes_per_byte == 0:
            return 0
        samples = x.shape[0]
        if samples < 2:
            return 0
        held = self._bytes_per_byte * x.nbytes / samples
        size = samples_in_chunk(samples, held, torch.get_num_threads())
        return size if size < samples else 0

    def count(self, env: Env) -> None:
        """Runs the steps on the whole batch, and counts what they hold beside it."""
        x = env[self._input]
        most = 0
        for step, freed in self._order:
            step(env)
            most = max(most, held_bytes(env, x if isinstance(x, Tensor) else None))
            for slot in freed:
                env[slot] = None
        if isinstance(x, Tensor) and x.nbytes:
            self._bytes_per_byte = most / x.nbytes

    @property
    def counted(self) -> bool:
        """Whether it is known what the steps hold, or need not be."""
        return self.end == 0 or self._bytes_per_byte > 0

    def run(self, env: Env, size: int) -> bool:
        """Runs the steps chunk by chunk; False: the steps' results cannot be joined, and nothing has changed."""
        x: Tensor = env[self._input]
        samples = x.shape[0]
        whole: dict[int, Tensor] = {}
        for begin in range(0, samples, size):
            part = x[begin : begin + size]
            of_part: list[Any] = list(env)
            of_part[self._input] = part
            for step, freed in self._joined:
                step(of_part)
                for slot in freed:
                    of_part[slot] = None
            results = {slot: of_part[slot] for slot in self._live}
            if not whole:
                if not _can_be_joined(x, len(part), list(results.values())):
                    self.end = 0
                    return False
                whole = {slot: _for_samples(result, samples) for slot, result in results.items()}
            for slot, result in results.items():
                whole[slot][begin : begin + size].copy_(result)
        env[self._input] = None
        for slot, result in whole.items():
            env[slot] = result
        return True


def _can_be_joined(x: Tensor, samples: int, results: Sequence[Any]) -> bool:
    """Whether results have an entry for each sample, and memory of their own, into which later steps may write."""
    tensors = [result for result in results if isinstance(result, Tensor)]
    if len(tensors) < len(results) or any(result.dim() == 0 or result.shape[0] != samples for result in tensors):
        return False
    memory = [tensor.untyped_storage()._cdata for tensor in (x, *tensors)]
    return len(set(memory)) == len(memory)


def _for_samples(like: Tensor, samples: int) -> Tensor:
    last = like.dim() == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.empty((samples, *like.shape[1:]), dtype=like.dtype, device=like.device, memory_format=memory_format)
