"""Names of families, ``<backend>/<kernel>/<math>``, and their order: what most calls need is verified first."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

__all__ = ["MATHS", "TRITON_KERNELS", "is_main", "matching", "ordered"]

# In the order in which they are verified.
MATHS = ("bfloat16", "tf32", "float16", "float32")
TRITON_KERNELS = ("forward", "planar", "pack", "input_gradient", "weight_gradient", "switched", "mixed")
_CUDA_KERNELS = ("wgmma", "nhwc", "planar", "halo", "split", "wgmma_weight_gradient", *TRITON_KERNELS[2:])
_INFERENCE = {"wgmma", "nhwc", "planar", "halo", "split", "forward", "pack"}


def _rank(family: str) -> tuple[bool, int, int, str]:
    backend, kernel, math = family.split("/")
    kernels = _CUDA_KERNELS if backend == "cuda" else TRITON_KERNELS
    known = kernels.index(kernel) if kernel in kernels else len(kernels)
    return not is_main(family), MATHS.index(math) if math in MATHS else len(MATHS), known, family


def is_main(family: str) -> bool:
    """Whether plain inference in 16 bits or TF32 needs it.

    Examples:
        >>> from bap_kernels.verify.families import is_main
        >>> is_main("triton/forward/bfloat16"), is_main("triton/mixed/bfloat16"), is_main("cuda/nhwc/float32")
        (True, False, False)
    """
    _, kernel, math = family.split("/")
    return kernel in _INFERENCE and math in ("bfloat16", "tf32")


def ordered(families: Iterable[str]) -> tuple[str, ...]:
    """Families in the order in which they are verified.

    Examples:
        >>> from bap_kernels.verify.families import ordered
        >>> ordered(["triton/mixed/bfloat16", "cuda/nhwc/float16", "triton/forward/bfloat16"])
        ('triton/forward/bfloat16', 'triton/mixed/bfloat16', 'cuda/nhwc/float16')
    """
    return tuple(sorted(set(families), key=_rank))


def matching(patterns: Iterable[str], families: Iterable[str]) -> tuple[str, ...]:
    """Those of the families that a name or a pattern means, in their order; "main" means those of :func:`is_main`.

    Raises:
        ValueError: for a pattern that means none.

    Examples:
        >>> from bap_kernels.verify.families import matching
        >>> matching(["*/pack/*"], ["triton/forward/tf32", "triton/pack/tf32"])
        ('triton/pack/tf32',)
    """
    families, wanted = list(families), set()
    for pattern in patterns:
        main = pattern == "main"
        matched = [each for each in families if is_main(each)] if main else fnmatch.filter(families, pattern)
        if not matched:
            raise ValueError(
                f"verify(): expected `families` to name families of this device, got {pattern!r}. "
                f"Hint: it has {', '.join(families) or 'none'}."
            )
        wanted |= set(matched)
    return tuple(family for family in families if family in wanted)
