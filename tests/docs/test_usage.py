"""The usage that ``--help`` of a bench or a tool prints is a command that runs it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _parsers(path: Path) -> list[dict[str | None, ast.expr]]:
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    named = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "ArgumentParser"]
    return [{keyword.arg: keyword.value for keyword in call.keywords} for call in named]


PARSERS = {
    path.relative_to(ROOT): parsers
    for folder in ("benches", "tools")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if (parsers := _parsers(path))
}


def test_the_commands_are_found() -> None:
    assert Path("benches/winograd.py") in PARSERS


@pytest.mark.parametrize("path", PARSERS, ids=str)
def test_usage_is_the_command(path: Path) -> None:
    module = ".".join(path.with_suffix("").parts).removesuffix(".__main__")
    for parser in PARSERS[path]:
        prog = parser.get("prog")
        assert isinstance(prog, ast.Constant), "usage is the file's name, which no folder but its own finds"
        assert prog.value in (f"python -m {module}", f"python {path}")
