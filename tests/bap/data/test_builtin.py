"""The built-in suite is the same in every run, of different images in its splits, and not trivial."""

from __future__ import annotations

import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from bap.data import BUILTIN_DOMAINS, VARIED_DOMAINS, Arrays, Domain, builtin_suite, order_of, random_of
from bap.data.builtin.drawn import GLYPHS, SHAPES
from bap.data.builtin.signs import SIGNS
from bap.data.builtin.textures import TEXTURES
from bap.data.builtin.things import THINGS

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def suite() -> dict[str, Domain]:
    return builtin_suite(images=100)


@pytest.fixture(scope="module")
def varied() -> dict[str, Domain]:
    return builtin_suite(images=100, suite="varied")


def _code(suite: dict[str, Domain]) -> int:
    value = 0
    for domain in suite.values():
        for split in domain.splits.values():
            assert isinstance(split, Arrays)
            value = zlib.crc32(split.images.numpy().tobytes() + split.labels.numpy().tobytes(), value)
    return value


def test_five_domains(suite: dict[str, Domain]) -> None:
    assert tuple(suite) == BUILTIN_DOMAINS
    counts = {name: len(domain.classes) for name, domain in suite.items()}
    expected = {"shapes": len(SHAPES), "digits": 10, "glyphs": len(GLYPHS), "textures": len(TEXTURES)}
    assert counts == {**expected, "signs": len(SIGNS)}
    for name, domain in suite.items():
        assert len(domain.splits["train"]) == (200 if name == "shapes" else 100)
        for split in domain.splits.values():
            assert isinstance(split, Arrays)
            assert split.images.shape[1:] == (3, 32, 32)
            assert set(split.labels.tolist()) <= set(range(counts[name]))
            # No image is flat.
            assert split.images.float().std((1, 2, 3)).min() > 4
        assert set(domain.splits["train"].labels.tolist()) == set(range(counts[name]))


def test_the_first_suite_stays_as_it_was(suite: dict[str, Domain]) -> None:
    # So that earlier results can be made again: means of the pixels, each with a weight of its own.
    expected = {
        "shapes": 194.7811,
        "digits": 177.2813,
        "glyphs": 308.1588,
        "textures": 188.2568,
        "signs": 109.8749,
    }
    for name, domain in suite.items():
        value = 0.0
        for split in domain.splits.values():
            x = split.images.double()
            value += float((x * torch.linspace(0, 1, x.numel()).double().reshape(x.shape)).mean())
        assert value == pytest.approx(expected[name], abs=1e-3), name


def test_ten_domains(varied: dict[str, Domain]) -> None:
    assert tuple(varied) == VARIED_DOMAINS
    classes = {name: len(domain.classes) for name, domain in varied.items() if name not in BUILTIN_DOMAINS}
    assert classes == {"things": len(THINGS), "letters": 26, "clocks": 12, "counts": 8, "faces": 12}
    assert len(varied["things"].splits["train"]) == 400
    for domain in varied.values():
        assert set(domain.splits["train"].labels.tolist()) == set(range(len(domain.classes)))
        for split in domain.splits.values():
            assert split.images.shape[1:] == (3, 32, 32)
            assert split.images.float().std((1, 2, 3)).min() > 4


@pytest.mark.parametrize("name", ["suite", "varied"])
def test_the_same_in_another_process(name: str, request: pytest.FixtureRequest) -> None:
    suite = request.getfixturevalue(name)
    script = (
        "import sys, zlib\nsys.path.insert(0, sys.argv[1])\nfrom bap.data import builtin_suite\nvalue = 0\n"
        "for domain in builtin_suite(images=100, suite=sys.argv[2]).values():\n"
        "    for split in domain.splits.values():\n"
        "        value = zlib.crc32(split.images.numpy().tobytes() + split.labels.numpy().tobytes(), value)\n"
        "print(value)\n"
    )
    command = [sys.executable, "-c", script, str(ROOT / "python"), {"suite": "builtin"}.get(name, name)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=300)
    assert int(done.stdout) == _code(suite)


def test_no_image_is_in_two_splits(suite: dict[str, Domain], varied: dict[str, Domain]) -> None:
    for domain in (*suite.values(), *varied.values()):
        seen = [{one.numpy().tobytes() for one in split.images} for split in domain.splits.values()]
        assert sum(len(one) for one in seen) == sum(len(split) for split in domain.splits.values())
        assert len(set.union(*seen)) == sum(len(one) for one in seen)


