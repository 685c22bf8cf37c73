"""torch.compile with frozen weights for one shape, PyTorch's fastest way to run a network on a CPU."""

from typing import Any

import torch
from torch import Tensor, nn


def frozen(model: nn.Module, example: Tensor) -> nn.Module:
    """Compile a network for the shape and memory format of an example, in the caller's grad mode.

    Weights become constants: batch norms are folded into them, and oneDNN prepacks them.

    Args:
        model: In eval mode, traceable by torch.fx.
        example: An input.
    """
    # torch.compile caches by code object, which networks of one class share, and would compile a second batch size
    # for dynamic shapes. A graph traced by torch.fx has its own code object.
    traced = torch.fx.symbolic_trace(model)
    compiled: Any = torch.compile(traced, dynamic=False, options={"freezing": True})
    compiled(example)
    return compiled
