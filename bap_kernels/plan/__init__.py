"""Whole networks: lowered for one domain, or made physically small."""

from bap_kernels.plan.order import ListOrder, OrderReport, order_channels_
from bap_kernels.plan.planned import PlannedNetwork, plan
from bap_kernels.plan.prune import PruneReport, prune_unused_
from bap_kernels.plan.report import LayerReport, NetworkReport, report
from bap_kernels.plan.specialize import specialize

__all__ = [
    "LayerReport",
    "ListOrder",
    "NetworkReport",
    "OrderReport",
    "PlannedNetwork",
    "PruneReport",
    "order_channels_",
    "plan",
    "prune_unused_",
    "report",
    "specialize",
]
