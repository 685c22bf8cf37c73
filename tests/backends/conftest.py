"""Tile sizes of Winograd convolutions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bap_kernels import _C


@pytest.fixture(params=[4, 2], ids=["F4", "F2"])
def size(request: pytest.FixtureRequest) -> Iterator[int]:
    """The native kernels compute with tiles of this size whatever Winograd covers."""
    _C.force_winograd(request.param)
    yield request.param
    _C.force_winograd(0)
