"""What a plan copied from its model, and whether the model still holds it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from bap_kernels._load import _C
from bap_kernels._packed import count_steps
from bap_kernels._values import holds_values
from bap_kernels.plan.builder import is_plain

__all__ = ["Watch"]

# Larger tensors of other modules than convolutions are not copied; the modules are called, or the tensor is.
_MOST_COPIED = 2**16
# What else than tensors a plan takes over: batch norms' numbers, the lists of gathered layers, switches' thresholds.
_ATTRIBUTES = ("eps", "lists", "threshold")

_Place = tuple[dict[str, Any], str]


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
        self.values: list[_Place] = []
        self.objects: list[_Place] = []
        # Of convolutions: the parameters, how many they were, and whether the plan reads the weight at every call.
        self.convs: list[tuple[dict[str, Any], int, bool]] = []
        # By layer, {the hook's number: hook}: a plan runs a layer that has hooks as it is.
        self.hooks: list[dict[int, Any]] = []
        for module in model.modules():
            self.hooks += [module._forward_pre_hooks, module._forward_hooks]
            live = not every and isinstance(module, nn.Conv2d) and is_plain(module) and module.groups == 1
            if isinstance(module, nn.Conv2d):
                self.convs.append((module._parameters, len(module._parameters), live))
            copies = isinstance(module, (nn.Conv2d, ParametrizationList))
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if name == "num_batches_tracked" or (live and name == "weight"):
                        continue
                    copied = False
                    if tensor is not None and holds_values(tensor):
                        copied = copies or every or tensor.numel() <= _MOST_COPIED
                    (self.values if copied else self.objects).append((table, name))
            self.objects += [(module.__dict__, name) for name in _ATTRIBUTES if name in module.__dict__]
        self.hooked = self._hooked()
        self.seen = self._objects()
        # Held, so that no other tensor gets their identity.
        self.held = self._tensors()
        self.fingerprint = self._fingerprint(self.held)

    def _hooked(self) -> list[tuple[int, ...]]:
        return list(map(tuple, self.hooks))

    def _objects(self) -> list[Any]:
        return [table.get(name) for table, name in self.objects]

    def _tensors(self) -> list[Tensor]:
        return [table.get(name) for table, name in self.values]  # type: ignore[misc]

    @staticmethod
    def _fingerprint(tensors: list[Tensor]) -> tuple[bytes, int]:
        steps = sum(count_steps(tensor) for tensor in tensors if not tensor.is_cpu)
        return _C.fingerprint(tensors), steps

    def changed(self) -> bool:
        """Whether anything that was copied is different now."""
        if self._hooked() != self.hooked:
            return True
        objects = self._objects()
        if any(now is not before for now, before in zip(objects, self.seen, strict=True)):
            return True
        for table, count, live in self.convs:
            if len(table) != count or (live and "weight" not in table):
                return True
        tensors = self._tensors()
        for now, before in zip(tensors, self.held, strict=True):
            if now is not before and (now is None or not holds_values(now)):
                return True
        with torch.no_grad():
            return self._fingerprint(tensors) != self.fingerprint
