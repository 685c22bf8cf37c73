"""torch.compile with frozen weights, for one shape: the strongest form in which PyTorch runs a network on a CPU."""

from typing import Any

import torch
from torch import Tensor, nn


def frozen(model: nn.Module, example: Tensor) -> nn.Module:
    """Compile a network for the shape and memory format of an example, in the caller's grad mode.

    Weights become constants: batch norms are folded into them, and oneDNN lays them out once.

    Args:
        model: In eval mode; torch.fx must be able to trace it.
        example: Run once, which compiles.
    """
    # torch.compile keeps what it made under the code that it compiled, which networks of one class share; after
    # another batch it would compile for any batch. What torch.fx traces has code of its own.
    traced = torch.fx.symbolic_trace(model)
    made: Any = torch.compile(traced, dynamic=False, options={"freezing": True})
    made(example)
    return made
