"""The environment variables of the package, parsed once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "BACKENDS",
    "ENVIRONMENT",
    "ISAS",
    "MAX_BYTES",
    "NAMED_BACKENDS",
    "PACKED_MEMORY",
    "Settings",
    "Variable",
    "read_environment",
    "settings",
]

# The first two choose one of the others.
BACKENDS = ("auto", "heuristic", "native", "aten", "triton", "cuda")
NAMED_BACKENDS = BACKENDS[2:]
PACKED_MEMORY = ("auto", "fast", "shared")
ISAS = ("avx512", "avx2", "neon", "none", "avx512_emulated", "neon_emulated")
MAX_BYTES = 2**63 - 1
_CACHE_DIR = "~/.cache/bap_kernels"


@dataclass(frozen=True)
class Variable:
    """One environment variable: its name, its default as text, when it is read, and what it does."""

    name: str
    default: str
    read: str
    meaning: str


ENVIRONMENT = (
    Variable("BAP_KERNELS_ISA", "the best one here", "import", f"CPU kernels to use: {', '.join(ISAS)}"),
    Variable("BAP_KERNELS_BACKEND", "auto", "import", f"backend to start with: {', '.join(BACKENDS)}"),
    Variable("BAP_KERNELS_CACHE_DIR", _CACHE_DIR, "import", "folder of measured choices and verdicts; empty: none"),
    Variable(
        "BAP_KERNELS_WINOGRAD", "1", "import", "0: auto takes no Winograd convolution, as after use_winograd(False)"
    ),
    Variable("BAP_KERNELS_AUTOTUNE", "0", "import", "1: the Triton backend tunes each case at its first call"),
    Variable(
        "BAP_KERNELS_VERIFY",
        "1",
        "import",
        "1: the first call of auto on a GPU has its kernels verified in the background; block: it waits for the "
        "verdicts; 0: only verdicts that are there already count",
    ),
    Variable("BAP_KERNELS_PACKED_CACHE_BYTES", str(2**30), "import", "most bytes of packed weights kept; 0: keep none"),
    Variable(
        "BAP_KERNELS_PACKED_MEMORY",
        "auto",
        "import",
        f"packed weights of layers with lists: {', '.join(PACKED_MEMORY)}; see the guide to whole networks",
    ),
    Variable(
        "BAP_KERNELS_LIBRARY", "", "import", "another build of bap_kernels._C to load, such as one with sanitizers"
    ),
    Variable("BAP_KERNELS_CUDA_LIBRARY", "", "import", "another build of bap_kernels._C_cuda, such as the tests' own"),
    Variable("BAP_KERNELS_WITH_CUDA", "auto", "build", "build the CUDA library: 0, 1, auto"),
    Variable("BAP_KERNELS_MAX_JOBS", "one for each core", "build", "compilers run at once"),
    Variable("BAP_KERNELS_SANITIZE", "", "build", "sanitizers to build a second library with"),
)


@dataclass(frozen=True)
class Settings:
    """The variables that are read when the package is imported."""

    isa: str | None
    backend: str
    cache_dir: Path | None
    packed_cache_bytes: int
    autotune: bool = False
    winograd: bool = True
    packed_memory: str = "auto"
    unusable_cache_dir: str = ""  # the text of a name that is no folder, and why it is none
    cache_problem: str = ""
    library: str = ""
    cuda_library: str = ""
    verify: str = "1"

    @property
    def choice_file(self) -> Path | None:
        """File of the measured choices of ``auto``; None keeps them in memory only."""
        return None if self.cache_dir is None else self.cache_dir / "choices-v5.tsv"


def _one_of(environment: Mapping[str, str], name: str, values: tuple[str, ...]) -> str | None:
    value = environment.get(name, "").strip().lower()
    if value and value not in values:
        raise ValueError(f"bap_kernels: expected `{name}` to be one of {', '.join(values)}, got {environment[name]!r}.")
    return value or None


def _cache_dir(text: str) -> tuple[Path | None, str]:
    """The folder, or None and the reason: a user in a container may have no home."""
    try:
        return (Path(text).expanduser() if text else None), ""
    except RuntimeError:
        return None, f"`{text}` has no home folder in front"


def read_environment(environment: Mapping[str, str] = os.environ) -> Settings:
    """Parses the variables that are read at import.

    Raises:
        ValueError: if a variable holds something else than :data:`ENVIRONMENT` allows.

    Examples:
        >>> from bap_kernels.settings import read_environment
        >>> read_environment({"BAP_KERNELS_BACKEND": "aten"}).backend
        'aten'
    """
    name = "BAP_KERNELS_PACKED_CACHE_BYTES"
    text = environment.get(name, "").strip() or str(2**30)
    # int() alone would also take signs, underscores and digits of other scripts.
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= MAX_BYTES):
        raise ValueError(
            f"bap_kernels: expected `{name}` to be a number of bytes, 0 or more and less than 2**63, got {text!r}."
        )
    folder = environment.get("BAP_KERNELS_CACHE_DIR", _CACHE_DIR)
    cache_dir, cache_problem = _cache_dir(folder)
    return Settings(
        isa=_one_of(environment, "BAP_KERNELS_ISA", ISAS),
        backend=_one_of(environment, "BAP_KERNELS_BACKEND", BACKENDS) or "auto",
        cache_dir=cache_dir,
        packed_cache_bytes=int(text),
        autotune=_one_of(environment, "BAP_KERNELS_AUTOTUNE", ("0", "1")) == "1",
        winograd=_one_of(environment, "BAP_KERNELS_WINOGRAD", ("0", "1")) != "0",
        packed_memory=_one_of(environment, "BAP_KERNELS_PACKED_MEMORY", PACKED_MEMORY) or "auto",
        unusable_cache_dir=folder if cache_problem else "",
        cache_problem=cache_problem,
        library=environment.get("BAP_KERNELS_LIBRARY", ""),
        cuda_library=environment.get("BAP_KERNELS_CUDA_LIBRARY", ""),
        verify=_one_of(environment, "BAP_KERNELS_VERIFY", ("0", "1", "block")) or "1",
    )


settings = read_environment()
