"""Sphinx configuration: `make docs` builds docs/_build/html with warnings as errors."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS.parent / "python"), str(DOCS)]

import bap_kernels  # noqa: E402

project = "bap_kernels"
author = "the bap_kernels developers"
copyright = "2026, the bap_kernels developers"
version = release = bap_kernels.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "environment_table",
    "repository_files",
]
exclude_patterns = ["_build"]
nitpicky = False
html_theme = "furo"
html_title = f"bap_kernels {release}"
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]  # links to folders of the repository

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Shape", "params_style")]


def _reachable(host: str) -> bool:
    try:
        socket.create_connection((host, 443), timeout=3).close()
    except OSError:
        return False
    return True


# Without a network there are no links to other projects, and no warnings about them either.
_others = {
    "python": ("docs.python.org", "https://docs.python.org/3"),
    "torch": ("docs.pytorch.org", "https://docs.pytorch.org/docs/stable"),
}
intersphinx_mapping = {name: (url, None) for name, (host, url) in _others.items() if _reachable(host)}
