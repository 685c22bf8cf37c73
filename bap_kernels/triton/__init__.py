"""The Triton backend: kernels, their launches and the table of configurations.

The private ops are registered here; the kernels, and Triton itself, are imported at the first call of one: calls on a
CPU and machines without Triton do not pay for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import bap_kernels._load  # noqa: F401  declares the ops

__all__: list[str] = []

# Each is bap_kernels::_<name>_triton, and a function of bap_kernels.triton.private_ops.
_OPS = (
    "gathered_conv2d",
    "gathered_conv2d_backward",
    "gathered_conv2d_mixed",
    "switched_conv2d",
    "switched_conv2d_backward",
)


def _deferred(name: str) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        from bap_kernels.triton import private_ops

        return getattr(private_ops, name)(*arguments)

    return run


_library = torch.library.Library("bap_kernels", "IMPL")
for _key in ("CUDA", "CPU"):
    _library.impl("_triton_unsupported_reason", _deferred("unsupported_reason"), _key)
    _library.impl("_triton_families", _deferred("families"), _key)
    for _name in _OPS:
        _library.impl(f"_{_name}_triton", _deferred(_name), _key)
