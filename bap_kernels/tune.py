"""Tuning of the Triton kernels for a model, on request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bap_kernels._arguments import check_module
from bap_kernels.dispatch import use_backend

if TYPE_CHECKING:
    from bap_kernels.triton.tuning import Tuned

__all__ = ["tune"]


def tune(model: nn.Module, example: Tensor | tuple[Any, ...], backward: bool = False) -> list[Tuned]:
    """Measures the Triton kernels' configurations on every case that a model meets, and keeps the fastest.

    The results hold for every model on such a GPU, in this process and, through ``BAP_KERNELS_CACHE_DIR``, in later
    ones. A case is measured once: seconds for each, most of them compilation. Without tuning, a table decides.

    Args:
        model: any module with layers of this package, set to a domain; other domains may bring other cases.
        example: its input, or a tuple of its inputs, on the GPU, of the shape and dtype that will be used.
        backward: also the cases of the gradients, of the sum of the results; parameters' ``grad`` is left as it is.

    Returns:
        What was found for each new case, see :class:`bap_kernels.triton.tuning.Tuned`.

    Raises:
        ImportError: if the Triton backend cannot run here.
        NotImplementedError: if a layer is beyond its kernels.

    Examples:
        >>> import torch
        >>> import bap_kernels as bk
        >>> if torch.cuda.is_available():
        ...     conv = torch.nn.Conv2d(64, 64, 3, padding=1).cuda()
        ...     layer = bk.nn.GatheredConv2d.from_conv2d(conv, bk.ChannelLists(range(0, 64, 2))).eval()
        ...     found = bk.tune(layer, torch.randn(8, 64, 56, 56).cuda())
        ...     assert all(case.seconds <= case.table_seconds for case in found)
    """
    check_module("tune", model)
    inputs = example if isinstance(example, tuple) else (example,)
    with use_backend("triton"):
        # Deferred: it imports Triton.
        from bap_kernels.triton.tuning import tuning

        with tuning() as tuned, torch.set_grad_enabled(backward):
            result = model(*inputs)
            leaves = [p for p in model.parameters() if p.requires_grad] if backward else []
            if leaves:
                torch.autograd.grad(result.sum(), leaves, allow_unused=True)
    return list(tuned)
