"""Loss curves of the study of training: equal initial states, and the verdict on divergence."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from benches.training import curve


def test_verdict_compares_step_and_size_of_divergence() -> None:
    def comparison(variant: str, largest: float, large_at: int | None) -> curve.Comparison:
        return curve.Comparison("float32", variant, 0.0, largest, large_at, large_at, 0, 2, 3.0, 2.0, 0.5)

    reordered = [comparison("channels_last", 0.2, 30), comparison("reversed", 0.1, None)]
    sooner, later = (
        "diverges from masked autograd sooner than, and",
        "diverges from masked autograd no sooner than, and",
    )
    assert f"{sooner} further than, masked" in curve.verdict([comparison("auto", 0.21, 29), *reordered], "float32")
    assert f"{later} no further than" in curve.verdict([comparison("auto", 0.2, 30), *reordered], "float32")
    assert f"{later} further than" in curve.verdict([comparison("auto", 0.3, None), *reordered], "float32")
    assert curve.verdict([comparison("auto", 0.3, None)], "float32") == ""


def test_reordered_variants_use_the_same_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    labels: dict[str, list[torch.Tensor]] = {}
    cross_entropy = curve.F.cross_entropy

    def record(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        labels[variant].append(target)
        return cross_entropy(logits, target)

    monkeypatch.setattr(curve.F, "cross_entropy", record)
    for variant in ("masked", *curve.REORDERED):
        labels[variant] = []
        curve.train(variant, "float64", steps=2)
    for masked, channels_last, reversed_batch in zip(*labels.values(), strict=True):
        assert torch.equal(masked, channels_last)
        assert torch.equal(masked, reversed_batch.flip(0))
        assert not torch.equal(masked, reversed_batch)
    assert curve.build("channels_last")[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert not curve.build("masked")[3].weight.is_contiguous(memory_format=torch.channels_last)


def test_curves_begin_equal_and_switches_flip() -> None:
    masked, auto, *others = (curve.train(variant, "float64", steps=3) for variant in curve.VARIANTS)
    assert masked.losses == pytest.approx(auto.losses, abs=1e-9)
    assert masked.switches == auto.switches
    comparisons = curve.compare([masked, auto, *others])
    assert [comparison.variant for comparison in comparisons] == ["auto", "channels_last", "reversed"]
    assert all(comparison.largest < 1e-9 and comparison.switches == 0 for comparison in comparisons)
    before = torch.cat([p.detach() for name, p in curve.build("auto").named_parameters() if name.endswith("score")])
    assert (before > curve.THRESHOLD).tolist() != auto.switches
    assert 0 < auto.density < 1
