"""Instruction sets and tile sizes of the native kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bap_kernels import _C

EMULATED = ("avx512_emulated", "neon_emulated") if "avx2" in _C.isa_available() else ()


@pytest.fixture(params=[name for name in (*_C.isa_available(), *EMULATED) if name != "none"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture(params=[4, 2], ids=["F4", "F2"])
def size(request: pytest.FixtureRequest) -> Iterator[int]:
    """The native kernels compute with tiles of this size whatever Winograd covers."""
    _C.force_winograd(request.param)
    yield request.param
    _C.force_winograd(0)
