"""Imports go down the order of packages, without circles, by the source; those inside functions count."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Lowest first. A module imports from its own layer and from those below; a name stands for its package too.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("bap_kernels._version", "bap_kernels.settings"),
    ("bap_kernels._C", "bap_kernels._load"),
    (
        "bap_kernels._arguments",
        "bap_kernels._warn",
        "bap_kernels._files",
        "bap_kernels._packed",
        "bap_kernels._gpu",
        "bap_kernels._values",
    ),
    ("bap_kernels.channels", "bap_kernels.dispatch", "bap_kernels.functional"),
    ("bap_kernels.flow", "bap_kernels.layer_kinds"),
    ("bap_kernels._masks", "bap_kernels._random_lists", "bap_kernels._table_file", "bap_kernels._zeros"),
    ("bap_kernels.table",),
    ("bap_kernels.triton",),
    ("bap_kernels.nn",),
    ("bap_kernels.plan",),
    ("bap_kernels.config", "bap_kernels.counters", "bap_kernels.flops", "bap_kernels.tune", "bap_kernels.verify"),
    ("bap_kernels._refused",),
    ("bap_kernels.info",),
    ("bap_kernels",),
    ("bap_kernels.reference", "bap_kernels.testing", "bap_kernels.testing_cases", "bap_kernels.testing_switched"),
    ("bap_kernels.verify.cases", "bap_kernels.verify.child", "bap_kernels.verify.__main__"),
    ("bap.files", "bap._moved"),
    ("bap.data", "bap.models"),
    ("bap.prune",),
    ("bap.export",),
    ("bap.config",),
    ("bap.train",),
    ("bap.results",),
    ("bap.serve",),
    ("bap.cli",),
    ("bap",),
    ("benches",),
    ("tools",),
)
FOLDERS = {"bap_kernels": ROOT, "bap": ROOT / "python", "benches": ROOT, "tools": ROOT}


@dataclass(frozen=True)
class Import:
    """``module`` imports ``target`` in a line."""

    module: str
    target: str
    line: int

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


def find_modules() -> dict[str, str]:
    """Source text by name of module."""
    found = {"bap_kernels._C": ""}
    for package, folder in FOLDERS.items():
        for path in sorted((folder / package).rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if _is_type_checking(child):
            for other in child.orelse:  # type: ignore[attr-defined]
                yield other
                yield from _statements(other)
            continue
        yield child
        yield from _statements(child)


def find_imports(modules: Mapping[str, str]) -> list[Import]:
    """Every import of one of the modules by another, inside functions too, except under TYPE_CHECKING."""
    found = []
    for module, text in modules.items():
        for node in _statements(ast.parse(text)):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module}:{node.lineno}: expected an absolute import"
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if name in modules else str(node.module) for name in inner]
            else:
                continue
            found += [Import(module, name, node.lineno) for name in names if name in modules and name != module]
    return found


def layer_of(module: str) -> int:
    """The number of the layer whose name fits the module best."""
    fitting = {
        name: number
        for number, names in enumerate(LAYERS)
        for name in names
        if module == name or (module.startswith(f"{name}.") and name != "bap_kernels")
    }
    assert fitting, f"expected `LAYERS` of {Path(__file__).name} to name {module}"
    return fitting[max(fitting, key=len)]


def find_circle(imports: list[Import]) -> list[str]:
    """The modules of one circle, in order; empty where there is none."""
    targets: dict[str, set[str]] = {}
    for each in imports:
        targets.setdefault(each.module, set()).add(each.target)
    done: set[str] = set()
    path: list[str] = []

    def visit(module: str) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        path.append(module)
        for target in sorted(targets.get(module, ())):
            if circle := visit(target):
                return circle
        done.add(path.pop())
        return []

    return next((circle for module in sorted(targets) if (circle := visit(module))), [])


def find_upward(imports: list[Import]) -> list[str]:
    """Imports against the order of ``LAYERS``."""
    return [str(each) for each in imports if layer_of(each.target) > layer_of(each.module)]


def test_every_module_has_a_layer() -> None:
    for module in find_modules():
        layer_of(module)


def test_there_is_no_circle() -> None:
    assert find_circle(find_imports(find_modules())) == []


def test_no_import_goes_up() -> None:
    assert find_upward(find_imports(find_modules())) == []


def test_imports_are_found_wherever_they_stand() -> None:
    text = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import bap\nelse:\n    import bap_kernels\n"
        "def f():\n    from bap_kernels import plan, nothing\n"
        "class C:\n    try:\n        import tools, os\n    except ImportError: pass\n"
    )
    modules = {"m": text, **dict.fromkeys(("bap", "bap_kernels", "bap_kernels.plan", "tools"), "")}
    assert [(each.target, each.line) for each in find_imports(modules)] == [
        ("bap_kernels", 5),
        ("bap_kernels.plan", 7),
        ("bap_kernels", 7),
        ("tools", 10),
    ]


def test_circles_and_upward_imports_are_found() -> None:
    up = Import("bap_kernels.nn.conv", "bap_kernels.plan", 3)
    down = Import("bap_kernels.plan", "bap_kernels.nn.conv", 1)
    assert find_circle([down]) == find_upward([down]) == []
    assert find_circle([up, down]) == ["bap_kernels.nn.conv", "bap_kernels.plan", "bap_kernels.nn.conv"]
    assert find_upward([up, down]) == ["bap_kernels.nn.conv:3 imports bap_kernels.plan"]
    assert find_upward([Import("bap_kernels.table", "bap.train", 1)]) != []
