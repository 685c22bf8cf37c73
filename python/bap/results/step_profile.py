"""What a training step consists of: its operators, what it reads back, and where its time goes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["StepProfile", "profile_step"]

# Operators that make tensors and compute nothing.
_ALLOCATING = frozenset({"aten::empty", "aten::empty_strided", "aten::resize_", "aten::set_"})
# The operator that reads a value, and its caller.
_READING, _ITEM = "aten::_local_scalar_dense", "aten::item"


@dataclass(frozen=True)
class StepProfile:
    """Counts and times of one step.

    Args:
        operators: that compute or copy, as PyTorch's profiler sees them: one kernel each on most devices. Views and
            allocations are left out.
        kernels: that ran on a GPU; None on CPUs.
        reads: values that the host reads from tensors, each of which waits for a GPU; those of optimisers are left
            out, which keep their counts on the CPU.
        shares: {operator: its share of the host's time}, the largest first.
    """

    operators: int
    kernels: int | None
    reads: int
    shares: dict[str, float]


@cache
def _is_view(name: str) -> bool:
    """Whether an operator returns a view of its argument and writes nothing."""
    infos = [out.alias_info for schema in torch._C._jit_get_schemas_for_operator(name) for out in schema.returns]
    return bool(infos) and all(info is not None and not info.is_write for info in infos)


def _computes(event: Any) -> bool:
    name = event.name
    return "::" in name and name not in _ALLOCATING and name not in (_READING, _ITEM) and not _is_view(name)


def _below(event: Any) -> Iterator[Any]:
    for child in event.cpu_children:
        yield child
        yield from _below(child)


def _in_optimizer(event: Any) -> bool:
    while event is not None:
        if event.name.startswith("Optimizer.step"):
            return True
        event = event.cpu_parent
    return False


def profile_step(step: Callable[[], object], device: torch.device, most: int = 6) -> StepProfile:
    """Runs a step under PyTorch's profiler.

    Args:
        step: runs one step; it was run before, so that nothing is measured, packed or chosen in it.
        device: where it runs.
        most: operators that are named with their share.

    Examples:
        >>> import torch
        >>> from bap.results.step_profile import profile_step
        >>> x = torch.ones(8, 8)
        >>> made = profile_step(lambda: (x @ x).t().sum().item(), torch.device("cpu"))
        >>> made.operators, made.reads
        (2, 1)
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as profiler:
        step()
        if on_gpu:
            torch.cuda.synchronize(device)
    events = profiler.events()
    assert events is not None
    host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    # An operator that calls others which compute stands for these.
    operators = [event for event in host if _computes(event) and not any(map(_computes, _below(event)))]
    reads = [event for event in host if event.name == _READING and not _in_optimizer(event)]
    times: Counter[str] = Counter()
    for event in host:
        times[event.name] += event.self_cpu_time_total
    total = sum(times.values()) or 1.0
    return StepProfile(
        len(operators),
        len(events) - len(host) if on_gpu else None,
        len(reads),
        {name: round(spent / total, 4) for name, spent in times.most_common(most)},
    )
