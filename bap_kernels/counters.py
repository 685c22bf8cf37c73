"""Operation counts for the tools of others, which know PyTorch's own layers only. None of them is imported here.

:class:`torch.utils.flop_counter.FlopCounterMode` needs nothing. For ptflops, Torch-Pruning and fvcore::

    ptflops.get_model_complexity_info(model, (3, 224, 224), backend="pytorch",
                                      custom_modules_hooks=bap_kernels.counters.module_hooks())

    torch_pruning.utils.op_counter.MODULES_MAPPING.update(bap_kernels.counters.module_hooks())
    torch_pruning.utils.count_ops_and_params(model, example_inputs)

    fvcore.nn.FlopCountAnalysis(model, inputs).set_op_handle(**bap_kernels.counters.fvcore_handles())

All three count one for a product and a sum, of the channels that the active domain keeps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from bap_kernels.channels import ChannelLists
from bap_kernels.layer_kinds import DomainLayer
from bap_kernels.nn.channel_switch import ChannelSwitch
from bap_kernels.nn.conv import GatheredConv2d, MaskedConv2d
from bap_kernels.nn.switched import SwitchedConv2d

__all__ = ["fvcore_handles", "layer_macs", "module_hooks"]


def _per_image(layer: nn.Conv2d, lists: ChannelLists) -> int:
    """(outputs, products for each) as one number for every place of the result."""
    K_in, K_out = lists.counts
    if layer.groups != 1:
        listed = K_out if K_in is None else K_in
        return layer.out_channels if listed is None else listed
    return (layer.in_channels if K_in is None else K_in) * (layer.out_channels if K_out is None else K_out)


def _lists_of(state: Any) -> ChannelLists:
    if isinstance(state, ChannelSwitch):
        return state.channels()
    return ChannelLists() if state is None else state


def layer_macs(layer: nn.Conv2d, input: Tensor, output: Tensor) -> int:
    """Multiply-accumulates of one call of a layer of this package, without the bias.

    Args:
        layer: a :class:`~bap_kernels.nn.GatheredConv2d` or :class:`~bap_kernels.nn.SwitchedConv2d`.
        input, output: what it was called with and what it gave.

    Examples:
        >>> import torch, bap_kernels as bk
        >>> from bap_kernels.counters import layer_macs
        >>> layer = bk.nn.GatheredConv2d(8, 4, 3, channels=bk.ChannelLists([0, 5]))
        >>> x = torch.randn(1, 8, 5, 5)
        >>> layer_macs(layer, x, layer(x))  # 3 x 3 places, 3 x 3 taps, 2 channels read, 4 written
        648
    """
    assert isinstance(layer, DomainLayer)
    mixed = layer._mixed
    if mixed is not None:
        images = sum(
            count * _per_image(layer, _lists_of(state))
            for count, state in zip(mixed.batch.counts, mixed.states, strict=True)
        )
    else:
        active = _lists_of(layer._state)
        images = (input.shape[0] if input.dim() == 4 else 1) * _per_image(layer, active)
    return images * math.prod(layer.kernel_size) * math.prod(output.shape[-2:])


def _count(layer: Any, inputs: Any, output: Tensor) -> None:
    bias = 0 if layer.bias is None else output.numel()
    layer.__flops__ += layer_macs(layer, inputs[0], output) + bias


def module_hooks() -> dict[type[nn.Module], Callable[[Any, Any, Tensor], None]]:
    """Counting hooks of layers, {class: hook}, for ptflops and Torch-Pruning; the module's docstring shows how."""
    return dict.fromkeys((GatheredConv2d, MaskedConv2d, SwitchedConv2d), _count)


def _shape(value: Any) -> list[int] | None:
    """The shape of a value of a traced graph; None for no tensor."""
    return value.type().sizes() if value.isCompleteTensor() else None


def _gathered(inputs: Any, outputs: Any) -> int:
    N, K_out, oH, oW = _shape(outputs[0])  # type: ignore[misc]
    _, C_in, kH, kW = _shape(inputs[1])  # type: ignore[misc]
    listed = _shape(inputs[3])
    # The weight of a depthwise layer has one channel.
    kept = C_in if listed is None or int(inputs[8].toIValue()) != 1 else listed[0]
    return N * K_out * oH * oW * kH * kW * kept


def _switched(inputs: Any, outputs: Any) -> int:
    # The switches are computed, and have no values in a graph: all channels count.
    N, C_out, oH, oW = _shape(outputs[0])  # type: ignore[misc]
    _, C_in, kH, kW = _shape(inputs[1])  # type: ignore[misc]
    return N * C_out * oH * oW * kH * kW * C_in


def fvcore_handles() -> dict[str, Callable[[Any, Any], int]]:
    """Handles of operators for ``fvcore.nn.FlopCountAnalysis.set_op_handle(**handles)``.

    A mixed batch is not counted: set a domain by its name. In training mode switches count as all on.
    """
    return {"bap_kernels::gathered_conv2d": _gathered, "bap_kernels::switched_conv2d": _switched}
