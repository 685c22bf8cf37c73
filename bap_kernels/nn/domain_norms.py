"""Normalisation layers with one set of parameters and statistics per domain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bap_kernels._warn import warn
from bap_kernels.flow.norms import norm_parts
from bap_kernels.nn.domain_copies import Memos, copies_of, refuse_own_forward
from bap_kernels.nn.mixed import MixedStates
from bap_kernels.nn.per_domain import PerDomain, checked_names

__all__ = ["DomainBatchNorm2d", "DomainNorm"]

_Norm = TypeVar("_Norm", bound="DomainNorm")


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
        memos: Memos | None = None,
    ) -> _Norm:
        """A layer whose domains all start from the parameters and the statistics of ``norm``, as copies.

        Args:
            norm: the layer; its hooks are shared by the copies.
            domains: names of the domains.
            memos: {domain: memo of :func:`copy.deepcopy`}, for layers that share parameters with each other.
        """
        names = checked_names(cls.__name__, domains)
        refuse_own_forward(cls.__name__, "norm", norm)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._hold(copies_of(norm, names, memos))
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
        norm = copies_of(pattern, [name], None)[name]
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
