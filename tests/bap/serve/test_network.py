from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from bap.data.transform import normalised
from bap.serve import ServeSettings
from bap.serve.network import Answer, Query, ServedNetwork, answer_each
from bap.serve.requests import decode
from bap.train.checkpoint import load_checkpoint

import bap_kernels as bk


@pytest.fixture(scope="module", autouse=True)
def _settings_of_the_thread() -> Iterator[None]:
    # A served network sets both for the thread that calls it.
    threads = torch.get_num_threads()
    with bk.use_backend("auto"):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def network(checkpoint: Path) -> ServedNetwork:
    return ServedNetwork(ServeSettings.of({"checkpoint": checkpoint, "max_batch": 4}))


@pytest.fixture(scope="module")
def queries(network: ServedNetwork, images: dict[str, list[bytes]]) -> list[Query]:
    return [(name, decode(body, network.inputs[name], 10**6)) for name, bodies in images.items() for body in bodies]


def test_mixed_batches_equal_the_unplanned_network_image_by_image(
    network: ServedNetwork, queries: list[Query], checkpoint: Path
) -> None:
    model, _, _ = load_checkpoint(checkpoint)
    queries = random.Random(0).sample(queries, len(queries))
    for start, count in ((0, 1), (1, 2), (3, 7), (10, 20)):
        batch = queries[start : start + count]
        for (name, pixels), found in zip(batch, network.logits(batch), strict=True):
            domain = network.inputs[name]
            bk.set_domain(model, name)
            with torch.inference_mode():
                expected = model(normalised(pixels, domain.mean, domain.std)[None])[0]
            torch.testing.assert_close(found[: len(expected)], expected, rtol=1e-4, atol=1e-4)
            assert bool((found[len(expected) :] == -torch.inf).all())


def test_answers_are_the_most_probable_classes_in_order(network: ServedNetwork, queries: list[Query]) -> None:
    logits = network.logits(queries)
    for (name, _), answer, row in zip(queries, network.answer(queries), logits, strict=True):
        classes = len(network.inputs[name].classes)
        numbers, values = zip(*answer, strict=True)
        assert numbers[0] == int(row.argmax())
        assert len(answer) == 5
        assert list(values) == sorted(values, reverse=True)
        assert values[0] == pytest.approx(float(row[:classes].softmax(0).max()), rel=1e-5)


def test_some_domains_can_be_served(checkpoint: Path) -> None:
    few = ServedNetwork(ServeSettings.of({"checkpoint": checkpoint, "domains": "glyphs"}))
    assert list(few.inputs) == ["glyphs"]
    assert len(few.answer([("glyphs", np.zeros((32, 32, 3), np.uint8))])[0]) == 5


class _Fragile:
    """Fails for black images."""

    def answer(self, queries: list[Query]) -> list[Answer]:
        if any(not pixels.any() for _, pixels in queries):
            raise FloatingPointError("black")
        return [[(int(pixels.max()), 1.0)] for _, pixels in queries]


def test_a_query_that_fails_does_not_spoil_its_batch() -> None:
    queries = [("a", np.full((1, 1, 3), value, np.uint8)) for value in (3, 0, 5)]
    found = answer_each(_Fragile(), queries)  # type: ignore[arg-type]
    assert found == [[(3, 1.0)], "FloatingPointError: black", [(5, 1.0)]]
