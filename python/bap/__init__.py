"""Budget-aware pruning of multi-domain networks: training, pruning and scores, on the layers of bap_kernels."""

__version__ = "0.1.0"
