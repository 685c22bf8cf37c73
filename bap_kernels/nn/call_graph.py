"""Which modules and functions a model calls on one another's results, found without an example."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from bap_kernels.flow.arguments import leaves_of
from bap_kernels.flow.ops import has_hooks

__all__ = ["is_layer", "record_calls"]


def is_layer(module: nn.Module) -> bool:
    """Whether a module is one of PyTorch's own, which are one step each."""
    return module.__module__.startswith(("torch.nn", "torch.ao.nn")) and not isinstance(module, nn.Sequential)


class _Calls(fx.Tracer):
    """Records calls on placeholders without an example; it patches nothing, so other threads see nothing of it."""

    def __init__(self, root: nn.Module, is_step: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.root, self.is_step = root, is_step
        self.graph = fx.Graph(tracer_cls=fx.Tracer)
        self.tensor_attrs = {}

    def module(self, name: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """A call of one of the root's modules."""
        if not any(isinstance(leaf, fx.Proxy) for leaf in leaves_of((args, kwargs))):
            return module._call_impl(*args, **kwargs)
        begin = len(self.graph.nodes)
        if not (self.is_step(module) or is_layer(module) or has_hooks(module)):
            try:
                return module._call_impl(*args, **kwargs)
            except Exception:  # whatever code raises that is given placeholders
                for node in reversed(list(self.graph.nodes)[begin:]):
                    self.graph.erase_node(node)
        return self.create_proxy("call_module", name, args, kwargs)


def record_calls(root: nn.Module, is_step: Callable[[nn.Module], bool]) -> fx.Graph:
    """Records which modules and functions a model calls on one another's results, without an example.

    It sees one way through the code: branches on tensors make the innermost module one step, other branches are taken
    as a placeholder takes them. So it tells what probably is read by what, and not what a model computes.

    Args:
        root: a copy of a model that nobody else uses.
        is_step: modules that are one step, beside PyTorch's own and those with hooks.

    Raises:
        Exception: whatever the root's own forward raises when it is given placeholders.
    """
    calls = _Calls(root, is_step)
    for name, module in root.named_modules():
        if name and not isinstance(module, torch.jit.ScriptModule):
            module.__dict__["_compiled_call_impl"] = functools.partial(calls.module, name, module)
    given: list[Any] = []
    for parameter in inspect.signature(root.forward).parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD) and (
            parameter.default is parameter.empty
        ):
            given.append(calls.create_proxy("placeholder", parameter.name, (), {}))
    # Regions that are computed again run as they are.
    with torch.no_grad():
        calls.create_node("output", "output", (calls.create_arg(root.forward(*given)),), {})
    return calls.graph
