"""The Triton backend: kernels, their launches and the table of configurations.

The private ops are registered here; the kernels, and Triton itself, are imported at the first call of one: calls on a
CPU and machines without Triton do not pay for them.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import torch

import bap_kernels._load  # noqa: F401  declares the ops

__all__: list[str] = []

# Ops, and the functions of bap_kernels.triton.private_ops that implement them.
_OPS = {
    "_triton_unsupported_reason": "unsupported_reason",
    "_triton_families": "families",
    "_gathered_conv2d_triton": "gathered_conv2d",
    "_gathered_conv2d_backward_triton": "gathered_conv2d_backward",
    "_gathered_conv2d_mixed_triton": "gathered_conv2d_mixed",
    "_switched_conv2d_triton": "switched_conv2d",
    "_switched_conv2d_backward_triton": "switched_conv2d_backward",
}


def _deferred(op: str, name: str) -> Callable[..., Any]:
    schema = getattr(torch.ops.bap_kernels, op).default._schema
    call = namedtuple("call", [argument.name for argument in schema.arguments])  # type: ignore[misc]

    def run(*arguments: Any) -> Any:
        from bap_kernels.triton import private_ops

        return getattr(private_ops, name)(call(*arguments))

    return run


_library = torch.library.Library("bap_kernels", "IMPL")
for _op, _name in _OPS.items():
    for _key in ("CUDA", "CPU"):
        _library.impl(_op, _deferred(_op, _name), _key)
