"""Budget-aware pruning of multi-domain networks: training, pruning, counting and scores on the layers of bap_kernels."""

__version__ = "0.1.0"
