"""Whole networks: lowered for one domain, or made physically small."""

from bap_kernels.plan.held import LayerMemory, NetworkMemory
from bap_kernels.plan.memory import memory
from bap_kernels.plan.order import ListOrder, OrderReport, order_channels_
from bap_kernels.plan.planned import PlannedNetwork, plan
from bap_kernels.plan.prune import PruneReport, prune_unused_
from bap_kernels.plan.report import LayerReport, NetworkReport, report
from bap_kernels.plan.specialize import specialize
from bap_kernels.plan.zeroed import find_zeros as _find_zeros  # noqa: F401  tells ChannelTable.from_weights how

__all__ = [
    "LayerMemory",
    "LayerReport",
    "ListOrder",
    "NetworkMemory",
    "NetworkReport",
    "OrderReport",
    "PlannedNetwork",
    "PruneReport",
    "memory",
    "order_channels_",
    "plan",
    "prune_unused_",
    "report",
    "specialize",
]
