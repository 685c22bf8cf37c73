"""Convolutions that read and compute only the channels that a domain keeps, as drop-in ``torch.nn`` layers."""

from bap_kernels import _refused as _refused  # registers what raises
from bap_kernels import config, counters, nn, triton  # noqa: F401  config: deprecated; triton registers its ops
from bap_kernels import flops as _flops  # noqa: F401  registers its formulas
from bap_kernels._version import __version__ as __version__
from bap_kernels.channels import ChannelLists
from bap_kernels.dispatch import (
    choices,
    clear_choices,
    clear_packed_cache,
    packed_cache_info,
    set_packed_cache_limit,
    use_backend,
    use_winograd,
)
from bap_kernels.functional import gathered_conv2d, switched_conv2d
from bap_kernels.info import info
from bap_kernels.nn.domains import attach_, domain_names, set_domain
from bap_kernels.nn.swap import swap_
from bap_kernels.plan import (
    NetworkMemory,
    OrderReport,
    PlannedNetwork,
    PruneReport,
    memory,
    order_channels_,
    plan,
    prune_unused_,
    report,
    specialize,
)
from bap_kernels.table import ChannelTable
from bap_kernels.tune import tune
from bap_kernels.verify import VerifyReport, verify

__all__ = [
    "ChannelLists",
    "ChannelTable",
    "NetworkMemory",
    "OrderReport",
    "PlannedNetwork",
    "PruneReport",
    "VerifyReport",
    "attach_",
    "choices",
    "clear_choices",
    "clear_packed_cache",
    "counters",
    "domain_names",
    "gathered_conv2d",
    "info",
    "memory",
    "nn",
    "order_channels_",
    "packed_cache_info",
    "plan",
    "prune_unused_",
    "report",
    "set_domain",
    "set_packed_cache_limit",
    "specialize",
    "swap_",
    "switched_conv2d",
    "tune",
    "use_backend",
    "use_winograd",
    "verify",
]
