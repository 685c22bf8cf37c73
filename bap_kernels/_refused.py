"""Kinds of tensors that no operator of the package takes, refused by name and not by the dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import bap_kernels._load  # noqa: F401  registers the operators

_KINDS = {
    "QuantizedCPU": "a quantised one",
    "MkldnnCPU": "one in oneDNN's own format (`to_mkldnn`)",
    "SparseCPU": "a sparse one",
}
_OPERATORS = ("gathered_conv2d", "_gathered_conv2d_fused", "_gathered_conv2d_mixed", "switched_conv2d")
# The registrations end with it.
_library = torch.library.Library("bap_kernels", "IMPL")


def _refuse(operator: str, kind: str) -> Callable[..., Any]:
    def refused(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"{operator.lstrip('_')}(): expected `input` and `weight` to be plain tensors of floating-point numbers, "
            f"got {kind}. Hint: convert bap_kernels.specialize(model, domain), a network of torch's own layers."
        )

    return refused


for _operator in _OPERATORS:
    for _key, _kind in _KINDS.items():
        _library.impl(_operator, _refuse(_operator, _kind), _key)
