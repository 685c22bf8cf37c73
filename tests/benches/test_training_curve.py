"""Loss curves of the study of training: variants that start alike, and what is said of their drift."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from benches.training import curve


def test_verdict_says_what_is_worse() -> None:
    def compared(variant: str, largest: float, large_at: int | None) -> curve.Comparison:
        return curve.Comparison("float32", variant, 0.0, largest, large_at, large_at, 0, 2, 3.0, 2.0, 0.5)

    itself = [compared("channels_last", 0.2, 30), compared("reversed", 0.1, None)]
    sooner, later = "parts from masked autograd sooner than, and", "parts from masked autograd no sooner than, and"
    assert f"{sooner} further than, masked" in curve.verdict([compared("auto", 0.21, 29), *itself], "float32")
    assert f"{later} no further than" in curve.verdict([compared("auto", 0.2, 30), *itself], "float32")
    assert f"{later} further than" in curve.verdict([compared("auto", 0.3, None), *itself], "float32")
    assert curve.verdict([compared("auto", 0.3, None)], "float32") == ""


def test_yardsticks_are_the_same_sums_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    # Whether that rounds otherwise depends on the CPU's kernels.
    seen: dict[str, list[torch.Tensor]] = {}
    cross_entropy = curve.F.cross_entropy

    def recorded(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen[variant].append(labels)
        return cross_entropy(logits, labels)

    monkeypatch.setattr(curve.F, "cross_entropy", recorded)
    for variant in ("masked", *curve.YARDSTICKS):
        seen[variant] = []
        curve.train(variant, "float64", steps=2)
    for masked, last, other_way in zip(*seen.values(), strict=True):
        assert torch.equal(masked, last)
        assert torch.equal(masked, other_way.flip(0))
        assert not torch.equal(masked, other_way)
    assert curve.build("channels_last")[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert not curve.build("masked")[3].weight.is_contiguous(memory_format=torch.channels_last)


def test_curves_begin_alike_and_switches_turn() -> None:
    masked, auto, *others = (curve.train(variant, "float64", steps=3) for variant in curve.BASELINES)
    assert masked.losses == pytest.approx(auto.losses, abs=1e-9)
    assert masked.switches == auto.switches
    found = curve.compare([masked, auto, *others])
    assert [one.variant for one in found] == ["auto", "channels_last", "reversed"]
    # Rounding alone differs.
    assert all(one.largest < 1e-9 and one.switches == 0 for one in found)
    before = torch.cat([p.detach() for name, p in curve.build("auto").named_parameters() if name.endswith("score")])
    assert (before > curve.THRESHOLD).tolist() != auto.switches
    assert 0 < auto.density < 1
