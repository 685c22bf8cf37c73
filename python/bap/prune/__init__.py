"""What a trained network keeps: its switches, what they cost, and the network without what no domain uses."""

from bap.prune.prune import Pruned, PruneError, kept_of, prune_

__all__ = ["PruneError", "Pruned", "kept_of", "prune_"]
