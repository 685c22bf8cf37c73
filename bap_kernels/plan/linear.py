"""Classifiers of a plan: linear layers whose weight all threads read."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bap_kernels._load import _C
from bap_kernels.flow.ops import Call, has_hooks
from bap_kernels.nn.replaceable import has_own_forward
from bap_kernels.plan.replaced_call import ReplacedCall

__all__ = ["linear_of"]


class _Linear(ReplacedCall):
    """A linear layer, (N, C) -> (N, K) and whatever else it takes; its parameters are read at every call."""

    def __init__(self, call: Call, layer: nn.Linear) -> None:
        super().__init__(call)
        self.parameters: dict[str, Any] = layer._parameters

    def run(self, x: Tensor) -> Any:
        return _C.linear(x, self.parameters["weight"], self.parameters["bias"])


def linear_of(call: Any) -> _Linear | None:
    """The call as a linear layer that is one and no more; None for any other call."""
    layer = call.target if isinstance(call, Call) and not call.args and not call.kwargs else None
    if type(layer) is not nn.Linear or has_hooks(layer) or has_own_forward(layer):
        return None
    return _Linear(call, layer) if {"weight", "bias"} <= layer._parameters.keys() else None
