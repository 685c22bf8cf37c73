"""Records a model's steps with torch.fx, layers as one step each."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

__all__ = ["record", "root_of"]


class _Tracer(fx.Tracer):
    """Records every layer as one step; remembers the innermost module whose code cannot be recorded."""

    def __init__(self, whole_types: tuple[type[nn.Module], ...], whole: set[nn.Module]) -> None:
        super().__init__()
        self.whole_types = whole_types
        self.whole = whole
        self.failed: nn.Module | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = isinstance(m, self.whole_types) or m in self.whole
        return known or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or m
            raise


def root_of(model: nn.Module, whole_types: tuple[type[nn.Module], ...]) -> nn.Module:
    """The model, inside another one if it is a single layer."""
    single = _Tracer(whole_types, set()).is_leaf_module(model, "") and len(list(model.children())) == 0
    return nn.Sequential(model) if single else model


def record(op: str, model: nn.Module, whole_types: tuple[type[nn.Module], ...]) -> tuple[nn.Module, fx.Graph]:
    """A model as :func:`root_of` gives it, and its recording.

    Args:
        op: the caller's name, for messages.
        model: any module; a submodule whose code cannot be recorded becomes one step.
        whole_types: layers that are one step, beside PyTorch's own.

    Raises:
        ValueError: if the model's own forward cannot be recorded.
    """
    root = root_of(model, whole_types)
    whole: set[nn.Module] = set()
    while True:
        tracer = _Tracer(whole_types, whole)
        try:
            graph = tracer.trace(root)
        except Exception as error:
            if tracer.failed is None or tracer.failed in whole:
                raise ValueError(
                    f"{op}(): expected `model` to be recordable by torch.fx, got {type(model).__name__}, whose own "
                    f"forward is not: {error}. Hint: move what depends on values into a submodule; it is run as it is."
                ) from error
            whole.add(tracer.failed)
            continue
        return root, graph
