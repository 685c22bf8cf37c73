"""Switches and their costs, and networks without the channels that no domain uses."""

from bap.prune.prune import Pruned, PruneError, kept_of, prune_

__all__ = ["PruneError", "Pruned", "kept_of", "prune_"]
