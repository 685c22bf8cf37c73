"""Which folders pytest enters."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def test_every_folder_with_tests_is_entered(request: pytest.FixtureRequest) -> None:
    folders = {path.parent for path in TESTS.rglob("test_*.py")}
    patterns = request.config.getini("norecursedirs")
    assert patterns
    left_out = [
        (folder.relative_to(TESTS), pattern)
        for folder in folders
        for parent in (folder, *folder.parents)
        if parent.is_relative_to(TESTS)
        for pattern in patterns
        if parent.match(pattern)
    ]
    assert left_out == []
