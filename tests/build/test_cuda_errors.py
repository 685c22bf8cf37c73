"""No launcher of the CUDA kernels leaves an error behind: each call of the runtime is ``cleared`` or clears itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "csrc" / "backends" / "cuda" / "kernels"
CALL = re.compile(r"(cleared\(\s*)?\bcuda[A-Z]\w*\(")
# They return the last error and forget it, or fail never.
HARMLESS = {"cudaGetLastError", "cudaGetErrorString"}


def left_behind(text: str) -> list[str]:
    """The calls of the runtime in a source whose failure would stay the last error."""
    code = re.sub(r"//[^\n]*", "", text)
    calls = [(match.group(), match.group(1)) for match in CALL.finditer(code)]
    names = [(re.sub(r"^cleared\(\s*", "", call).rstrip("("), wrapped) for call, wrapped in calls]
    return [name for name, wrapped in names if not wrapped and name not in HARMLESS]


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.cu*")), ids=lambda path: path.name)
def test_runtime_calls_leave_no_error(path: Path) -> None:
    assert left_behind(path.read_text(encoding="utf-8")) == []


def test_calls_that_are_not_cleared_are_found() -> None:
    text = "const auto status = cudaFuncSetAttribute(kernel, a, 1); // cudaFree(p)\n return cleared(cudaFree(p));"
    assert left_behind(text) == ["cudaFuncSetAttribute"]
    assert left_behind("kernel<<<1, 1>>>(p); return cudaGetLastError();") == []
