"""Records a model while it runs as the masked dense network, and says what each step does to channels.

The masked dense network gives the meaning that every plan must keep: where a layer has an in-list, the dense layer of x
times a mask; where it has an out-list, the result's other channels left out (`GatheredConv2d`) or zero
(`MaskedConv2d`). What cannot be recorded or is not known becomes one opaque step, which is handed all channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from bap_kernels.channels import ChannelLists
from bap_kernels.functional import plain_conv2d
from bap_kernels.nn.conv import GatheredConv2d, MaskedConv2d
from bap_kernels.nn.domains import domain_names
from bap_kernels.nn.module_copy import copy_modules, has_foreign_forward
from bap_kernels.nn.per_domain import PerDomain
from bap_kernels.nn.recording import Recorded, differences, is_layer, record
from bap_kernels.plan.builder import Builder
from bap_kernels.plan.compare import largest_error, tolerance_of
from bap_kernels.plan.domain_view import InDomain, domain_set, in_domain, lists_of
from bap_kernels.plan.graph import Graph
from bap_kernels.plan.leaves import leaves

__all__ = ["Recording", "called", "check_reach", "run_masked", "same_widths", "trace"]

Recording = Recorded


def _masked(layer: GatheredConv2d, lists: ChannelLists, input: Tensor) -> Tensor:
    """The layer's meaning in PyTorch's own operations."""
    x = input
    if lists.in_index is not None:
        mask = x.new_zeros(x.shape[-3], 1, 1)
        mask[lists.in_index.long()] = 1
        x = x * mask
    if layer.padding_mode == "zeros":
        options: Any = (layer.stride, layer.padding, layer.dilation, layer.groups)
        y = plain_conv2d(x, layer.weight, layer.bias, *options)
    else:
        y = layer._conv_forward(x, layer.weight, layer.bias)
    if lists.out_index is None:
        return y
    listed = lists.out_index.long()
    if not isinstance(layer, MaskedConv2d):
        return y.index_select(-3, listed)
    mask = y.new_zeros(y.shape[-3], 1, 1)
    mask[listed] = 1
    return y * mask


def _is_step(module: nn.Module) -> bool:
    return isinstance(module, (GatheredConv2d, InDomain)) or is_layer(module) or has_foreign_forward(module)


def _rooted(model: nn.Module) -> nn.Module:
    """The model, inside another one if it is a single layer."""
    single = _is_step(model) and (isinstance(model, InDomain) or not list(model.children()))
    return nn.Sequential(model).eval() if single else model


def _masked_copy(root: nn.Module, domain: str | None) -> nn.Module:
    """The masked dense network: the model's code, its hooks included, on a copy of its modules."""

    def replaced(one: nn.Module, copier: Any) -> nn.Module | None:
        if not isinstance(one, GatheredConv2d):
            return None
        made = copier.fresh(one)
        made.channels, made.lists = lists_of(one, domain), {}
        made.__dict__.pop("_mixed", None)
        if "forward" not in one.__dict__:
            made.__dict__["forward"] = functools.partial(_masked, made, made.channels)
        assert isinstance(made, nn.Module)
        return made

    return copy_modules(root, lambda one: isinstance(one, InDomain), replaced)


def _copies(part: Any) -> Any:
    """What a model is called with, as it may write to it."""
    if isinstance(part, Tensor):
        return part.clone()
    if isinstance(part, (list, tuple)) and not hasattr(part, "_fields"):
        return type(part)(_copies(one) for one in part)
    return {key: _copies(one) for key, one in part.items()} if type(part) is dict else part


def called(call: Callable[..., Any], inputs: tuple[Any, ...], draws: bool = False) -> Any:
    """A result, without gradients; of a model that draws random numbers, with the same ones each time."""
    with torch.inference_mode(False), torch.no_grad():
        if not draws:
            return call(*_copies(inputs))
        # Only where it is needed: other threads draw from the same generator.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return call(*_copies(inputs))


def run_masked(
    model: nn.Module,
    domain: str | None,
    inputs: tuple[Any, ...],
    draws: bool,
    watch: Callable[[nn.Module, Any, Any], None] | None = None,
) -> Any:
    """What the masked dense network returns, nothing recorded.

    Args:
        model, domain, inputs: as in :func:`trace`.
        draws: whether the model draws random numbers.
        watch: called with every convolution that runs, its arguments and its result.
    """
    root = _masked_copy(_rooted(in_domain(model, domain)), domain)
    watched = [one for one in root.modules() if watch is not None and isinstance(one, nn.Conv2d)]
    handles = [one.register_forward_hook(watch) for one in watched]  # type: ignore[arg-type]
    try:
        return called(root, inputs, draws)
    finally:
        for handle in handles:
            handle.remove()


