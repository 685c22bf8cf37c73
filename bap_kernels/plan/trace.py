"""Records a model while it runs as the masked dense network, and turns the recording into a graph.

The masked dense network gives the meaning that every plan must keep: where a layer has an in-list, the dense layer of x
times a mask; where it has an out-list, the result's other channels left out (`GatheredConv2d`) or zero
(`MaskedConv2d`). What cannot be recorded or has no rule becomes one opaque operation, which is given all channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from bap_kernels.channels import ChannelLists
from bap_kernels.flow.arguments import map_leaves, tensors_of
from bap_kernels.flow.graph import Graph
from bap_kernels.flow.norms import norm_parts
from bap_kernels.flow.ops import is_same_padded_conv, layer_rule
from bap_kernels.functional import plain_conv2d
from bap_kernels.layer_kinds import DomainLayer
from bap_kernels.nn.call_graph import is_layer
from bap_kernels.nn.conv import GatheredConv2d, MaskedConv2d
from bap_kernels.nn.domains import domain_names
from bap_kernels.nn.module_copy import copy_modules, has_foreign_forward
from bap_kernels.plan.builder import Builder
from bap_kernels.plan.compare import largest_error, tolerance_of
from bap_kernels.plan.domain_view import InDomain, domain_set, fixed_lists, in_domain
from bap_kernels.plan.effective_conv import effective_conv, is_plain
from bap_kernels.plan.recording import Recording, first_difference, record

__all__ = ["call_copied", "check_reach", "not_taken", "run_masked", "same_widths", "trace"]


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


def _leaf_layers(root: nn.Module) -> set[nn.Module]:
    """The layers of a model that have a rule, each of which is one step, beside those of :func:`_is_step`."""

    def has_rule(module: nn.Module) -> bool:
        if isinstance(module, nn.Conv2d):
            return is_plain(module) or is_same_padded_conv(module) or effective_conv(module) is not None
        return layer_rule(module) is not None or norm_parts(module) is not None

    return {module for module in root.modules() if "forward" not in module.__dict__ and has_rule(module)}


def _rooted(model: nn.Module) -> nn.Module:
    """The model, inside another one if it is a single layer."""
    single = _is_step(model) and (isinstance(model, InDomain) or not list(model.children()))
    return nn.Sequential(model).eval() if single else model


def _masked_copy(root: nn.Module, domain: str | None) -> nn.Module:
    """The masked dense network: the model's code, its hooks included, on a copy of its modules."""

    def replaced(module: nn.Module, copier: Any) -> nn.Module | None:
        if not isinstance(module, GatheredConv2d):
            return None
        layer = fixed_lists(module, domain, copier)
        if "forward" not in module.__dict__:
            layer.__dict__["forward"] = functools.partial(_masked, layer, layer.channels)
        return layer

    return copy_modules(root, lambda module: isinstance(module, InDomain), replaced)


def call_copied(call: Callable[..., Any], inputs: tuple[Any, ...], draws: bool = False) -> Any:
    """A result on copies of the inputs, which the model may write to, without gradients.

    Args:
        call: the model.
        inputs: its arguments.
        draws: whether it draws random numbers; it then draws the same ones each time.
    """
    with torch.inference_mode(False), torch.no_grad():
        inputs = map_leaves(inputs, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)
        if not draws:
            return call(*inputs)
        # Only where it is needed: other threads draw from the same generator.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return call(*inputs)


def not_taken(op: str, inputs: tuple[Any, ...], error: Exception) -> ValueError:
    """What to raise where a model does not take an example."""
    shapes = ", ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else repr(x) for x in inputs)
    return ValueError(
        f"{op}(): expected `example_input` to be what `model` takes, got {shapes}, on which it raised: {error}"
    )


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
    convs = [module for module in root.modules() if isinstance(module, nn.Conv2d)]
    handles = [] if watch is None else [conv.register_forward_hook(watch) for conv in convs]
    try:
        return call_copied(root, inputs, draws)
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
    compact = [m for m in model.modules() if isinstance(m, GatheredConv2d) and not isinstance(m, MaskedConv2d)]
    return all(lists.counts[1] is None for layer in compact for lists in (layer.channels, *layer.lists.values()))


