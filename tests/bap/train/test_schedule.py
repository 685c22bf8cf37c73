"""Whose batch is next, and the learning rate of an epoch."""

from __future__ import annotations

import pytest
import torch
from bap.config import Config
from bap.data import Arrays, Domain
from bap.train.schedule import (
    annealed_budget,
    batches_of,
    learning_rate,
    sharing_factor,
    steps_of_epoch,
    turns_of,
)


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
    # The public recipe of URL: 120 epochs, x .1 at 80 and 100.
    rates = [learning_rate("step", epoch, 120, [2 / 3, 5 / 6]) for epoch in (0, 79, 80, 99, 100, 119)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_annealed_budgets() -> None:
    for kind, power in (("linear", 1), ("cubic", 3)):
        found = [annealed_budget(kind, 0.9, 0.3, 0.6, done, 10) for done in range(1, 11)]
        expected = [0.3 + 0.6 * (1 - done / 6) ** power if done < 6 else 0.3 for done in range(1, 11)]
        assert found == pytest.approx(expected)
        # Exactly, as the projection is exact.
        assert found[5:] == [0.3] * 5
        assert found == sorted(found, reverse=True)
    assert annealed_budget(None, 1.0, 0.3, 0.6, 1, 10) == 0.3
    assert annealed_budget("linear", 0.2, 0.3, 0.6, 1, 10) == 0.3


def test_factors_on_the_sharing_loss() -> None:
    assert [sharing_factor("constant", 0.5, epoch, 4) for epoch in range(4)] == [1] * 4
    assert [sharing_factor("rise", 1.0, epoch, 4) for epoch in range(4)] == [0.25, 0.5, 0.75, 1]
    assert [sharing_factor("fall", 1.0, epoch, 4) for epoch in range(4)] == [1, 0.75, 0.5, 0.25]


def test_joint_steps_see_a_batch_of_every_domain(suite: dict[str, Domain], tiny: Config) -> None:
    config = tiny.replace(round_robin="joint")
    found = list(batches_of(suite, config, 0))
    # 200 images of shapes, 100 of the others, batches of 32.
    assert len(found) == steps_of_epoch(suite, config) == 6
    assert [[name for name, _, _ in step] for step in found] == [list(suite)] * 6
    # A smaller domain goes on in another order when all its batches were seen.
    labels = [[step[1][2].tolist() for step in found[start : start + 3]] for start in (0, 3)]
    assert labels[0] != labels[1]
    first = next(suite["digits"].batches("train", 32, (config.run.seed, 0)))[0]
    assert torch.equal(found[0][1][1], first)
    short = config.replace(steps=2)
    assert [step[1][2].tolist() for step in batches_of(suite, short, 0)] == labels[0][:2]
    assert steps_of_epoch(suite, short) == 2
    assert next(iter(batches_of(suite, short, 1)))[1][2].tolist() != labels[0][0]
    one = Arrays(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.tensor([0]))
    with pytest.raises(ValueError, match="expected 'a' to have an image for each of 2 processes, got 1"):
        list(batches_of({"a": Domain("a", ("x",), {"train": one}, 8)}, short, 0, 0, 2))
