"""What a plan copied from its model, and whether the model still holds it."""

from __future__ import annotations

import operator
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from bap_kernels._load import _C
from bap_kernels._packed import count_steps
from bap_kernels._values import holds_values
from bap_kernels.plan.effective_conv import is_plain

__all__ = ["Watch"]

# Larger tensors of other modules than convolutions are not copied; the modules are called, or the tensor is.
_MOST_COPIED = 2**16
# What else than tensors a plan takes over: batch norms' numbers, the lists of gathered layers, switches' thresholds.
_ATTRIBUTES = ("eps", "lists", "threshold")


class _Places:
    """Entries of dictionaries."""

    def __init__(self) -> None:
        self.tables: list[dict[str, Any]] = []
        self.names: list[str] = []

    def add(self, table: dict[str, Any], name: str) -> None:
        self.tables.append(table)
        self.names.append(name)

    def read(self) -> list[Any]:
        """What they hold now; None for those that are gone."""
        return _C.entries(self.tables, self.names)

    def hold(self, objects: list[Any]) -> bool:
        """Whether they hold these very objects."""
        return _C.entries_are(self.tables, self.names, objects)


class Watch:
    """Finds out whether a model has changed since a plan copied from it.

    A plan folds batch norms into convolutions, leaves out what they make constant, and copies the filters of grouped
    convolutions and those that a layer computes. All tensors that it may have copied are compared by value, whatever
    wrote to them; on a GPU, whose values cannot be read without a stall, by identity, version and steps of optimisers.
    The weights of plain convolutions are read at every call, and need no comparison, unless they are copied, too. A
    convolution that has more or fewer parameters than before is a change, of parametrizations; so are hooks that were
    added or removed.

    Args:
        model: the planned network.
        every: compare all tensors, for plans that copied weights of plain convolutions or recorded addresses.
    """

    def __init__(self, model: nn.Module, every: bool = False) -> None:
        self.values, self.objects = _Places(), _Places()
        # Parameters of convolutions whose weight the plan reads at every call.
        self.live: list[dict[str, Any]] = []
        # Those whose number of entries tells: parameters of convolutions, and by layer {the hook's number: hook}, as a
        # plan runs a layer that has hooks as it is.
        self.tables: list[dict[Any, Any]] = []
        self.hooks: list[dict[int, Any]] = []
        for module in model.modules():
            hooks = [module._forward_pre_hooks, module._forward_hooks]
            self.tables += hooks
            self.hooks += filter(None, hooks)
            live = not every and isinstance(module, nn.Conv2d) and is_plain(module) and module.groups == 1
            if isinstance(module, nn.Conv2d):
                self.tables.append(module._parameters)
                if live:
                    self.live.append(module._parameters)
            copies = isinstance(module, (nn.Conv2d, ParametrizationList))
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if name == "num_batches_tracked" or (live and name == "weight"):
                        continue
                    copied = False
                    if tensor is not None and holds_values(tensor):
                        copied = copies or every or tensor.numel() <= _MOST_COPIED
                    (self.values if copied else self.objects).add(table, name)
            for name in _ATTRIBUTES:
                if name in module.__dict__:
                    self.objects.add(module.__dict__, name)
        self.sizes = list(map(len, self.tables))
        self.hooked = list(map(tuple, self.hooks))
        self.seen = self.objects.read()
        # Held, so that no other tensor gets their identity.
        self.held = self.values.read()
        self.on_cpu = all(tensor.is_cpu for tensor in self.held)
        self.fingerprint = self._fingerprint(self.held)

    def _fingerprint(self, tensors: list[Tensor]) -> tuple[bytes, int]:
        # One that has moved to a GPU since has another fingerprint for that alone.
        steps = 0 if self.on_cpu else sum(count_steps(tensor) for tensor in tensors if not tensor.is_cpu)
        return _C.fingerprint(tensors), steps

    def changed(self) -> bool:
        """Whether anything that was copied is different now."""
        if not _C.sizes_are(self.tables, self.sizes) or list(map(tuple, self.hooks)) != self.hooked:
            return True
        if not all(map(operator.contains, self.live, repeat("weight"))) or not self.objects.hold(self.seen):
            return True
        tensors = self.held
        if not self.values.hold(self.held):
            tensors = self.values.read()
            for now, before in zip(tensors, self.held, strict=True):
                if now is not before and (now is None or not holds_values(now)):
                    return True
        with torch.no_grad():
            return self._fingerprint(tensors) != self.fingerprint
