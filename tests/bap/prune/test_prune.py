"""Pruning keeps every output, and finds out where it would not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bap.config import Config
from bap.prune.counting import count
from bap.prune.prune import PruneError, prune_
from bap.train.checkpoint import load_checkpoint
from bap.train.network import switched_network

import bap_kernels as bk


def test_pruning_keeps_every_output_and_the_file_gets_smaller(finished: Path, tmp_path: Path) -> None:
    from bap.train.checkpoint import save_checkpoint

    model, config, specs = load_checkpoint(finished / "checkpoint")
    x = torch.randn(4, 3, 32, 32)
    expected = {}
    with bk.use_backend("aten"), torch.inference_mode():
        for name in specs:
            bk.set_domain(model, name)
            expected[name] = model(x).clone()
    made = prune_(model, torch.zeros(1, 3, 32, 32))
    assert made.largest_change <= 1e-5
    assert made.after.weights < made.before.weights
    assert made.after.weights == sum(
        int((conv.weight != 0).any((2, 3)).sum()) * conv.weight[0, 0].numel()
        for conv in model.modules()
        if isinstance(conv, torch.nn.Conv2d)
    )
    assert [row["domain"] for row in made.as_rows()] == ["shapes", "digits", "glyphs", "union"]
    save_checkpoint(tmp_path / "pruned", model, config, specs, kept=(made.rows, made.columns))
    loaded, _, _ = load_checkpoint(tmp_path / "pruned")
    with bk.use_backend("aten"), torch.inference_mode():
        for name, value in expected.items():
            bk.set_domain(loaded, name)
            torch.testing.assert_close(loaded(x), value, rtol=1e-5, atol=1e-6)
    small, large = (path / "model.safetensors" for path in (tmp_path / "pruned", finished / "checkpoint"))
    assert small.stat().st_size < large.stat().st_size
    assert count(loaded, torch.zeros(1, 3, 32, 32)).as_dict() == made.after.as_dict()


def test_pruning_a_used_filter_raises(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    model = switched_network(tiny, {"a": 3, "b": 2}).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def wrong(*_: object) -> tuple[dict, dict]:
        weight = model.layer3[0].conv1.weight
        rows = torch.ones(len(weight), dtype=torch.bool)
        return {"layer3.0.conv1": rows.index_fill(0, torch.tensor([0]), False)}, {"layer3.0.conv1": torch.ones(8) > 0}

    monkeypatch.setattr("bap.prune.prune.kept_of", wrong)
    with pytest.raises(PruneError, match=r"to stay within 1e-05, got .* for 'a'; nothing was changed"):
        prune_(model, torch.zeros(1, 3, 32, 32))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
