"""Whose batch is next, and the learning rate of an epoch."""

from __future__ import annotations

from bap.config import Config
from bap.data import Domain
from bap.train.schedule import learning_rate, turns_of


def test_round_robin_by_batch_takes_turns(suite: dict[str, Domain], tiny: Config) -> None:
    names = [name for name, _, _ in turns_of(suite, tiny.replace(round_robin="batch"), 0)]
    # 200 images of shapes, 100 of the others, batches of 32.
    assert sorted(names) == ["digits"] * 3 + ["glyphs"] * 3 + ["shapes"] * 6
    assert all(names[i : i + 4].count("shapes") >= 1 for i in range(len(names) - 3))
    by_epoch = [name for name, _, _ in turns_of(suite, tiny, 0)]
    assert by_epoch == ["shapes"] * 6 + ["digits"] * 3 + ["glyphs"] * 3


def test_learning_rates() -> None:
    assert [learning_rate("step", epoch, 4) for epoch in range(4)] == [1, 1, 1, 0.1]
    assert learning_rate("cosine", 0, 10) == 1
    assert learning_rate("cosine", 9, 10) < 0.03