def _drop_unread(graph: Graph) -> None:
    kept = []
    for op in reversed(graph.ops):
        if op.output.consumers or op.kind in ("input", "output") or (op.kind == "opaque" and not op.pure):
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
    root = _rooted(in_domain(model, domain))
    expected, draws = None, False
    if known is None:
        known_layers: set[nn.Module] = set()

        def make() -> nn.Module:
            copied = _masked_copy(root, domain)
            known_layers.clear()
            known_layers.update(leaves(copied.modules()))
            return copied

        try:
            expected = called(make(), inputs)
        except Exception as error:
            shapes = ", ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else repr(x) for x in inputs)
            raise ValueError(
                f"{op}(): expected `example_input` to be what `model` takes, got {shapes}, on which it raised: {error}"
            ) from error
        known = _recorded(op, make, inputs, lambda one: _is_step(one) or one in known_layers)
        if _differs(known.result, expected):
            # Two random numbers may be close to each other by chance.
            draws = any(_differs(called(make(), inputs), expected) for _ in range(3))
            if not draws:
                raise ValueError(
                    f"{op}(): expected `model` to be recordable, got {type(model).__name__}, which returns something "
                    "else while it is recorded. Hint: does its code look at types of numbers, or at its callers?"
                )
            expected = called(make(), inputs, draws)
        check_reach(op, model, domain, known, inputs, draws)
    builder = Builder(root, known.facts, domain, len(inputs), known.constants)
    graph = Graph(builder.build(known.graph.nodes), expected, known, builder.not_lowered, draws)
    if not unread:
        _drop_unread(graph)
    return graph


def _cast() -> torch.dtype | None:
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    return torch.get_autocast_dtype(kinds[0]) if kinds else None


def _differs(got: Any, expected: Any) -> bool:
    if any(isinstance(one, FakeTensor) for one in _tensors_in(expected)):
        return False
    share, _, dtype = largest_error(got, expected)
    return not share <= tolerance_of(dtype, _cast())


def check_reach(
    op: str, model: nn.Module, domain: str | None, known: Recorded, inputs: tuple[Any, ...], draws: bool
) -> None:
    """Compares with the model itself where its code may call layers that a copy of its modules does not reach.

    These are layers that were not seen to be called: functions and objects outside of the modules may hold them, and
    then call the original, with the lists that are active. The model is set to a domain meanwhile, for every thread.

    Raises:
        ValueError: if the copy computes something else.
    """
    root = _rooted(in_domain(model, domain))
    seen = {root.get_submodule(str(node.target)) for node in known.graph.nodes if node.op == "call_module"}
    unseen = [one for one in root.modules() if isinstance(one, (GatheredConv2d, PerDomain)) and one not in seen]
    if not unseen or any(isinstance(one, FakeTensor) for one in _tensors_in(inputs)):
        return
    other = next((one for one in domain_names(model) if one != domain), domain)
    with domain_set(model, other):
        copied = called(_masked_copy(root, domain), inputs, draws)
    with domain_set(model, domain):
        real = called(model, inputs, draws)
    if _differs(copied, real):
        raise ValueError(
            f"{op}(): expected a copy of `model` to compute what it computes in domain {domain!r}, got something else. "
            "Hint: a function or an object outside of its modules calls layers that depend on the domain."
        )


def _tensors_in(part: Any) -> list[Tensor]:
    if isinstance(part, Tensor):
        return [part]
    if isinstance(part, dict):
        part = list(part.values())
    return [one for item in part for one in _tensors_in(item)] if isinstance(part, (list, tuple)) else []


def _others(inputs: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Examples of another batch and image size, of another batch, and of other numbers."""
    tensors = _tensors_in(inputs)
    batch = next((x.shape[0] for x in tensors if x.dim() > 0), 0)
    generator = torch.Generator().manual_seed(0)

    def drawn(x: Tensor, shape: tuple[int, ...]) -> Tensor:
        if not x.is_floating_point():
            # Numbers of things: those that are there, repeated.
            for axis, size in enumerate(shape):
                x = x.roll(1, axis).repeat_interleave(-(-size // max(x.shape[axis], 1)), axis).narrow(axis, 0, size)
            return x
        data = x.detach().float()
        spread = data.std().item() if not isinstance(x, FakeTensor) and x.numel() > 1 else 1.0
        centre = data.mean().item() if not isinstance(x, FakeTensor) and x.numel() > 0 else 0.0
        return (torch.randn(shape, generator=generator) * (spread or 1.0) + centre).to(x.device, x.dtype)

    def other(part: Any, batched: bool, sized: bool) -> Any:
        if isinstance(part, Tensor):
            shape = list(part.shape)
            if batched and shape and shape[0] == batch:
                shape[0] = 1 if batch > 1 else 2
            if sized and len(shape) == 4:
                shape[2:] = [size - 32 if size > 96 else size + 32 for size in shape[2:]]
            return drawn(part, tuple(shape))
        if isinstance(part, (list, tuple)) and not hasattr(part, "_fields"):
            return type(part)(other(one, batched, sized) for one in part)
        return {key: other(one, batched, sized) for key, one in part.items()} if type(part) is dict else part

    for batched, sized in ((True, True), (True, False), (False, False)):
        try:
            yield other(inputs, batched, sized)
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            continue


def _recorded(
    op: str, make: Callable[[], nn.Module], inputs: tuple[Any, ...], is_step: Callable[[nn.Module], bool]
) -> Recorded:
    """A recording whose steps are the same for another batch and, where the model takes one, another image size."""
    whole: dict[str, str] = {}
    while True:
        first = record(op, make, inputs, is_step, whole)
        second = None
        for others in _others(inputs):
            try:
                called(make(), others)
            except Exception:  # the model does not take these
                continue
            second = record(op, make, others, is_step, whole)
            break
        if second is None or len(second.whole) > len(first.whole):
            if second is None:
                return first
            continue
        node = differences(first, second)
        if node is None:
            return first
        inside = node.meta.get("within", ("",))[-1]
        if not inside:
            raise ValueError(
                f"{op}(): expected `model` to be recordable, got one whose own forward takes other steps for another "
                f"input, from {node.name!r} on. Hint: move what depends on it into a submodule, which is run as it is."
            )
        whole[inside] = f"it takes other steps for another input, from {node.name!r} on"
