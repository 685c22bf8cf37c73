"""Batch norms and classifiers with one set of parameters per domain."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bap_kernels._warn import warn
from bap_kernels.flow.norms import norm_parts
from bap_kernels.nn.mixed import MixedStates
from bap_kernels.nn.per_domain import PerDomain, checked_names
from bap_kernels.nn.replaceable import has_own_forward

__all__ = ["DomainBatchNorm2d", "DomainConv2d", "DomainHead", "DomainLinear", "DomainNorm", "outputs_of"]

_Norm = TypeVar("_Norm", bound="DomainNorm")
_Head = TypeVar("_Head", bound="DomainHead")
# What copy.deepcopy has seen, for each domain.
_Memos = Mapping[str, dict[int, Any]]


def _is_hook_table(key: str, value: Any) -> bool:
    return key.startswith(("_forward", "_backward")) and isinstance(value, dict)


def _copies(module: nn.Module, names: Iterable[str], memos: _Memos | None) -> dict[str, nn.Module]:
    """A copy of a module for every domain; what one memo has seen, such as a shared parameter, is copied once."""
    # Hooks are not copied: whoever registered them sees every domain, and can still remove them.
    hooks = [value for part in module.modules() for key, value in part.__dict__.items() if _is_hook_table(key, value)]
    copies = {}
    for name in names:
        memo = {} if memos is None else memos[name]
        memo.update({id(table): table for table in hooks})
        copies[name] = copy.deepcopy(module, memo)
    return copies


def _refuse_own_forward(where: str, argument: str, layer: nn.Module) -> None:
    if has_own_forward(layer):
        raise NotImplementedError(
            f"{where}(): expected `{argument}` to have the forward of its class, got a {type(layer).__name__} on which "
            "another one was set: it would go on calling the layer it was made for. Hint: remove it first."
        )


def _reset(norm: nn.Module) -> None:
    """Gives a norm the values of a new one."""
    for module in norm.modules():
        reset = getattr(module, "reset_parameters", getattr(module, "reset_running_stats", None))
        if callable(reset):
            reset()
    for name, value in [*norm._parameters.items(), *norm._buffers.items()]:
        if value is not None and name in ("weight", "bias", "running_mean", "running_var"):
            nn.init.constant_(value, 1.0 if name in ("weight", "running_var") else 0.0)


def _counts_alike(norm: nn.Module) -> bool:
    return norm.__dict__.get("momentum", 0.0) is None


def _is_new(norm: nn.Module) -> bool:
    batches = norm._buffers.get("num_batches_tracked")
    return _counts_alike(norm) and batches is not None and not batches.is_meta and int(batches) == 0


class DomainNorm(PerDomain):
    """One normalisation layer of any class for every domain, such as :class:`torch.nn.BatchNorm1d` or a subclass.

    :func:`bap_kernels.nn.switch_` makes it of layers with running statistics. :attr:`domains` holds one module per
    domain, and a call is one of the active module. The state of the layer it was made from loads too, also strictly:
    every domain then starts from it, unless the file has values for that domain.

    Raises:
        NotImplementedError: if a ``forward`` of its own was set on the layer, which copies would share.
        RuntimeError: when called before a domain was chosen.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import bap_kernels as bk
        >>> norm = bk.nn.DomainNorm.from_norm(nn.BatchNorm1d(4), ["birds", "cars"])
        >>> norm.set_domain("cars")
        >>> norm(torch.randn(8, 4)).shape
        torch.Size([8, 4])
    """

    @classmethod
    def from_norm(
        cls: type[_Norm],
        norm: nn.Module,
        domains: Iterable[str],
        memos: _Memos | None = None,
    ) -> _Norm:
        """A layer whose domains all start from the parameters and the statistics of ``norm``, as copies.

        Args:
            norm: the layer; its hooks are shared by the copies.
            domains: names of the domains.
            memos: {domain: memo of :func:`copy.deepcopy`}, for layers that share parameters with each other.
        """
        names = checked_names(cls.__name__, domains)
        _refuse_own_forward(cls.__name__, "norm", norm)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._hold(_copies(norm, names, memos))
        layer.training = layer.domains.training = norm.training
        return layer

    def _hold(self, modules: Mapping[str, nn.Module]) -> None:
        super()._hold(modules)
        # Whether every batch counts alike, as it does while a tool computes statistics anew.
        self.__dict__["_counts_alike"] = any(_counts_alike(norm) for norm in modules.values())

    def _forward_in(self, input: Tensor) -> Tensor:
        norm = self._current()
        if self.training and not torch.compiler.is_compiling() and _counts_alike(norm):
            self._warn_if_reset(norm)
        return norm(input)

    def _warn_if_reset(self, active: nn.Module) -> None:
        """Warns where the statistics of all domains were reset and those of one are being computed."""
        others = [name for name, norm in self.domains.items() if norm is not active and _is_new(norm)]
        if others and not self.__dict__.get("_counts_alike", True):
            warn(
                f"{type(self).__name__}(): the statistics of the domains {others} were reset, and those of "
                f"{self.domain!r} alone are computed, as torch.optim.swa_utils.update_bn does. "
                "Hint: load them again, and call bap_kernels.nn.recalibrate_bn(model, loader, domain) for every domain."
            )

    def add_domain(self, name: str, like: str | None = None) -> None:
        """Adds a domain; the others stay as they are.

        Args:
            name: the new domain.
            like: the domain to copy parameters and statistics from; None starts as a new layer does.
        """
        pattern = self._module_of(next(iter(self.domains)) if like is None else like)
        norm = _copies(pattern, [name], None)[name]
        if like is None:
            _reset(norm)
        self._add(name, norm)


class DomainBatchNorm2d(DomainNorm):
    """:class:`torch.nn.BatchNorm2d` with weight, bias and running statistics of its own for every domain.

    :attr:`domains` holds one :class:`torch.nn.BatchNorm2d` per domain, or whatever batch norm of images the layer was
    made from: SyncBatchNorm, FrozenBatchNorm2d, one with an activation, a subclass. The state of a dense batch norm
    loads too, also strictly: every domain then starts from it, unless the file has values for that domain.

    Args:
        num_features: C.
        domains: names of the domains.
        eps, momentum, affine, track_running_stats, device, dtype: as in :class:`torch.nn.BatchNorm2d`.

    Shape:
        - Input: (N, C, H, W)
        - Output: (N, C, H, W)

    Raises:
        ValueError: for names of domains that are empty, have dots or repeat.
        RuntimeError: when called before a domain was chosen.

    Examples:
        >>> import torch
        >>> import bap_kernels as bk
        >>> norm = bk.nn.DomainBatchNorm2d(4, ["birds", "cars"])
        >>> norm.set_domain("cars")
        >>> y = norm(torch.randn(2, 4, 5, 5) + 3)
        >>> norm.domains["birds"].running_mean
        tensor([0., 0., 0., 0.])
        >>> bool((norm.domains["cars"].running_mean > 0.2).all())
        True
    """

    def __init__(
        self,
        num_features: int,
        domains: Iterable[str],
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self._hold(
            {
                name: nn.BatchNorm2d(num_features, eps, momentum, affine, track_running_stats, **options)
                for name in checked_names(type(self).__name__, domains)
            }
        )

    @classmethod
    def from_batch_norm2d(cls, norm: nn.Module, domains: Iterable[str]) -> DomainBatchNorm2d:
        """A layer whose domains all start from the affine parameters and the statistics of ``norm``, as copies.

        Examples:
            >>> from torch import nn
            >>> import bap_kernels as bk
            >>> norm = bk.nn.DomainBatchNorm2d.from_batch_norm2d(nn.BatchNorm2d(4, momentum=0.2), ["birds"])
            >>> norm.domains["birds"].momentum
            0.2
        """
        return cls.from_norm(norm, domains)

    def _forward_mixed(self, input: Tensor, mixed: MixedStates) -> Tensor:
        known = [norm_parts(norm) for norm in mixed.states]
        parts = [norm for norm in known if norm is not None and norm.has_statistics and not norm.after]
        fixed = len(parts) == len(known) and all(norm.fixed or not norm.module.training for norm in parts)
        hooked = any(norm._forward_hooks or norm._forward_pre_hooks for norm in mixed.states)
        if not fixed or hooked or torch.is_autocast_enabled(input.device.type):
            return super()._forward_mixed(input, mixed)
        mixed.batch.check(self, input, 4)
        # One scale and one shift for each sample and channel: a single pass over the batch.
        scales, shifts = zip(*(norm.scale_and_shift() for norm in parts), strict=True)
        domain_index = mixed.batch.on("domain_index", input.device)
        scale, shift = (
            torch.stack(rows).index_select(0, domain_index)[:, :, None, None].to(input.dtype)
            for rows in (scales, shifts)
        )
        return torch.addcmul(shift, input, scale)


def _resized(where: str, layer: nn.Module, size: int) -> nn.Module:
    """A new layer like a linear layer or a convolution, for another number of outputs."""
    weight = layer._parameters.get("weight")
    has_bias = layer._parameters.get("bias") is not None
    options: dict[str, Any] = {"bias": has_bias}
    if weight is not None:
        options.update(device=weight.device, dtype=weight.dtype)
    new: nn.Module
    if isinstance(layer, nn.Linear):
        new = nn.Linear(layer.in_features, size, **options)
    else:
        assert isinstance(layer, nn.Conv2d)
        shape = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        new = nn.Conv2d(layer.in_channels, size, *shape, padding_mode=layer.padding_mode, **options)  # type: ignore[arg-type]
    if type(layer).forward is not type(new).forward:
        # The class's own forward knows no number of outputs but those that every such layer has.
        if weight is None or not layer.__dict__.keys() <= new.__dict__.keys() | {"_domain_name"}:
            raise NotImplementedError(
                f"{where}(): expected a plain {type(new).__name__} for a domain with another number of outputs, got a "
                f"{type(layer).__name__}, which may compute something else. Hint: make the domain's layer by hand."
            )
        new.__class__ = type(layer)
    elif weight is None:
        raise NotImplementedError(
            f"{where}(): expected a weight that is a parameter for a domain with another number of outputs, got a "
            f"{type(layer).__name__} whose weight is computed. Hint: make the domain's layer by hand."
        )
    for key, value in layer.__dict__.items():
        if _is_hook_table(key, value):
            new.__dict__[key] = value
    return new.train(layer.training)


def outputs_of(layer: nn.Module) -> int:
    """The number of outputs of a linear layer or a convolution."""
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)  # type: ignore[arg-type]


class DomainHead(PerDomain):
    """Base of the classifiers with one layer per domain."""

    # Of the result: axes after that of the classes, and axes of an input; None takes any.
    _trailing_axes = 0
    _input_axes: int | None = None

    @classmethod
    def _from_layer(cls: type[_Head], argument: str, layer: nn.Module, sizes: Mapping[str, int]) -> _Head:
        """A layer whose domains start from a copy of ``layer`` where they have as many outputs, else at random."""
        _refuse_own_forward(cls.__name__, argument, layer)
        names = checked_names(cls.__name__, sizes)
        copies = _copies(layer, [name for name in names if sizes[name] == outputs_of(layer)], None)
        head = cls.__new__(cls)
        nn.Module.__init__(head)
        head._hold({name: copies.get(name) or _resized(cls.__name__, layer, sizes[name]) for name in names})
        head.training = head.domains.training = layer.training
        return head

    def add_domain(self, name: str, size: int) -> None:
        """Adds a domain with new parameters and ``size`` outputs; the others stay as they are."""
        self._add(name, _resized(type(self).__name__, next(iter(self.domains.values())), size))

    def _forward_mixed(self, input: Tensor, mixed: MixedStates) -> Tensor:
        most = max(outputs_of(layer) for layer in mixed.states)

        def padded(samples: Tensor, layer: nn.Module) -> Tensor:
            # -inf is no probability and never the largest: softmax and argmax are each domain's own.
            missing = (0, 0) * self._trailing_axes + (0, most - outputs_of(layer))
            return F.pad(layer(samples), missing, value=-torch.inf)

        return mixed.apply(self, input, padded, self._input_axes)

    def _dense_values(self, module: nn.Module, dense: dict[str, Any]) -> dict[str, Any]:
        weight = module._parameters.get("weight")
        if weight is None or "weight" not in dense or dense["weight"].shape == weight.shape:
            return dense
        # A classifier for other classes: the domain keeps what it has. Without values its keys count as missing.
        return {} if weight.is_meta else module.state_dict()


class DomainLinear(DomainHead):
    """:class:`torch.nn.Linear` with weight, bias and number of outputs of its own for every domain.

    :attr:`domains` holds one :class:`torch.nn.Linear` per domain. The state of a dense layer loads too, also strictly:
    it becomes that of every domain with as many outputs, unless the file has values for that domain.

    Args:
        in_features: size of the last axis of the input.
        out_features: {domain: size of the last axis of the output}.
        bias, device, dtype: as in :class:`torch.nn.Linear`.

    Shape:
        - Input: (..., in_features)
        - Output: (..., out_features of the active domain); of a mixed batch (N, ..., the largest out_features in it)

    Raises:
        ValueError: for names of domains that are empty, have dots or repeat.
        RuntimeError: when called before a domain was chosen.

    Examples:
        >>> import torch
        >>> import bap_kernels as bk
        >>> head = bk.nn.DomainLinear(16, {"birds": 200, "cars": 196})
        >>> head.set_domain("cars")
        >>> head(torch.randn(2, 16)).shape
        torch.Size([2, 196])
    """

    def __init__(
        self,
        in_features: int,
        out_features: Mapping[str, int],
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        names = checked_names(type(self).__name__, out_features)
        self._hold(
            {
                name: nn.Linear(in_features, size, bias, device=device, dtype=dtype)
                for name, size in zip(names, out_features.values(), strict=True)
            }
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, out_features: Mapping[str, int]) -> DomainLinear:
        """A layer whose domains start from a copy of ``linear`` where they have as many outputs, else at random.

        Args:
            linear: gives the input's size, bias or none, device and dtype; a subclass too. Its hooks are shared.
            out_features: {domain: number of outputs}.

        Raises:
            NotImplementedError: for other numbers of outputs of a subclass with a forward of its own, and of a layer
                whose weight is computed.

        Examples:
            >>> from torch import nn
            >>> import bap_kernels as bk
            >>> dense = nn.Linear(16, 1000)
            >>> head = bk.nn.DomainLinear.from_linear(dense, {"imagenet": 1000, "cars": 196})
            >>> bool((head.domains["imagenet"].weight == dense.weight).all())
            True
        """
        head = cls._from_layer("linear", linear, out_features)
        head.in_features = linear.in_features
        return head

    def add_domain(self, name: str, out_features: int) -> None:
        """Adds a domain with new parameters; the others stay as they are.

        Args:
            name: the new domain.
            out_features: its number of outputs.
        """
        super().add_domain(name, out_features)


class DomainConv2d(DomainHead):
    """:class:`torch.nn.Conv2d` with weight, bias and number of output channels of its own for every domain.

    It is a classifier of pixels, or one before a mean over them. :attr:`domains` holds one :class:`torch.nn.Conv2d` per
    domain. The state of a dense layer loads too, also strictly: it becomes that of every domain with as many outputs,
    unless the file has values for that domain.

    Shape:
        - Input: (N, C_in, H, W)
        - Output: (N, C_out of the active domain, oH, oW); of a mixed batch (N, the largest C_out in it, oH, oW)

    Raises:
        RuntimeError: when called before a domain was chosen.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import bap_kernels as bk
        >>> head = bk.nn.DomainConv2d.from_conv2d(nn.Conv2d(16, 21, 1), {"voc": 21, "city": 19})
        >>> head.set_domain("city")
        >>> head(torch.randn(2, 16, 4, 4)).shape
        torch.Size([2, 19, 4, 4])
    """

    _trailing_axes = 2
    _input_axes = 4

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, out_channels: Mapping[str, int]) -> DomainConv2d:
        """A layer whose domains start from a copy of ``conv`` where they have as many outputs, else at random.

        Args:
            conv: gives everything but the number of outputs; its hooks are shared.
            out_channels: {domain: number of outputs}.

        Raises:
            NotImplementedError: for other numbers of outputs with groups, and of a layer whose weight is computed.
        """
        if conv.groups != 1:
            raise NotImplementedError(f"{cls.__name__}.from_conv2d(): expected groups=1, got groups={conv.groups}.")
        return cls._from_layer("conv", conv, out_channels)

    def add_domain(self, name: str, out_channels: int) -> None:
        """Adds a domain with new parameters; the others stay as they are.

        Args:
            name: the new domain.
            out_channels: its number of outputs.
        """
        super().add_domain(name, out_channels)
