"""Budget-aware pruning of multi-domain networks: training, pruning and scores, on the layers of bap_kernels.

    cli        the commands of ``bap``
    results    whole runs, studies, scores and reports
    train      joint training under budgets: losses, state, checkpoints
    config     settings
    export     files for other runtimes
    prune      what a trained network keeps and costs; the narrow network that is served
    data       the domains' images
    models     plain backbones
    files      atomic files with digests

Each imports only what stands below it.
"""

from bap import _moved

__version__ = "0.2.0"

_moved.install()
