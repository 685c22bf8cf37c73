"""The batch norms that are known: what each holds, and what its forward applies after it.

Every part of the package that looks into a batch norm asks here. Classes of torchvision and timm are told by their
module and name, so that neither has to be installed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

__all__ = ["NormParts", "depends_on_data", "folded_norm", "is_norm", "norm_parts", "unknown_norm_reason"]

_TIMM = "timm.layers.norm_act"
# {(module, class): (whether statistics stay as they are in training, names of what is applied afterwards)}
_KNOWN: dict[tuple[str, str], tuple[bool, tuple[str, ...]]] = {
    ("torch.nn.modules.batchnorm", "BatchNorm2d"): (False, ()),
    ("torch.nn.modules.batchnorm", "SyncBatchNorm"): (False, ()),
    # Those that torch's own classes for images derive from: other libraries undo SyncBatchNorm to one of their own.
    ("torch.nn.modules.batchnorm", "_BatchNorm"): (False, ()),
    ("torchvision.ops.misc", "FrozenBatchNorm2d"): (True, ()),
    (_TIMM, "BatchNormAct2d"): (False, ("drop", "act")),
    (_TIMM, "SyncBatchNormAct"): (False, ("drop", "act")),
    (_TIMM, "FrozenBatchNormAct2d"): (True, ("drop", "act")),
}
# What decides the result of a call: a subclass that replaces one of these computes something else.
_DECIDING = ("forward", "__call__", "_check_input_dim")
_TENSORS = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class NormParts:
    """What a batch norm over the channels of (N, C, H, W) is made of.

    In eval mode, or always where :attr:`fixed`, it computes
    ``after((x - running_mean) / sqrt(running_var + eps) * weight + bias)``.

    Attributes:
        module: the batch norm.
        weight, bias: (C,), parameters or buffers; None stands for ones and zeros.
        running_mean, running_var: (C,), buffers; None where every batch has its own statistics.
        eps: added to the variance.
        fixed: whether it uses the running statistics in training mode too.
        after: modules that are applied to the result, in this order, such as an activation; identities are left out.
    """

    module: nn.Module
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    eps: float
    fixed: bool
    after: tuple[nn.Module, ...]

    @property
    def channels(self) -> int | None:
        """C; None for a norm without any tensor."""
        return next((len(value) for value in (self.running_mean, self.weight) if value is not None), None)

    @property
    def has_statistics(self) -> bool:
        """Whether there are running statistics, without which the norm is no scale and shift in eval mode either."""
        return self.running_mean is not None and self.running_var is not None

    def scale_and_shift(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """The norm with its running statistics as ``scale * x + shift``, (C,) each, without :attr:`after`.

        Args:
            dtype: in which both are computed; None: that of the tensors.
        """
        assert self.running_mean is not None
        assert self.running_var is not None
        scale = torch.rsqrt(self.running_var.to(dtype=dtype) + self.eps)
        if self.weight is not None:
            scale = scale * self.weight.to(dtype=dtype)
        shift = -self.running_mean.to(dtype=dtype) * scale
        return scale, shift if self.bias is None else shift + self.bias.to(dtype=dtype)

    def plain(self) -> nn.BatchNorm2d:
        """A :class:`torch.nn.BatchNorm2d` in eval mode that shares the tensors, for code that wants that class.

        Raises:
            ValueError: for a norm without running statistics.
        """
        if self.running_mean is None or self.running_var is None:
            raise ValueError("NormParts.plain(): expected a norm with running statistics, got one without.")
        # Made on the meta device: every tensor is replaced.
        norm = nn.BatchNorm2d(len(self.running_mean), self.eps, affine=self.weight is not None, device="meta")
        for name in ("weight", "bias"):
            value = getattr(self, name)
            given = value is None or isinstance(value, nn.Parameter)
            norm._parameters[name] = value if given else nn.Parameter(value, requires_grad=False)
        norm._buffers.update(running_mean=self.running_mean, running_var=self.running_var)
        norm._buffers["num_batches_tracked"] = torch.zeros((), dtype=torch.long, device=self.running_mean.device)
        return norm.eval()

    def __call__(self, input: Tensor) -> Tensor:
        """Applies the norm with its running statistics, and what follows it."""
        result = F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, not self.has_statistics, 0.0, self.eps
        )
        for module in self.after:
            result = module(result)
        return result


def _known_class(module: nn.Module) -> tuple[type, bool, tuple[str, ...]] | None:
    for cls in type(module).__mro__:
        known = _KNOWN.get((cls.__module__, cls.__name__))
        if known is not None:
            return (cls, *known)
        if cls.__module__ == _BatchNorm.__module__:
            return None  # torch's own for other inputs than images
    return None


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation with parameters or statistics, known or not.

    Those are PyTorch's, and whatever holds running statistics.
    """
    return isinstance(module, (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)) or depends_on_data(module)


