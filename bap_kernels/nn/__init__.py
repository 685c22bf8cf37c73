"""Layers that work on the channels of the active domain."""

from bap_kernels.nn.conv import GatheredConv2d, MaskedConv2d
from bap_kernels.nn.swap import skipped

__all__ = ["GatheredConv2d", "MaskedConv2d", "skipped"]
