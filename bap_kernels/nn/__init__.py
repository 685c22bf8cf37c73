"""Layers that work on the channels of the active domain, and what trains them."""

from bap_kernels.nn.channel_switch import ChannelSwitch
from bap_kernels.nn.consumers import link_readers_
from bap_kernels.nn.conv import GatheredConv2d, MaskedConv2d
from bap_kernels.nn.convert import add_domain_, switch_
from bap_kernels.nn.domain_layers import DomainBatchNorm2d, DomainConv2d, DomainLinear, DomainNorm
from bap_kernels.nn.parallel import DomainParallel
from bap_kernels.nn.per_domain import domain_layers, domain_parameters
from bap_kernels.nn.recalibrate import recalibrate_bn
from bap_kernels.nn.recompute import recompute, recompute_
from bap_kernels.nn.swap import skipped
from bap_kernels.nn.switched import SwitchedConv2d

__all__ = [
    "ChannelSwitch",
    "DomainBatchNorm2d",
    "DomainConv2d",
    "DomainLinear",
    "DomainNorm",
    "DomainParallel",
    "GatheredConv2d",
    "MaskedConv2d",
    "SwitchedConv2d",
    "add_domain_",
    "domain_layers",
    "domain_parameters",
    "link_readers_",
    "recalibrate_bn",
    "recompute",
    "recompute_",
    "skipped",
    "switch_",
]
