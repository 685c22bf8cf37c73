"""Calls of a model that kernels of ours replace in a plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_unary

from bap_kernels._load import _C

__all__ = ["ReplacedCall"]


class ReplacedCall:
    """A call of one tensor that runs as the model's own wherever somebody else has a say in it.

    That is so while ``torch.compile`` traces, with the backend ``aten``, under modes of PyTorch's functions, and for
    subclasses of tensors, which may have functions of their own.

    Args:
        call: the model's own.
    """

    def __init__(self, call: Callable[[Tensor], Any]) -> None:
        self.original = call

    def __call__(self, x: Tensor) -> Any:
        """The result of the model's call."""
        if torch.compiler.is_compiling() or has_torch_function_unary(x) or _C.get_backend() == "aten":
            return self.original(x)
        return self.run(x)

    def run(self, x: Tensor) -> Any:
        """By our kernels, or PyTorch's for what they do not know."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return repr(self.original)
