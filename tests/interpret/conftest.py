"""Runs the Triton kernels in Triton's interpreter, on CPU tensors; these tests have a process of their own.

Without TRITON_INTERPRET=1 they are skipped: Triton reads the variable when it is imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    pytest.importorskip("triton")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = "runs in a process of its own: make test-interpret"
    for item in items:
        if not INTERPRETED and "interpret" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason=reason))


def _hasten() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    # The interpreter exchanges the functions of triton.language when it enters a kernel and again for every device
    # function and every tl.cdiv in it, which takes a thousand times as long as what they compute.
    scope = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    interpreter._patch_lang(scope)
    nothing = SimpleNamespace(restore=lambda: None)
    interpreter._patch_lang = lambda fn: nothing
    # It copies every storage back, which on a CPU is onto itself.
    interpreter.GridExecutor._restore_args_dev = lambda *arguments: None


if INTERPRETED:
    _hasten()


@pytest.fixture(autouse=True)
def _small_tiles() -> Iterator[None]:
    """Several tiles in every direction, with remainders, on tensors that the interpreter can afford."""
    if not INTERPRETED:
        yield
        return
    from bap_kernels.triton import configs

    with configs.overriding(configs.Config(32, 16, 16, 4, 2, 2)):
        yield
