"""Writes the Triton kernels as a folder in the layout of Hugging Face's ``kernels``, functions only.

    python -m tools.export_hf_kernels --out DIR

``DIR/torch-ext/`` and ``build.toml`` are the sources that kernel-builder takes; ``DIR/build/torch-cuda`` is the variant
that ``kernels.get_local_kernel(DIR)`` loads. The modules are those of ``bap_kernels.triton`` with relative imports, as
far as the functions of ``tools/hf_kernels/functions.py`` need them; ``torch_only.py`` stands for the compiled library.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME = "bap_kernels_triton"
# Of the layout: 0 is alpha or beta.
VERSION = 0
# Imports of other modules than the kernels' own, by what the export has for them.
_STAND_INS = {
    "from bap_kernels._load import _C": "from . import torch_only as _C",
    "from bap_kernels.dispatch import interpreting": "from .torch_only import interpreting",
    "from bap_kernels.triton.tuning import tune_case": "from .torch_only import tune_case",
}
_OWN = re.compile(r"^from (?:bap_kernels\.triton|tools\.hf_kernels)(?:\.(\w+))? import", flags=re.MULTILINE)
_ALLOWED = {"torch", "triton", *sys.stdlib_module_names}
_INIT = '''"""Convolutions that read and compute listed channels only: Triton kernels of bap_kernels {version}."""

from .functions import gathered_conv2d, switched_conv2d

__all__ = ["gathered_conv2d", "switched_conv2d"]
'''
_BUILD = """[general]
name = "{name}"
version = {version}
edition = 5
license = "Apache-2.0"
backends = ["cuda"]

[torch-noarch]
"""
_CARD = """---
library_name: kernels
license: apache-2.0
---

Triton kernels of bap_kernels {version}: convolutions that read and compute listed channels only. Generated; functions:

- `gathered_conv2d(input, weight, bias, in_index, out_index, stride, padding, dilation)`
- `switched_conv2d(input, weight, bias, switch, stride, padding, dilation)`

No layers, no packed weights kept between calls, no tuning and no choice between backends: these are in the package.
"""


class ExportError(Exception):
    """The modules cannot stand alone."""


def source_of(module: str) -> Path:
    """File of an exported module: a helper of this tool, or one of ``bap_kernels.triton``."""
    own = ROOT / "tools/hf_kernels" / f"{module}.py"
    return own if own.exists() else ROOT / "bap_kernels/triton" / f"{module}.py"


def relative(text: str) -> str:
    """A module's text with relative imports."""
    for line, stand_in in _STAND_INS.items():
        text = re.sub(rf"^{re.escape(line)}$", stand_in, text, flags=re.MULTILINE)
    return _OWN.sub(r"from .\1 import", text)


def imports_of(name: str, text: str) -> set[str]:
    """Modules of the export that a module imports.

    Raises:
        ExportError: if it imports something that the export cannot have.
    """
    modules = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            modules |= {node.module} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for imported in names:
                if imported.split(".")[0] not in _ALLOWED:
                    raise ExportError(f"{name} imports {imported}, which an export cannot have")
    return modules


def modules() -> dict[str, str]:
    """{file name: text} of the functions and of everything that they import."""
    texts: dict[str, str] = {}
    waiting = ["functions"]
    while waiting:
        name = waiting.pop()
        if f"{name}.py" in texts:
            continue
        text = relative(source_of(name).read_text(encoding="utf-8"))
        texts[f"{name}.py"] = text
        waiting += imports_of(name, text)
    return dict(sorted(texts.items()))


def _package_version() -> str:
    text = (ROOT / "bap_kernels/_version.py").read_text(encoding="utf-8")
    return text.split('"')[-2]


def _metadata(identifier: str, files: Mapping[str, str]) -> str:
    digests = {
        name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for name, text in sorted(files.items())
    }
    content = {
        "name": NAME.replace("_", "-"),
        "id": identifier,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cuda"},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    return json.dumps(content, indent=2) + "\n"


def export(out: Path) -> list[Path]:
    """Writes the folder; what an earlier export wrote there is replaced.

    Returns:
        The files.

    Raises:
        ExportError: if a module imports something that the folder cannot have, or ``out`` holds something else.
    """
    if out.exists() and any(out.iterdir()) and not (out / "build.toml").exists():
        raise ExportError(f"expected {out} to be empty or an earlier export, got other files")
    version = _package_version()
    texts = {"__init__.py": _INIT.format(version=version), **modules()}
    unique = hashlib.sha1("".join(texts.values()).encode()).hexdigest()[:7]
    identifier = f"_{NAME}_cuda_{unique}"
    built = {**texts, "_ops.py": texts["_ops.py"].replace(f"_{NAME}_local", identifier)}
    # kernel-builder writes its own _ops.py and metadata.
    sources = {name: text for name, text in texts.items() if name != "_ops.py"}
    files = {
        "build.toml": _BUILD.format(name=NAME.replace("_", "-"), version=VERSION),
        "CARD.md": _CARD.format(version=version),
        "LICENSE": (ROOT / "LICENSE").read_text(encoding="utf-8"),
        **{f"torch-ext/{NAME}/{name}": text for name, text in sources.items()},
        **{f"build/torch-cuda/{name}": text for name, text in built.items()},
        "build/torch-cuda/metadata.json": _metadata(identifier, built),
    }
    for folder in ("build", "torch-ext"):
        shutil.rmtree(out / folder, ignore_errors=True)
    for name, text in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in files]


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the folder; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.export_hf_kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    options = parser.parse_args(arguments)
    try:
        files = export(options.out)
    except ExportError as error:
        print(f"export_hf_kernels: {error}", file=sys.stderr)
        return 2
    print(f"{len(files)} files in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