def depends_on_data(module: nn.Module) -> bool:
    """Whether a module normalises by statistics of the data, which differ between domains: any batch norm.

    Besides PyTorch's it is every module that holds a running mean or variance.
    """
    held = (module._buffers.get(name) for name in ("running_mean", "running_var"))
    return isinstance(module, _BatchNorm) or any(value is not None for value in held)


def unknown_norm_reason(module: nn.Module) -> str | None:
    """Why :func:`norm_parts` does not know a module; None if it does.

    Examples:
        >>> from torch import nn
        >>> from bap_kernels.flow.norms import unknown_norm_reason
        >>> unknown_norm_reason(nn.GroupNorm(2, 4))
        'GroupNorm is no batch norm of images'
    """
    name = type(module).__name__
    entry = _known_class(module)
    if entry is None:
        return f"{name} is no batch norm of images" if isinstance(module, nn.Module) else f"{name} is no module"
    known, _, after = entry
    if "forward" in module.__dict__:
        return f"a forward of its own was set on this {name}"
    if nn.utils.parametrize.is_parametrized(module):
        return "its parameters are parametrized: torch.nn.utils.parametrize.remove_parametrizations first"
    # Looked up on the classes: functions, and not methods bound to an object.
    # The base class leaves the check of the input's axes to others.
    deciding = _DECIDING[:-1] if known is _BatchNorm else _DECIDING
    if any(getattr(type(module), attribute, None) is not getattr(known, attribute, None) for attribute in deciding):
        return f"{name} is a subclass of {known.__name__} and may compute something else"
    for attribute in _TENSORS:
        if attribute not in module._parameters and attribute not in module._buffers:
            return f"its {attribute} is neither a parameter nor a buffer: a hook or the class computes it"
    for attribute in after:
        # SyncBatchNormAct gets what follows only when it is made from another layer.
        inner = module._modules.get(attribute, nn.Identity() if known.__name__ == "SyncBatchNormAct" else None)
        if inner is None:
            return f"it has no module {attribute!r}, which {known.__name__} applies"
    return None


def norm_parts(module: nn.Module) -> NormParts | None:
    """What a batch norm is made of; None for any module that is not known to be one.

    Known are :class:`torch.nn.BatchNorm2d`, :class:`torch.nn.SyncBatchNorm`, what other libraries make of the latter by
    deriving from torch's base class, :class:`torchvision.ops.FrozenBatchNorm2d`, timm's ``BatchNormAct2d``,
    ``SyncBatchNormAct`` and ``FrozenBatchNormAct2d``, and subclasses of them that leave the computation alone. Hooks
    are left to the caller.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from bap_kernels.flow.norms import norm_parts
        >>> norm = nn.BatchNorm2d(4).eval()
        >>> norm_parts(norm).weight is norm.weight, norm_parts(norm).after
        (True, ())
        >>> norm_parts(nn.GroupNorm(2, 4)) is None
        True
    """
    if unknown_norm_reason(module) is not None:
        return None
    entry = _known_class(module)
    assert entry is not None
    _, fixed, after = entry
    inner = [module._modules.get(name) for name in after]
    weight, bias, running_mean, running_var = (getattr(module, name) for name in _TENSORS)
    return NormParts(
        module=module,
        weight=weight,
        bias=bias,
        running_mean=running_mean,
        running_var=running_var,
        eps=float(module.eps),  # type: ignore[arg-type]
        fixed=fixed,
        after=tuple(layer for layer in inner if layer is not None and type(layer) is not nn.Identity),
    )


def folded_norm(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """A known batch norm in eval mode as y = scale * x + shift; two (C,) float64 tensors without a gradient."""
    parts = norm_parts(norm)
    assert parts is not None
    with torch.no_grad():
        return parts.scale_and_shift(torch.float64)
