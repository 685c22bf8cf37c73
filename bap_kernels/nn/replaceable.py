"""Which convolutions a layer of this package may take the place of, and why others not."""

from __future__ import annotations

from torch import nn

from bap_kernels.nn.recompute import RecomputedForward

__all__ = ["OWN_FORWARD", "has_own_forward", "refuse_own_forward", "unsupported_groups_reason", "unsupported_reason"]

# What a subclass may define and still be a plain convolution: how it is made and shown, and what Python itself adds.
# fmt: off
_OF_NO_EFFECT = frozenset({
    "__init__", "extra_repr", "__repr__", "reset_parameters", "__module__", "__qualname__", "__doc__",
    "__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__", "__constants__",
    "__firstlineno__", "__static_attributes__", "__parameters__", "__orig_bases__", "__type_params__", "__dict__",
    "__weakref__", "__slots__", "__abstractmethods__", "_abc_impl",
})
# fmt: on
# The reason that swap_ and switch_ do not pass over.
OWN_FORWARD = "another forward was set on it, which would go on calling the layer it was made for"


def unsupported_groups_reason(in_channels: int, out_channels: int, groups: int) -> str | None:
    """Why a convolution with these groups is not supported; None if it is."""
    if groups == 1 or groups == in_channels == out_channels:
        return None
    text = f"groups={groups} with {in_channels} -> {out_channels} channels"
    return f"{text}: only 1 and depthwise (C_in == C_out) are supported"


def _bad_options_reason(conv: nn.Conv2d) -> str | None:
    """Why a convolution with these options has no result; PyTorch's own raises when it is called."""
    for name in ("kernel_size", "stride", "padding", "dilation"):
        value = getattr(conv, name)
        if not isinstance(value, (int, str)) and len(value) != 2:
            return f"its {name} is {tuple(value)}, not a pair"
    return None


def has_own_forward(module: nn.Module) -> bool:
    """Whether a forward was set on a module, as wrappers do (accelerate's hooks), which its class does not know.

    Such a function goes on calling the module that it was made for. That of :func:`bap_kernels.nn.recompute_` does not
    count: it can be made again.
    """
    own = module.__dict__.get("forward")
    if isinstance(own, RecomputedForward):
        own = own.own
    return own is not None or "_conv_forward" in module.__dict__


def refuse_own_forward(where: str, name: str, module: nn.Module) -> None:
    """Raises NotImplementedError for a layer with a forward of its own."""
    raise NotImplementedError(
        f"{where}(): expected the layers of `model` to have the forward of their class, got {name!r}, a "
        f"{type(module).__name__} on which another one was set: it would go on calling the layer it was made for. "
        "Hint: take the wrapper off first and put it on again afterwards, or leave the layer out by `filter_fn`."
    )


def _names_of_its_own(kind: type[nn.Conv2d]) -> list[str]:
    """What a subclass defines that may change a call, or that other code may use, which a swapped layer would lack."""
    added = [cls for cls in kind.__mro__ if cls not in nn.Conv2d.__mro__]
    return list(dict.fromkeys(name for cls in added for name in vars(cls) if name not in _OF_NO_EFFECT))


def unsupported_reason(conv: nn.Module) -> str | None:
    """Why a module cannot become a gathered layer; None if it can.

    Examples:
        >>> from torch import nn
        >>> from bap_kernels.nn.replaceable import unsupported_reason
        >>> unsupported_reason(nn.Conv2d(8, 8, 3, groups=2))
        'groups=2 with 8 -> 8 channels: only 1 and depthwise (C_in == C_out) are supported'
    """
    if not isinstance(conv, nn.Conv2d):
        return f"{type(conv).__name__} is no torch.nn.Conv2d"
    if nn.utils.parametrize.is_parametrized(conv):
        return "its parameters are parametrized: torch.nn.utils.parametrize.remove_parametrizations first"
    own = [] if "_computes_conv2d" in vars(type(conv)) else _names_of_its_own(type(conv))
    if own:
        return (
            f"{type(conv).__name__} is a subclass of torch.nn.Conv2d with its own {', '.join(own[:3])}"
            f"{', ...' * (len(own) > 3)}, and may compute something else (if not, set the layer's __class__ to "
            "torch.nn.Conv2d)"
        )
    if conv._parameters.get("weight") is None:
        return "its weight is computed by a hook: remove weight_norm, spectral_norm or torch.nn.utils.prune first"
    reason = unsupported_groups_reason(conv.in_channels, conv.out_channels, conv.groups) or _bad_options_reason(conv)
    return OWN_FORWARD if reason is None and has_own_forward(conv) else reason
