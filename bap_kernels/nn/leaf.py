"""Layers that torch.fx records as one step each, with any tracer, as it does PyTorch's own layers.

The default tracer looks for the name of torch's package to tell a layer from code that it follows; layers of this
package say themselves what they are when they are called with a placeholder.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.fx import Proxy

__all__ = ["Proxy", "as_one_step"]


def as_one_step(layer: nn.Module, input: Proxy, *others: Any) -> Any:
    """Records a call of a layer, and gives the placeholder of its result.

    Raises:
        NotImplementedError: if the layer is the whole model that is recorded.
    """
    tracer = input.tracer
    assert isinstance(tracer, fx.Tracer)
    if tracer.root is layer:
        raise NotImplementedError(
            f"{type(layer).__name__}(): expected torch.fx to record a model that holds this layer, got the layer "
            "itself. Hint: put it into torch.nn.Sequential."
        )
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (input, *others), {})
