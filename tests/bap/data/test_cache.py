"""Decoded images on the disk: the same pixels, decoded once, bounded, and never taken for what they are not."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from bap.config import Config
from bap.data import DataError, Domain, ImageFiles
from bap.data.cache import PixelCache
from bap.files import FileError
from bap.train.domains import load_domains
from PIL import Image


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    random = np.random.default_rng(0)
    found = []
    for number, (width, height) in enumerate([(90, 60), (60, 90), (72, 72), (40, 50), (80, 72), (72, 100)]):
        path = tmp_path / f"{number}.png"
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        found.append(path)
    return found


def _split(paths: list[Path], workers: int = 0) -> ImageFiles:
    return ImageFiles(paths, torch.tensor([0, 1] * 3), 72, workers)


def _batches(split: ImageFiles, key: tuple[int, ...] | None = None) -> list[torch.Tensor]:
    domain = Domain("a", ("x", "y"), {"train": split}, 64, flip=True)
    return [x for x, _ in split.batches(domain, 2, key)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("key", [None, (1, 2)])
def test_kept_pixels_give_the_same_batches(
    paths: list[Path], tmp_path: Path, workers: int, key: tuple[int, ...] | None
) -> None:
    expected = _batches(_split(paths), key)
    split = _split(paths, workers)
    reserved = split.keep_decoded(tmp_path / "cache", 10**6)
    assert reserved == 3 * 72 * (108 + 108 + 72 + 90 + 80 + 100)
    for _ in range(2):
        for found, wanted in zip(_batches(split, key), expected, strict=True):
            assert torch.equal(found, wanted)
    assert split.cache is not None
    assert all(split.cache.get(number) is not None for number in range(6))
    # Another process takes them from there: the images are not opened any more.
    again = pickle.loads(pickle.dumps(split))
    times = [path.stat() for path in paths]
    for path, state in zip(paths, times, strict=True):
        path.write_bytes(b"\0" * state.st_size)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    for one in (again, _kept(paths, tmp_path)):
        for found, wanted in zip(_batches(one, key), expected, strict=True):
            assert torch.equal(found, wanted)


def _kept(paths: list[Path], tmp_path: Path, most: int = 10**6) -> ImageFiles:
    split = _split(paths)
    split.keep_decoded(tmp_path / "cache", most)
    return split


def test_the_size_is_bounded(paths: list[Path], tmp_path: Path) -> None:
    most = 3 * 72 * (108 + 108) + 5
    split = _kept(paths, tmp_path, most)
    assert split.cache is not None
    assert (split.cache.images, split.cache.bytes) == (2, 3 * 72 * 216)
    for found, wanted in zip(_batches(split), _batches(_split(paths)), strict=True):
        assert torch.equal(found, wanted)
    assert [split.cache.get(number) is not None for number in range(6)] == [True, True, False, False, False, False]
    files = {path.suffix: path.stat().st_size for path in (tmp_path / "cache").iterdir()}
    assert files[".pixels"] <= most
    assert files[".sums"] == 8
    none = _kept(paths, tmp_path, 0)
    assert len(_batches(none)) == 3


def test_damage_and_other_images_are_found(paths: list[Path], tmp_path: Path) -> None:
    split = _kept(paths, tmp_path)
    expected = _batches(split)
    (pixels,) = (tmp_path / "cache").glob("*.pixels")
    data = bytearray(pixels.read_bytes())
    data[100] ^= 1
    pixels.write_bytes(data)
    again = _kept(paths, tmp_path)
    assert again.cache is not None
    assert again.cache.get(0) is None
    assert again.cache.get(1) is not None
    assert torch.equal(_batches(again)[0], expected[0])
    assert again.cache.get(0) is not None
    # An image that was replaced is another one, and so is another size.
    Image.new("RGB", (72, 72), "red").save(paths[2])
    os.utime(paths[2], ns=(0, time.time_ns() + 10**9))
    changed = _kept(paths, tmp_path)
    assert changed.cache is not None
    assert changed.cache.get(1) is None
    assert not torch.equal(_batches(changed)[1], expected[1])
    assert PixelCache(tmp_path / "cache", paths, (64, 64), 10**6).get(0) is None


def test_what_cannot_be_kept_is_named(paths: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match=r"to keep 6 images in .*file, got .*Hint: a smaller cache_gib"):
        PixelCache(tmp_path / "file", paths, 72, 10**6)
    paths[3].write_bytes(b"no image")
    with pytest.raises(FileError, match=r"3\.png: no image of the formats"):
        PixelCache(tmp_path / "cache", paths, 72, 10**6)


def test_workers_of_training_images_stay(paths: list[Path]) -> None:
    split = _split(paths, 2)
    domain = Domain("a", ("x", "y"), {"train": split}, 64, flip=True)
    plain = Domain("a", ("x", "y"), {"train": _split(paths)}, 64, flip=True)

    def workers() -> list[int]:
        assert split._loader is not None
        iterator = split._loader[2]._iterator
        assert iterator is not None
        return [worker.pid for worker in iterator._workers]  # type: ignore[attr-defined]

    seen = []
    for epoch in range(3):
        found = [x for x, _ in domain.batches("train", 2, (0, epoch))]
        wanted = [x for x, _ in plain.batches("train", 2, (0, epoch))]
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        seen.append(workers())
        # A part of an epoch, as for the statistics of batch norm, and two streams at once, leave nothing behind.
        first = next(iter(domain.batches("train", 2, (1, epoch))))[0]
        assert torch.equal(first, next(iter(plain.batches("train", 2, (1, epoch))))[0])
        streams = [domain.batches("train", 2, (2, epoch)) for _ in range(2)]
        for one, two in zip(*streams, strict=True):
            assert torch.equal(one[0], two[0])
    assert seen[0] == seen[1] == seen[2]
    # Images as they are need no random order; their workers end.
    list(domain.batches("train", 2))
    paths[0].write_bytes(b"no image")
    with pytest.raises(DataError, match=r"expected .*0\.png to be an image"):
        list(domain.batches("train", 2, (0, 0)))
    Image.new("RGB", (80, 80)).save(paths[0])
    assert len(list(domain.batches("train", 2, (0, 0)))) == 3


def test_the_processes_that_wait_are_bounded(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bap.data.files._MOST_WAITING", 2)
    monkeypatch.setattr("bap.data.files._waiting", [])
    splits = [_split(paths, 1) for _ in range(3)]
    domains = [Domain(f"d{n}", ("x", "y"), {"train": split}, 64) for n, split in enumerate(splits)]
    for domain in domains:
        list(domain.batches("train", 2, (0,)))
    # The one that has waited longest made room.
    assert [split._loader is not None for split in splits] == [False, True, True]
    running = [iter(domain.batches("train", 2, (0,))) for domain in domains[1:]]
    for stream in running:
        next(stream)
    list(domains[0].batches("train", 2, (0,)))
    assert [split._loader is not None for split in splits] == [False, True, True]
    greedy = _split(paths, 3)
    assert len(_batches(greedy, (0,))) == 3
    assert greedy._loader is None


def test_settings_bound_all_splits_together(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("a", "b"):
            folder = tmp_path / "flowers" / split / name
            folder.mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (37, 37), (number, 0, 0)).save(folder / f"{number}.png")
    each = 3 * 37 * 37
    config = Config(
        data="sketch", root=str(tmp_path), domains=["flowers"], source="flowers", full=False, size=32,
        cache=str(tmp_path / "cache"), cache_gib=8 * each / 2**30,
    )  # fmt: skip
    domain = load_domains(config)["flowers"]
    caches = [split.cache.images for split in (domain.splits["train"], domain.splits["test"])]
    assert caches == [6, 2]
    assert domain.splits["val"] is domain.splits["test"]
