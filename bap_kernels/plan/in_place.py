"""What `prune_unused_` and `order_channels_`, which change a model in place, have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from bap_kernels.channels import ChannelLists
from bap_kernels.flow.graph import Channels
from bap_kernels.layer_kinds import DomainLayer
from bap_kernels.nn.conv import GatheredConv2d, MaskedConv2d
from bap_kernels.nn.per_domain import domain_layers
from bap_kernels.nn.switched import SwitchedConv2d
from bap_kernels.table import ChannelTable

__all__ = ["check_and_list_domains", "renumber_lists_", "table_of"]


def check_and_list_domains(op: str, model: nn.Module) -> list[str | None]:
    """The domains of a model whose channels can be dropped or moved in place; [None] if it has none.

    Args:
        op: the caller's name, for messages.
        model: a swapped network.

    Raises:
        ValueError: if no layer was swapped, a mixed batch is set, or layers have other domains than the lists.
        NotImplementedError: for out-lists in layers whose result is compact, for parameters in two layers, and for
            switched layers.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, GatheredConv2d)}
    if not layers:
        raise ValueError(f"{op}(): expected `model` to have swapped layers, got none. Hint: call swap_ first.")
    if any(isinstance(module, DomainLayer) and module._mixed is not None for module in model.modules()):
        raise ValueError(
            f"{op}(): expected `model` to be set to one domain, got a mixed batch. Hint: call set_domain with a name."
        )
    for name, layer in layers.items():
        compact = not isinstance(layer, MaskedConv2d)
        if compact and any(lists.out_index is not None for lists in (layer.channels, *layer.lists.values())):
            raise NotImplementedError(
                f"{op}(): expected out-lists only in MaskedConv2d, got layer {name!r}, whose result has "
                "another width in each domain. Hint: swap_(model, layer_type=MaskedConv2d)."
            )
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None and owners.setdefault(id(parameter), name) != name:
                raise NotImplementedError(
                    f"{op}(): expected each parameter in one layer, got one in {owners[id(parameter)]!r} "
                    f"and in {name!r}."
                )
    domains = list(dict.fromkeys(domain for layer in layers.values() for domain in layer.lists))
    for name, owner in domain_layers(model):
        if isinstance(owner, SwitchedConv2d):
            raise NotImplementedError(
                f"{op}(): expected layers with fixed lists, got the switched layer {name!r}. "
                "Hint: call swap_, which gives it the lists of its switches."
            )
    for name, owner in domain_layers(model):
        if set(owner.domains) != set(domains):
            raise ValueError(
                f"{op}(): expected layer {name!r} to have the lists' domains {domains}, got {list(owner.domains)}."
            )
    return [*domains] or [None]


def renumber_lists_(
    conv: GatheredConv2d, reads: Callable[[Channels], Channels], writes: Callable[[Channels], Channels]
) -> None:
    """Renumbers all in-lists of a layer by one function and its out-lists by another."""

    def renumbered(lists: ChannelLists) -> ChannelLists:
        pairs = zip(lists._host, (reads, writes), strict=True)
        new = (None if listed is None else function(listed) for listed, function in pairs)
        return ChannelLists(*new).to(conv.weight.device)

    conv._map_lists(renumbered)


def table_of(model: nn.Module, domains: Iterable[str | None]) -> ChannelTable:
    """The lists that the layers of a model hold for these domains."""
    layers = {n: module for n, module in model.named_modules() if isinstance(module, GatheredConv2d) and module.lists}
    return ChannelTable(
        {name: {n: layer.lists[name] for n, layer in layers.items()} for name in domains if name is not None}
    )
