"""Which layers of a plain model are its classifiers, and how many classes each domain has in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import fx, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from bap_kernels.flow.ops import rule_of
from bap_kernels.nn.call_graph import record_calls
from bap_kernels.nn.domain_heads import outputs_of
from bap_kernels.nn.module_copy import copy_modules
from bap_kernels.nn.per_domain import PerDomain, domain_layers
from bap_kernels.nn.replaceable import refuse_own_forward

__all__ = ["Choice", "Numbers", "chosen_heads", "shared_classifiers"]

Numbers: TypeAlias = Mapping[str, int]
# Which layers: a name, names, or a predicate on (module, name).
Choice: TypeAlias = str | Sequence[str] | Callable[[nn.Module, str], bool]

_MOST_NAMED = 8


def _is_plain_conv(module: nn.Module) -> bool:
    # Switched and gathered layers are subclasses.
    return isinstance(module, nn.Conv2d) and type(module).forward is nn.Conv2d.forward and module.groups == 1


def _may_classify(module: nn.Module) -> bool:
    """Whether a layer can be found to be a classifier: a linear one, or a 1x1 convolution."""
    if isinstance(module, nn.Linear):
        # Attention reads the weight of that class itself, past its forward.
        return not isinstance(module, NonDynamicallyQuantizableLinear)
    return _is_plain_conv(module) and module.kernel_size == (1, 1)


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    inside = {module for _, layer in domain_layers(model) for module in layer.domains.modules()}
    return {name: m for name, m in model.named_modules() if m not in inside and _may_classify(m)}


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:_MOST_NAMED])) + (f" and {len(names) - _MOST_NAMED} more" * (len(names) > 8))


def _last_layers(model: nn.Module, candidates: Mapping[str, nn.Module]) -> tuple[list[str], str | None]:
    """The candidates whose results reach the model's result through no other layer with parameters.

    Returns:
        Their names, and what makes it doubtful that these are all.
    """
    if not list(model.children()):
        return list(candidates), None
    try:
        graph = record_calls(copy_modules(model), lambda module: isinstance(module, (PerDomain, nn.Linear, nn.Conv2d)))
    except Exception as error:  # whatever the model's own code raises
        return list(candidates), f"the model cannot be recorded ({error})"
    names = {module: name for name, module in candidates.items()}
    last: dict[str, None] = {}
    doubt: str | None = None
    seen: set[fx.Node] = set()
    waiting = [node for node in graph.nodes if node.op == "output"]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "call_module":
            module = model.get_submodule(str(node.target))
            if module in names:
                last[names[module]] = None
                continue
            if isinstance(module, PerDomain):
                continue
            parts = set(module.modules())
            within = [name for candidate, name in names.items() if candidate in parts]
            if within:
                # A part that is one step: any of its layers may be the last.
                last.update(dict.fromkeys(within))
                doubt = doubt or f"{node.target!r}, which holds them, cannot be recorded"
                continue
            if next(module.parameters(), None) is not None:
                continue
        elif node.op in ("call_function", "call_method"):
            rule = rule_of(node.target)
            if rule is not None and rule.kind == "product":
                # What comes before a product with a weight of no layer is no classifier.
                doubt = doubt or "the result is a product of tensors that no layer computes"
                continue
        waiting += node.all_input_nodes
    return list(last), doubt


def shared_classifiers(model: nn.Module) -> list[str]:
    """The linear layers and 1x1 convolutions that are, or may be, classifiers and are not one for every domain."""
    return _last_layers(model, _candidates(model))[0]


def _default(model: nn.Module) -> list[str]:
    candidates = _candidates(model)
    last, doubt = _last_layers(model, candidates)
    if len(last) == 1 and (doubt is None or len(candidates) == 1):
        return last
    if not candidates:
        raise ValueError(
            "switch_(): expected `model` to have a torch.nn.Linear for `heads`, or a 1x1 convolution, got none. "
            "Hint: put a bap_kernels.nn.DomainLinear where the classifier is."
        )
    named = _listed(last or candidates)
    if doubt:
        reason = f"one that may be {named}: {doubt}"
    elif last:
        reason = f"{len(last)}: {named}"
    else:
        reason = f"none of its linear layers and 1x1 convolutions, which are {named}"
    first = (last or list(candidates))[-1]
    raise ValueError(
        f"switch_(): expected `model` to have one classifier before its result, got {reason}. "
        f"Hint: choose with head={first!r}, a list of names, or a predicate (module, name) -> bool."
    )


def _named(model: nn.Module, choice: Choice, argument: str) -> list[str]:
    candidates = _candidates(model)
    if isinstance(choice, str):
        names = [choice]
    elif callable(choice):
        names = [name for name, module in candidates.items() if choice(module, name)]
    else:
        names = list(choice)
    known = f"one of {_listed(candidates)}" if candidates else "a linear layer or a 1x1 convolution"
    if not names:
        raise ValueError(f"switch_(): expected `{argument}` to choose {known}, got none.")
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        module = modules.get(name) if isinstance(name, str) else None
        if module is None:
            raise ValueError(
                f"switch_(): expected `{argument}` to name {known}, got {name!r}, which is not in the model."
            )
        _refuse_unfit(name, module, argument)
    return names


def _refuse_unfit(name: str, module: nn.Module, argument: str) -> None:
    kind = type(module).__name__
    if isinstance(module, NonDynamicallyQuantizableLinear):
        raise NotImplementedError(
            f"switch_(): expected `{argument}` to name a layer that is called, got {name!r}, a {kind}, whose weight "
            "MultiheadAttention reads past its forward."
        )
    if not (isinstance(module, nn.Linear) or _is_plain_conv(module)):
        raise NotImplementedError(
            f"switch_(): expected `{argument}` to name linear layers or plain convolutions with groups=1, got "
            f"{name!r}, a {kind}. Hint: put a bap_kernels.nn.DomainLinear or DomainConv2d there."
        )


def _checked_numbers(numbers: Mapping[str, Any], names: Sequence[str]) -> dict[str, int]:
    if set(numbers) != set(names):
        raise ValueError(f"switch_(): expected `heads` to name the domains {list(names)}, got {list(numbers)}.")
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(
                f"switch_(): expected `heads` to hold numbers of classes, at least 1, got {number!r} for {name!r}."
            )
    return {name: numbers[name] for name in names}


def chosen_heads(
    model: nn.Module,
    names: Sequence[str],
    heads: Numbers | Mapping[str, Numbers] | bool | Choice | None,
    head: Choice | None,
) -> dict[nn.Module, dict[str, int]]:
    """The classifiers that :func:`bap_kernels.nn.switch_` replaces, {layer: {domain: number of classes}}.

    Args:
        model: a plain model.
        names: the domains.
        heads, head: as in :func:`bap_kernels.nn.switch_`.

    Raises:
        ValueError: for other domains, numbers or names, and if it is not clear which layer is the classifier.
        NotImplementedError: for layers that cannot be one per domain.
    """
    if heads is None or heads is False:
        if head is not None:
            raise ValueError(
                "switch_(): expected `heads` along with `head`, got none. Hint: heads=True gives every domain a copy "
                "of the classifier, {domain: number} one for other classes."
            )
        return {}
    given: dict[str, Mapping[str, int]] = {}
    numbers: dict[str, int] | None = None
    if isinstance(heads, Mapping):
        if any(isinstance(value, Mapping) for value in heads.values()):
            if head is not None or not all(isinstance(value, Mapping) for value in heads.values()):
                raise ValueError(
                    "switch_(): expected `heads` to be {domain: number}, or {layer: {domain: number}} without `head`, "
                    f"got {heads!r}."
                )
            given = {layer: value for layer, value in heads.items() if isinstance(value, Mapping)}
        else:
            numbers = _checked_numbers(heads, names)
    elif heads is not True:
        if head is not None:
            raise ValueError("switch_(): expected one of `heads` and `head` to choose the classifier, got both.")
        head = heads
    argument = "heads" if given or head is heads else "head"
    layers = (
        _default(model)
        if not given and head is None
        else _named(model, list(given) if head is None else head, argument)
    )
    chosen: dict[nn.Module, dict[str, int]] = {}
    for name in layers:
        module = model.get_submodule(name)
        if "forward" in module.__dict__:
            refuse_own_forward("switch_", name, module)
        # A layer with two names is one.
        if given:
            classes = _checked_numbers(given[name], names)
        else:
            classes = dict.fromkeys(names, outputs_of(module)) if numbers is None else numbers
        if chosen.setdefault(module, classes) != classes:
            raise ValueError(f"switch_(): expected one number of classes for the layer {name!r}, got two.")
    return chosen
