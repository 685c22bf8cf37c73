"""The Python blocks of the README and of docs/ run as they stand, and links between pages and files lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import bap_kernels

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*/*.md")), ROOT / "docs/index.md"]
# Those that stand alone; the others are excerpts, or files of an op that does not exist.
BLOCKS = [
    pytest.param(page, block, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.M | re.S))
    if "import bap_kernels as bk" in block and not block.startswith("# tests/")
]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_block_runs(page: Path, block: str) -> None:
    exec(compile(block, str(page), "exec"), {})


def test_blocks_are_found() -> None:
    assert len(BLOCKS) >= 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    missing = [
        target
        for target in targets
        if not target.startswith(("http://", "https://", "#")) and not (page.parent / target.split("#")[0]).exists()
    ]
    assert missing == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_licences_of_all_dependencies_are_listed() -> None:
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())
    groups = [project["build-system"]["requires"], project["project"]["dependencies"]]
    groups += project["project"]["optional-dependencies"].values()
    needed = {re.split(r"[<>=\[; ]", requirement)[0] for group in groups for requirement in group} - {"bap_kernels"}
    listed = re.findall(r"^\| ([\w-]+) \|", (ROOT / "docs/reference/licences.md").read_text(), flags=re.M)
    assert sorted(needed | {"triton"}) == sorted(set(listed) - {"Package"})


def test_the_citation_names_this_version() -> None:
    assert f"\nversion: {bap_kernels.__version__}\n" in (ROOT / "CITATION.cff").read_text()
