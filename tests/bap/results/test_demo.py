"""The demo."""

from __future__ import annotations

from pathlib import Path

import pytest
from bap.results.demo import run_demo


def test_demo(tmp_path: Path) -> None:
    small = [
        "images=100",
        "epochs=2",
        "pretrain_epochs=1",
        "model_options={widths: [8, 8, 16], blocks: [1, 1, 1]}",
        "lr_switch=5e-3",
        "multiplier_rate=1",
    ]
    said: list[str] = []
    made = run_demo(tmp_path, small, said.append)
    assert made["accuracy_after_pruning"] == pytest.approx(made["accuracy"], abs=2.1)
    assert made["params"]["after"] < made["params"]["before"]
    assert made["bytes"]["pruned"] < made["bytes"]["model"] + 20_000
    assert "![channels](kept.png)" in Path(made["report"]).read_text()
    assert any("pruned:" in line for line in said)
    assert made["served"]["bytes"]["after"] < made["served"]["bytes"]["before"]
    assert "## Time and memory as it is served" in Path(made["report"]).read_text()