def trace(
    op: str,
    model: nn.Module,
    inputs: tuple[Any, ...],
    domain: str | None,
    unread: bool = False,
    recording: Recording | None = None,
) -> Graph:
    """Records a model.

    Args:
        op: the caller's name, for messages.
        model: in eval mode.
        inputs: what the model is called with.
        domain: whose lists; None keeps all channels.
        unread: keep operations whose result nothing reads.
        recording: that of another domain of a model with the `same_widths`; the model is not run then.

    Raises:
        ValueError: if the model is in training mode, does not know the domain, cannot be recorded, or does not take the
            inputs.
    """
    _check_mode(op, model)
    _check_domain(op, model, domain)
    root = _rooted(in_domain(model, domain))
    expected, draws = None, False
    if recording is None:
        leaves: set[nn.Module] = set()

        def make() -> nn.Module:
            copied = _masked_copy(root, domain)
            leaves.clear()
            leaves.update(_leaf_layers(copied))
            return copied

        try:
            expected = call_copied(make(), inputs)
        except Exception as error:
            raise not_taken(op, inputs, error) from error
        recording = _recorded(op, make, inputs, lambda module: _is_step(module) or module in leaves)
        if _differs(recording.result, expected):
            # Two random numbers may be close to each other by chance.
            draws = any(_differs(call_copied(make(), inputs), expected) for _ in range(3))
            if not draws:
                raise ValueError(
                    f"{op}(): expected `model` to be recordable, got {type(model).__name__}, which returns something "
                    "else while it is recorded. Hint: does its code look at types of numbers, or at its callers?"
                )
            expected = call_copied(make(), inputs, draws)
        check_reach(op, model, domain, recording, inputs, draws)
    builder = Builder(root, recording.specs, domain, len(inputs), recording.constants)
    graph = Graph(builder.build(recording.graph.nodes), expected, recording, builder.not_lowered, draws)
    if not unread:
        _drop_unread(graph)
    return graph


def _differs(got: Any, expected: Any) -> bool:
    if any(isinstance(tensor, FakeTensor) for tensor in tensors_of(expected)):
        return False
    share, _, dtype = largest_error(got, expected)
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    return not share <= tolerance_of(dtype, torch.get_autocast_dtype(kinds[0]) if kinds else None)


def check_reach(
    op: str, model: nn.Module, domain: str | None, recording: Recording, inputs: tuple[Any, ...], draws: bool
) -> None:
    """Compares with the model itself where its code may call layers that a copy of its modules does not reach.

    These are layers that were not seen to be called: functions and objects outside of the modules may hold them, and
    then call the original, with the lists that are active. The model is set to a domain meanwhile, for every thread.

    Raises:
        ValueError: if the copy computes something else.
    """
    root = _rooted(in_domain(model, domain))
    seen = {root.get_submodule(str(node.target)) for node in recording.graph.nodes if node.op == "call_module"}
    unseen = [module for module in root.modules() if isinstance(module, DomainLayer) and module not in seen]
    if not unseen or any(isinstance(tensor, FakeTensor) for tensor in tensors_of(inputs)):
        return
    other = next((name for name in domain_names(model) if name != domain), domain)
    with domain_set(model, other):
        copied = call_copied(_masked_copy(root, domain), inputs, draws)
    with domain_set(model, domain):
        real = call_copied(model, inputs, draws)
    if _differs(copied, real):
        raise ValueError(
            f"{op}(): expected a copy of `model` to compute what it computes in domain {domain!r}, got something else. "
            "Hint: a function or an object outside of its modules calls layers that depend on the domain."
        )


def _other_inputs(inputs: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Examples of another batch and image size, of another batch, and of other values."""
    batch = next((x.shape[0] for x in tensors_of(inputs) if x.dim() > 0), 0)
    generator = torch.Generator().manual_seed(0)

    def drawn(x: Tensor, shape: tuple[int, ...]) -> Tensor:
        if not x.is_floating_point():
            # Labels and indices: those that are there, repeated.
            for axis, size in enumerate(shape):
                x = x.roll(1, axis).repeat_interleave(-(-size // max(x.shape[axis], 1)), axis).narrow(axis, 0, size)
            return x
        data = x.detach().float()
        spread = data.std().item() if not isinstance(x, FakeTensor) and x.numel() > 1 else 1.0
        centre = data.mean().item() if not isinstance(x, FakeTensor) and x.numel() > 0 else 0.0
        return (torch.randn(shape, generator=generator) * (spread or 1.0) + centre).to(x.device, x.dtype)

    def other(leaf: Any, batched: bool, sized: bool) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        shape = list(leaf.shape)
        if batched and shape and shape[0] == batch:
            shape[0] = 1 if batch > 1 else 2
        if sized and len(shape) == 4:
            shape[2:] = [size - 32 if size > 96 else size + 32 for size in shape[2:]]
        return drawn(leaf, tuple(shape))

    for batched, sized in ((True, True), (True, False), (False, False)):
        try:
            yield map_leaves(inputs, functools.partial(other, batched=batched, sized=sized))
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            continue


def _recorded(
    op: str, make: Callable[[], nn.Module], inputs: tuple[Any, ...], is_step: Callable[[nn.Module], bool]
) -> Recording:
    """A recording whose steps are the same for another batch and, where the model takes one, another image size."""
    whole: dict[str, str] = {}
    while True:
        first = record(op, make, inputs, is_step, whole)
        second = None
        for others in _other_inputs(inputs):
            try:
                call_copied(make(), others)
            except Exception:  # the model does not take these
                continue
            second = record(op, make, others, is_step, whole)
            break
        if second is None or len(second.whole) > len(first.whole):
            if second is None:
                return first
            continue
        node = first_difference(first, second)
        if node is None:
            return first
        inside = node.meta.get("within", ("",))[-1]
        if not inside:
            raise ValueError(
                f"{op}(): expected `model` to be recordable, got one whose own forward takes other steps for another "
                f"input, from {node.name!r} on. Hint: move what depends on it into a submodule, which is run as it is."
            )
        whole[inside] = f"it takes other steps for another input, from {node.name!r} on"
