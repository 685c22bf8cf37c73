"""The channel lists of a whole network for all of its domains, and the file that keeps them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from bap_kernels._masks import Widths, layer_of_key, lists_of_mask, refuse_other_than_masks
from bap_kernels._random_lists import listed_convolutions, random_lists
from bap_kernels._table_file import read_lists, write_lists
from bap_kernels._warn import warn
from bap_kernels._zeros import find_zeros
from bap_kernels.channels import ChannelLists
from bap_kernels.layer_kinds import SwitchedLayer

__all__ = ["ChannelTable"]

_KEYS = ("in_index", "out_index")


def _union(lists: list[Tensor | None]) -> Tensor | None:
    present = [listed.cpu() for listed in lists if listed is not None]
    if len(present) < len(lists):
        return None
    return torch.unique(torch.cat(present))


class ChannelTable(Mapping[str, Mapping[str, ChannelLists]]):
    """Lists of every domain: a mapping {domain: {layer name: ChannelLists}}, in a fixed order of domains.

    A layer that a domain does not name keeps all of its channels there. Tables do not change once made.

    Args:
        domains: the mapping; it is copied.

    Raises:
        TypeError: if it holds anything else than names and :class:`ChannelLists`.

    Examples:
        >>> from bap_kernels import ChannelLists, ChannelTable
        >>> table = ChannelTable({"birds": {"conv1": ChannelLists([0, 2])}, "cars": {"conv1": ChannelLists([1, 2])}})
        >>> list(table)
        ['birds', 'cars']
        >>> table.union()
        {'conv1': ChannelLists(in_index=[0, 1, 2], out_index=None)}
    """

    def __init__(self, domains: Mapping[str, Mapping[str, ChannelLists]]) -> None:
        if not isinstance(domains, Mapping):
            raise TypeError(f"ChannelTable(): expected `domains` to be a mapping, got {type(domains).__name__}.")
        for domain, layers in domains.items():
            if not isinstance(domain, str) or not isinstance(layers, Mapping):
                raise TypeError(
                    "ChannelTable(): expected `domains` to map names to {layer name: ChannelLists}, "
                    f"got {domain!r}: {type(layers).__name__}."
                )
            for layer, lists in layers.items():
                if not isinstance(layer, str) or not isinstance(lists, ChannelLists):
                    raise TypeError(
                        f"ChannelTable(): expected domain {domain!r} to map layer names to ChannelLists, "
                        f"got {layer!r}: {type(lists).__name__}."
                    )
        self._domains = {domain: dict(layers) for domain, layers in domains.items()}
        self._notes: dict[str, dict[str, str]] = {}
        # Of the layers that masks were made for; not saved.
        self._widths: dict[tuple[str, str], Widths] = {}

    @property
    def notes(self) -> dict[str, dict[str, str]]:
        """What was found where the table was derived from weights or masks, {domain: {layer: text}}; not saved."""
        return {domain: dict(notes) for domain, notes in self._notes.items()}

    def __getitem__(self, domain: str) -> Mapping[str, ChannelLists]:
        return self._domains[domain]

    def __iter__(self) -> Iterator[str]:
        return iter(self._domains)

    def __len__(self) -> int:
        return len(self._domains)

    def __repr__(self) -> str:
        return f"ChannelTable(domains={list(self)}, layers={len(self.union())})"

    @classmethod
    def random(
        cls,
        model: nn.Module,
        domains: int | Sequence[str],
        density: float = 0.5,
        seed: int = 0,
        both: bool = False,
        exact: bool = True,
    ) -> ChannelTable:
        """Draws lists for the convolutions of a model; they depend on seed, domain, layer name and width alone.

        Convolutions that read at most four channels read them all; with both lists they still write a part. Depthwise
        convolutions get one list twice, and only with ``both``. Where layers were swapped, only those are drawn for.

        Args:
            model: gives the names and widths of the layers.
            domains: names, or how many ("domain0", "domain1", ...).
            density: kept share of each layer's channels, in [0, 1], rounded; at least one channel is kept.
            seed: chooses the draw.
            both: draw out-lists too.
            exact: keep just that share of each layer. False draws every channel by itself with that probability, so
                that lists have the odd lengths of trained ones: 37 of 64, not 32.

        Raises:
            TypeError: if ``density`` is no number, or ``model`` no network.
            ValueError: if ``density`` is not in [0, 1], there is no domain, or one is named twice.

        Examples:
            >>> from torch import nn
            >>> from bap_kernels import ChannelTable
            >>> ChannelTable.random(nn.Sequential(nn.Conv2d(8, 8, 1)), ["birds"], density=0.5)["birds"]
            {'0': ChannelLists(in_index=[1, 3, 5, 6], out_index=None)}
            >>> ChannelTable.random(nn.Sequential(nn.Conv2d(8, 8, 1)), ["birds"], density=0.5, exact=False)["birds"]
            {'0': ChannelLists(in_index=[0, 1, 2, 3, 5, 6], out_index=None)}
        """
        if not isinstance(density, Real):
            raise TypeError(f"ChannelTable.random(): expected `density` to be a number, got {density!r}.")
        if not 0 <= density <= 1:
            raise ValueError(f"ChannelTable.random(): expected `density` to be in [0, 1], got {density}.")
        return cls(random_lists(model, domains, density, seed, both, exact))

    @classmethod
    def from_switches(cls, model: nn.Module) -> ChannelTable:
        """The channels that a trained model's switches leave on, for every domain, as in-lists.

        Depthwise layers are left out: their results in channels that are off are the bias, which no list expresses.

        Args:
            model: a model with :class:`bap_kernels.nn.SwitchedConv2d` layers, such as :func:`bap_kernels.nn.switch_`
                makes.

        Raises:
            ValueError: if it has none, or they do not all have the same domains.

        Examples:
            >>> import torch
            >>> from torch import nn
            >>> import bap_kernels as bk
            >>> model = bk.nn.switch_(nn.Sequential(nn.Conv2d(4, 8, 3)), ["birds"])
            >>> with torch.no_grad():
            ...     model[0].domains["birds"].score[1] = 0
            >>> bk.ChannelTable.from_switches(model)["birds"]
            {'0': ChannelLists(in_index=[0, 2, 3], out_index=None)}
        """
        modules = model.named_modules(remove_duplicate=False)
        layers = {name: module for name, module in modules if isinstance(module, SwitchedLayer)}
        if not layers:
            raise ValueError(
                "ChannelTable.from_switches(): expected `model` to have switched layers, got none. "
                "Hint: call nn.switch_(model, domains) before training."
            )
        domains: list[list[str]] = [list(module.domains) for module in layers.values()]
        for name, its in zip(layers, domains, strict=True):
            if sorted(its) != sorted(domains[0]):
                raise ValueError(
                    f"ChannelTable.from_switches(): expected all layers to have the domains {domains[0]}, "
                    f"got {its} for {name!r}."
                )
        return cls(
            {
                domain: {name: module.channels(domain) for name, module in layers.items() if module.groups == 1}
                for domain in domains[0]
            }
        )

    @classmethod
    def from_weights(
        cls, model: nn.Module, domain: str = "default", example_input: Tensor | tuple[Any, ...] | None = None
    ) -> ChannelTable:
        """The channels that a network's own zeros leave, as in-lists of one domain.

        A convolution need not read a channel whose slice of its weight is zero, nor one that always arrives as zeros:
        from filters of zeros, through batch norms (a scale of zero included), activations, pooling, sums and
        concatenations. A channel that arrives as another constant, such as the shift of a norm with a scale of zero,
        is read: leaving it out would change the result. Only exact zeros count; :attr:`notes` says where slices are
        nearly zero. So the table changes no result of the network in eval mode, as long as its values are finite.

        Masks of :mod:`torch.nn.utils.prune` count as multiplied in; call ``torch.nn.utils.prune.remove`` on a layer
        before :func:`bap_kernels.swap_`, which leaves layers with hooks as they are. :attr:`notes` says what was found,
        also of subclasses of convolutions, which the table leaves out, since ``swap_`` does not replace them.

        Args:
            model: a network with pruned convolutions, swapped or not. It is not changed.
            domain: the name of the domain.
            example_input: what the model is called with, to follow zeros through it; by default an image is made up,
                and where none fits each layer's own weight counts alone.

        Raises:
            TypeError: for anything else than a network and a name.
            ValueError: if the model has no convolution with weights, holds NaN or infinities in its convolutions and
                batch norms, which lists would hide, or does not take ``example_input``.

        Warns:
            UserWarning: if no layer can leave out any channel; the text says how many single weights are zero.

        Examples:
            >>> import torch
            >>> from torch import nn
            >>> import bap_kernels as bk
            >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 1)).eval()
            >>> with torch.no_grad():
            ...     _ = model[1].weight[2].zero_()
            >>> table = bk.ChannelTable.from_weights(model, example_input=torch.randn(1, 3, 8, 8))
            >>> table["default"]["3"], table.notes["default"]["3"]
            (ChannelLists(in_index=[0, 1, 3], out_index=None), 'reads 3 of 4; other channels that arrive as zeros: 1')
        """
        if not isinstance(domain, str):
            raise TypeError(
                f"ChannelTable.from_weights(): expected `domain` to be a name, got {type(domain).__name__}. Hint: an "
                "example goes into `example_input`."
            )
        zeros = find_zeros("ChannelTable.from_weights", model, example_input)
        table = cls({domain: {name: layer.lists for name, layer in zeros.items() if layer.swappable}})
        table._notes = {domain: {name: layer.note for name, layer in zeros.items()}}
        if all(layer.lists.in_index is None for layer in zeros.values()):
            zero, weights, near = (
                sum(getattr(layer, name) for layer in zeros.values())
                for name in ("zero_weights", "weights", "near_zero")
            )
            small = f", and {near} slices for a channel are nearly zero, which does not count" if near else ""
            warn(
                f"ChannelTable.from_weights(): no channel can be left out of any of {len(zeros)} convolutions; "
                f"{zero / weights:.0%} of their single weights are zero{small}. Hint: whole channels have to be zero, "
                "as structured pruning along dim=1 (input channels) or dim=0 (filters, with their bias and norm) makes "
                "them."
            )
        return table

    @classmethod
    def from_masks(
        cls, masks: Mapping[str, Mapping[str, Any]], both: bool = False, model: nn.Module | None = None
    ) -> ChannelTable:
        """Lists from the masks of other tools, for any number of domains.

        Args:
            masks: {domain: {layer: mask}}; tensors, arrays or sequences of 0 and 1, or of bool. A mask (C_in,) tells
                the channels that the layer reads. A mask of the weight, (C_out, C_in, kH, kW), leaves out the channels
                that no filter reads. Names may end in ``.weight`` or ``.weight_mask``.
            both: whether masks of weights give out-lists too: filters that are masked whole, with their bias. The
                layers must be :class:`bap_kernels.nn.MaskedConv2d` then, unless the network takes compact results.
                Without, masks of filters have no effect: multiply them into the weights and use :meth:`from_weights`,
                which follows them.
            model: if given, layers and shapes of the masks are compared with its convolutions; masks of weights may
                then have axes of length 1. Without, :func:`bap_kernels.attach_` still compares the widths.

        Raises:
            TypeError: for anything that is no mask.
            ValueError: for other shapes, values other than 0 and 1, layers that the model does not have, and channels
                that a layer with groups would have to leave out.

        Warns:
            UserWarning: if masks zero more than the lists leave out, such as single weights or filters, where the
                model's weights are not zero already or no model is given.

        Examples:
            >>> import torch
            >>> from bap_kernels import ChannelTable
            >>> masks = {"birds": {"conv1": [1, 0, 1, 1]}, "cars": {"conv1": torch.ones(2, 4, 3, 3)}}
            >>> table = ChannelTable.from_masks(masks)
            >>> table["birds"], table.notes["cars"]
            ({'conv1': ChannelLists(in_index=[0, 2, 3], out_index=None)}, {'conv1': 'reads 4 of 4'})
        """
        refuse_other_than_masks(masks)
        modules = None if model is None else dict(model.named_modules(remove_duplicate=False))
        domains: dict[str, dict[str, ChannelLists]] = {}
        notes: dict[str, dict[str, str]] = {}
        widths: dict[tuple[str, str], Widths] = {}
        beyond: dict[tuple[str, str], int] = {}
        for domain, layers in masks.items():
            domains[domain], notes[domain] = {}, {}
            for key, mask in layers.items():
                layer = layer_of_key(key)
                if layer in domains[domain]:
                    raise ValueError(
                        f"ChannelTable.from_masks(): expected `masks` to hold one mask for layer {layer!r} in domain "
                        f"{domain!r}, got two."
                    )
                derived = lists_of_mask(domain, layer, mask, both, modules)
                domains[domain][layer], notes[domain][layer] = derived.lists, derived.note
                widths[domain, layer] = derived.widths
                if derived.beyond:
                    beyond[domain, layer] = derived.beyond
        if beyond:
            (domain, layer), count = next(iter(beyond.items()))
            hint = "" if model is not None else ", and give `model`, in which they are looked up"
            warn(
                f"ChannelTable.from_masks(): masks of {len(beyond)} layers also zero numbers that the lists leave in "
                f"use, the first {count} of {layer!r} in domain {domain!r}; results differ from the masked network's "
                f"unless these are zeros in its weights. Hint: multiply the masks in{hint}; `notes` says what has no "
                "effect."
            )
        table = cls(domains)
        table._notes, table._widths = notes, widths
        return table

    def union(self) -> dict[str, ChannelLists]:
        """What any domain uses, {layer name: ChannelLists}: the channels that must be stored.

        A layer that some domain does not name, or lists nothing for, is used whole there.
        """
        names = dict.fromkeys(layer for layers in self.values() for layer in layers)
        dense = ChannelLists()
        merged = {}
        for name in names:
            used = [layers.get(name, dense) for layers in self.values()]
            merged[name] = ChannelLists(*(_union([getattr(lists, key) for lists in used]) for key in _KEYS))
        return merged

    def density(self, model: nn.Module) -> dict[str, tuple[float, float]]:
        """Mean shares of channels read and written, {domain: (in, out)}, over the model's convolutions.

        Args:
            model: gives the layers and their widths; those that a domain does not name count as 1.
        """
        convolutions = listed_convolutions(model)
        dense = ChannelLists()
        shares = {}
        for domain, layers in self.items():
            sums = [0.0, 0.0]
            for name, conv in convolutions.items():
                counts = layers.get(name, dense).counts
                for side, (kept, channels) in enumerate(
                    zip(counts, (conv.in_channels, conv.out_channels), strict=True)
                ):
                    sums[side] += 1.0 if kept is None else kept / channels
            shares[domain] = sums[0] / max(1, len(convolutions)), sums[1] / max(1, len(convolutions))
        return shares

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the table to a safetensors file, whole or not at all.

        Args:
            path: the file; an older one is replaced.
        """
        write_lists(path, self)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ChannelTable:
        """Reads a table that :meth:`save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged, newer than this version, or something else than a channel table.

        Examples:
            >>> import os, tempfile
            >>> from bap_kernels import ChannelLists, ChannelTable
            >>> table = ChannelTable({"birds": {"conv1": ChannelLists([0, 2], [])}})
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     table.save(os.path.join(folder, "table.safetensors"))
            ...     ChannelTable.load(os.path.join(folder, "table.safetensors")) == table
            True
        """
        return cls(read_lists(path))
