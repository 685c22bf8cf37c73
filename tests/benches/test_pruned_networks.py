"""``python -m benches.pruned_networks``: every tool's network is planned right, and fewer channels are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.models.resnet import BasicBlock, ResNet

from benches import gate, pruned_networks


@pytest.fixture(autouse=True)
def small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    made = (lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=7), 32)
    for name in ("resnet18", "resnet50"):
        monkeypatch.setitem(pruned_networks.NETWORKS, name, made)


@pytest.mark.parametrize("name", list(pruned_networks.CASES))
def test_plans_compute_what_the_tool_left(name: str) -> None:
    if name == "torch_pruning":
        pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")
    (row,) = pruned_networks.rows_of(name, [1], seconds=0.0)
    listed, _, share = row["found"].partition(", ")
    assert int(listed.split()[0]) >= 4
    assert 30 < int(share.rstrip("%")) < 70
    assert row["errors"]["planned"] < 1e-4
    assert ("small" in row["seconds"]) == (name == "torch_pruning")
    assert all(value > 0 for value in row["seconds"].values())
    assert row["notes"]["layer2.0.conv2"].startswith("reads ")


def test_a_wrong_plan_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = pruned_networks.task_masks

    def other_task(model: torch.nn.Module, x: torch.Tensor) -> pruned_networks.Pruned:
        pruned = masks(model, x)
        pruned.domain = "birds"
        return pruned

    monkeypatch.setitem(pruned_networks.CASES, "masks of tasks", ("resnet18", other_task, "torch"))
    with pytest.raises(gate.WrongResultError, match="expected planned of masks of tasks on resnet18 to compute what"):
        pruned_networks.rows_of("masks of tasks", [1], seconds=0.0)


def test_command_writes_rows_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    try:
        arguments = ["--cases", "slimming", "--batch", "1", "--seconds", "0", "--out", str(tmp_path / "out")]
        assert pruned_networks.main(arguments) == 0
    finally:
        torch.set_num_threads(before)
    assert "slimming" in capsys.readouterr().out
    assert (tmp_path / "out" / "table.md").read_text().startswith("## Pruned networks")
    with pytest.raises(SystemExit):
        pruned_networks.main(["--cases", "magic"])