def test_scans_of_digits_are_of_one_split_only() -> None:
    from bap.data.builtin import suite as module

    _, digits = module.scans()
    order = random_of(1, "digits").permutation(len(digits))
    split = module._digits("test", 500)
    assert sorted(split.labels.tolist()) == sorted(digits[order[1297:]].tolist())


def test_nearest_class_mean_fails_on_the_suites(suite: dict[str, Domain], varied: dict[str, Domain]) -> None:
    for domain in (*suite.values(), *varied.values()):
        train, test = domain.splits["train"], domain.splits["test"]
        x = train.images.float().flatten(1)
        means = torch.stack([x[train.labels == k].mean(0) for k in range(len(domain.classes))])
        found = torch.cdist(test.images.float().flatten(1), means).argmin(1)
        assert (found == test.labels).float().mean() < 0.6, domain.name


def test_batches_depend_on_their_key_only(suite: dict[str, Domain]) -> None:
    domain = suite["textures"]
    one, same, other = (list(domain.batches("train", 32, key)) for key in ((0, 1), (0, 1), (0, 2)))
    assert len(one) == 3
    for (x, y), (u, v) in zip(one, same, strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)
    assert not torch.equal(one[0][0], other[0][0])
    # Another domain draws other numbers from the same key.
    first = next(suite["signs"].batches("train", 100, (0, 1)))[1]
    assert sorted(first.tolist()) == sorted(suite["signs"].splits["train"].labels.tolist())


def test_evaluation_takes_every_image_once_in_order(suite: dict[str, Domain]) -> None:
    domain = suite["glyphs"]
    batches = list(domain.batches("test", 16))
    images = torch.cat([x for x, _ in batches])
    raw = domain.splits["test"].images.float() / 255
    torch.testing.assert_close(images, (raw - 0.5) / 0.25)
    assert torch.equal(torch.cat([y for _, y in batches]), domain.splits["test"].labels)
    parts = [torch.cat([y for _, y in domain.batches("test", 16, None, rank, 3)]) for rank in range(3)]
    assert sorted(torch.cat(parts).tolist()) == sorted(domain.splits["test"].labels.tolist())


def test_processes_share_the_images_of_an_epoch() -> None:
    orders = [order_of(103, 10, random_of(5), rank, 2) for rank in range(2)]
    assert [len(one) for one in orders] == [5, 5]
    numbers = np.concatenate([np.concatenate(one) for one in orders])
    assert len(set(numbers.tolist())) == 100


def test_augmentation_moves_and_flips() -> None:
    ramp = torch.arange(32, dtype=torch.uint8).repeat(3, 32, 1)
    split = Arrays(ramp.expand(64, 3, 32, 32).contiguous(), torch.zeros(64, dtype=torch.int64))
    domain = Domain("ramp", ("a",), {"train": split}, 32, (0.0,) * 3, (1 / 255,) * 3, flip=True, padding=2)
    x, _ = next(domain.batches("train", 64, (0,)))
    steps = (x[:, 0, 0, 16] - x[:, 0, 0, 15]).round()
    assert set(steps.tolist()) == {-1.0, 1.0}
    middle = x[steps > 0][:, 0, 0, 16].round()
    assert set(middle.tolist()) == {14.0, 15, 16, 17, 18}
    still = Domain("ramp", ("a",), {"train": split}, 32, (0.0,) * 3, (1 / 255,) * 3, flip=False, padding=0)
    torch.testing.assert_close(next(still.batches("train", 64, (0,)))[0][0], ramp.float())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: builtin_suite(["faces"]), r"to be among \['shapes', .*got 'faces'"),
        (lambda: builtin_suite(["faces", "cars"], suite="varied"), r"to be among \['things', .*got 'cars'"),
        (lambda: builtin_suite(suite="embedded"), r"`suite` to be one of \['builtin', 'varied'\], got 'embedded'"),
        (lambda: builtin_suite(images=10), "`images` to be at least 100, got 10"),
        (lambda: Arrays(torch.zeros(2, 3, 8, 8), None), r"uint8, got \(2, 3, 8, 8\), torch.float32"),
        (lambda: Arrays(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(3)), r"to be \(2,\), int64, got"),
        (
            lambda: builtin_suite(["digits"], 100)["digits"].batches("dev", 2),
            "`split` of 'digits' to be one of .*'dev'",
        ),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
