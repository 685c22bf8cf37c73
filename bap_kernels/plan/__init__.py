"""Whole networks: lowered for one domain, or made physically small."""

from bap_kernels.plan.planned import PlannedNetwork, plan

__all__ = ["PlannedNetwork", "plan"]
