"""The README's Python blocks run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
# Those that stand alone; the others are excerpts.
WHOLE = [block for block in BLOCKS if "import bap_kernels as bk" in block]


@pytest.mark.slow
@pytest.mark.parametrize("block", WHOLE, ids=range(len(WHOLE)))
def test_block_runs(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {})


def test_blocks_are_found() -> None:
    assert len(WHOLE) == 2
    assert any("bk.nn.switch_" in block for block in WHOLE)
