"""Records a model with torch.fx, runs it once as the masked dense network, and says what each step does to channels.

The masked dense network gives the meaning that every plan must keep: where a layer has an in-list, the dense layer of x
times a mask; where it has an out-list, the result's other channels left out (`GatheredConv2d`) or zero
(`MaskedConv2d`). What cannot be recorded or is not known becomes one opaque step, which is handed all channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from bap_kernels.channels import ChannelLists
from bap_kernels.nn.conv import GatheredConv2d, MaskedConv2d
from bap_kernels.nn.domains import domain_names
from bap_kernels.nn.recording import record, root_of
from bap_kernels.plan.builder import Builder, Facts
from bap_kernels.plan.domain_view import frozen, in_domain, lists_of
from bap_kernels.plan.graph import Graph
from bap_kernels.plan.operations import has_hooks

__all__ = ["Recording", "same_widths", "trace"]


@dataclass(frozen=True)
class Recording:
    """A model's steps, and the shape and dtype of what each returned on the example."""

    steps: fx.Graph
    facts: Facts


def _masked(layer: GatheredConv2d, lists: ChannelLists, x: Tensor) -> Tensor:
    """The layer's meaning in PyTorch's own operations."""
    if lists.in_index is not None:
        mask = x.new_zeros(x.shape[-3], 1, 1)
        mask[lists.in_index.long()] = 1
        x = x * mask
    y = layer._conv_forward(x, layer.weight, layer.bias)
    if lists.out_index is None:
        return y
    listed = lists.out_index.long()
    if not isinstance(layer, MaskedConv2d):
        return y.index_select(-3, listed)
    mask = y.new_zeros(y.shape[-3], 1, 1)
    mask[listed] = 1
    return y * mask


class _MaskedDense(fx.Interpreter):
    """Runs the recording as the masked dense network and keeps every step's shape and dtype."""

    def __init__(self, root: nn.Module, graph: fx.Graph, domain: str | None) -> None:
        super().__init__(root, graph=graph)
        self.domain = domain
        self.facts: Facts = {}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        if isinstance(module, GatheredConv2d) and not has_hooks(module):
            return _masked(module, lists_of(module, self.domain), *args, **kwargs)
        return frozen(module, self.domain)(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        is_tensor = isinstance(result, Tensor)
        self.facts[n] = (tuple(result.shape), result.dtype) if is_tensor else (None, None)
        return result


def _drop_unread(graph: Graph) -> None:
    kept = []
    for op in reversed(graph.ops):
        if op.output.consumers or op.kind in ("input", "opaque", "output"):
            kept.append(op)
        else:
            for value in set(op.inputs):
                value.consumers.remove(op)
    graph.ops = kept[::-1]


def _check_mode(op: str, model: nn.Module) -> None:
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(
                f"{op}(): expected `model` to be in eval mode, got {name or type(model).__name__!r} in training mode. "
                "Hint: call model.eval() first."
            )


def _check_domain(op: str, model: nn.Module, domain: str | None) -> None:
    known = domain_names(model)
    if domain is None or domain in known:
        return
    hint = "" if known else " Hint: call swap_, then attach_."
    raise ValueError(f"{op}(): expected `domain` to be one of {known}, got {domain!r}.{hint}")


def same_widths(model: nn.Module) -> bool:
    """Whether every tensor has as many channels in one domain as in another, so that one recording serves all."""
    layers = [one for one in model.modules() if isinstance(one, GatheredConv2d) and not isinstance(one, MaskedConv2d)]
    return all(one.counts[1] is None for layer in layers for one in (layer.channels, *layer.lists.values()))


def trace(
    op: str,
    model: nn.Module,
    inputs: tuple[Any, ...],
    domain: str | None,
    unread: bool = False,
    known: Recording | None = None,
) -> Graph:
    """Records a model.

    Args:
        op: the caller's name, for messages.
        model: in eval mode.
        inputs: what the model is called with.
        domain: whose lists; None keeps all channels.
        unread: keep operations whose result nothing reads.
        known: the recording of another domain of a model with the `same_widths`; the model is not run then.

    Raises:
        ValueError: if the model is in training mode, does not know the domain, cannot be recorded, or does not take the
            inputs.
    """
    _check_mode(op, model)
    _check_domain(op, model, domain)
    expected = None
    if known is not None:
        root = root_of(in_domain(model, domain), (GatheredConv2d,))
    else:
        root, recorded = record(op, in_domain(model, domain), (GatheredConv2d,))
        run = _MaskedDense(root, recorded, domain)
        run.extra_traceback = False
        try:
            with torch.no_grad():
                expected = run.run(*inputs)
        except Exception as error:
            shapes = ", ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else repr(x) for x in inputs)
            raise ValueError(
                f"{op}(): expected `example_input` to be what `model` takes, got {shapes}, on which it raised: {error}"
            ) from error
        known = Recording(recorded, run.facts)
    ops = Builder(root, known.facts, domain, len(inputs)).build(known.steps.nodes)
    graph = Graph(ops, expected, known)
    if not unread:
        _drop_unread(graph)
    return graph
