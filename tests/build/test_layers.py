"""Includes of ``csrc`` point down one order of layers, and neither files nor folders include each other in a circle."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[2] / "csrc"
# From the top: what includes may point to everything below it, and to its own layer.
LAYERS = (("module.cpp",), ("plan",), ("autograd", "autocast"), ("backends",), ("dispatch",), ("ops",))
BACKENDS = ("aten", "cpu", "cuda", "triton")
Includes = Mapping[str, Iterable[str]]


def layer(path: str) -> int:
    """Place of a file in ``LAYERS``."""
    top = path.split("/")[0]
    return next(place for place, names in enumerate(LAYERS) if top in names)


def folder(path: str) -> str:
    return str(PurePosixPath(path).parent)


def read_includes(root: Path) -> dict[str, list[str]]:
    """The files of ours that each file includes, relative to ``root``."""
    files = [path for path in root.rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh")]
    names = {path.relative_to(root).as_posix(): path for path in files if path.name != "precompiled.h"}
    found = {
        name: re.findall(r'^\s*#include "([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE)
        for name, path in names.items()
    }
    for name, includes in found.items():
        missing = [include for include in includes if include not in names]
        assert not missing, f"{name} includes {missing[0]}, which is not a path under csrc"
    return found


def upward(includes: Includes) -> list[str]:
    """One message for each include that points up, or from one backend to another."""
    wrong = []
    for name, targets in includes.items():
        for target in targets:
            if layer(target) < layer(name):
                wrong.append(f"{name} includes {target}, which lies above it")
            backends = [path.split("/")[1] for path in (name, target) if path.startswith("backends/")]
            if len(backends) == 2 and backends[0] != backends[1]:
                wrong.append(f"{name} includes {target} of another backend")
    return wrong


def circle(includes: Includes) -> list[str]:
    """Nodes of one circle, the first of them again at the end; empty where there is none."""
    done: set[str] = set()
    path: list[str] = []

    def visit(name: str) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        path.append(name)
        for target in includes.get(name, ()):
            if found := visit(target):
                return found
        path.pop()
        done.add(name)
        return []

    for name in includes:
        if found := visit(name):
            return found
    return []


def of_folders(includes: Includes) -> dict[str, set[str]]:
    """Which folders include files of which others."""
    folders: dict[str, set[str]] = {}
    for name, targets in includes.items():
        folders.setdefault(folder(name), set()).update(folder(target) for target in targets)
    return {name: targets - {name} for name, targets in folders.items()}


INCLUDES = read_includes(ROOT)


def test_includes_point_down() -> None:
    assert upward(INCLUDES) == []


def test_no_circle_of_files() -> None:
    assert circle(INCLUDES) == []


def test_no_circle_of_folders() -> None:
    assert circle(of_folders(INCLUDES)) == []


def test_every_backend_is_one_of_the_order() -> None:
    assert {name.split("/")[1] for name in INCLUDES if name.startswith("backends/")} == set(BACKENDS)


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("ops/a.h", "dispatch/b.h", "ops/a.h includes dispatch/b.h, which lies above it"),
        ("dispatch/a.cpp", "backends/cpu/b.h", "dispatch/a.cpp includes backends/cpu/b.h, which lies above it"),
        ("backends/cpu/a.h", "backends/aten/b.h", "backends/cpu/a.h includes backends/aten/b.h of another backend"),
    ],
)
def test_upward_includes_are_found(name: str, target: str, message: str) -> None:
    assert upward({name: [target], target: []}) == [message]


def test_circles_are_found() -> None:
    includes = {"ops/a.h": ["ops/b.h"], "ops/b.h": ["ops/c.h"], "ops/c.h": ["ops/b.h"]}
    assert circle(includes) == ["ops/b.h", "ops/c.h", "ops/b.h"]
    files = {"x/a.h": ["y/a.h"], "y/b.h": ["x/b.h"]}
    assert circle(files) == []
    assert circle(of_folders(files)) == ["x", "y", "x"]
