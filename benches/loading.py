"""Images per second that training is fed: ``python -m benches.loading [--images N]``, about half a minute.

JPEG files, crops of two photographs, are read as training reads them (shuffled, cropped, flipped, normalised), by this
process and by workers. "decoded" decodes every image, "kept" does so and fills the cache, "cached" reads from it. Every
image from the cache is compared with the decoded one before anything is timed. The files stand in the page cache, so
disks do not count.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from bap.data import Domain, ImageFiles
from PIL import Image
from rich.console import Console

from benches.tables import Table

# Name, width and height of the files, shorter side after the resize, crop.
SIZES = (
    ("decathlon", 96, 72, 72, 64),
    ("sketch", 500, 375, 256, 224),
)
STATES = ("decoded", "kept", "cached")
_BATCH, _EPOCHS = 32, 3


def write_images(folder: Path, count: int, width: int, height: int) -> list[Path]:
    """Write different crops of scikit-learn's two photographs (640x427) as JPEG files of quality 90."""
    from sklearn.datasets import load_sample_images

    sources = [Image.fromarray(image) for image in load_sample_images().images]
    paths = []
    for number in range(count):
        source = sources[number % len(sources)]
        left, top = (number * 37) % (source.width - width), (number * 11) % (source.height - height)
        paths.append(folder / f"{number}.jpg")
        source.crop((left, top, left + width, top + height)).save(paths[-1], quality=90)
    return paths


def seconds_of_epoch(domain: Domain, epoch: int) -> float:
    """Return the time that one epoch of training takes to be loaded."""
    started = time.perf_counter()
    images = sum(len(x) for x, _ in domain.batches("train", _BATCH, ("loading", epoch)))
    spent = time.perf_counter() - started
    if not images:
        raise ValueError(f"loading: expected at least {_BATCH} images.")
    return spent / images


def measure(paths: list[Path], resize: int, size: int, workers: int, folder: Path) -> list[float]:
    """Return images per second in each of :data:`STATES`; workers are started before."""

    def domain_of(split: ImageFiles) -> Domain:
        return Domain("loading", ("one",), {"train": split}, size=size, flip=True)

    labels = torch.zeros(len(paths), dtype=torch.int64)
    plain, kept = (ImageFiles(paths, labels, resize, workers) for _ in range(2))
    every, cached = domain_of(plain), domain_of(kept)
    seconds_of_epoch(every, 0)
    decoded = statistics.median(seconds_of_epoch(every, epoch) for epoch in range(1, 1 + _EPOCHS))
    kept.keep_decoded(folder, 1 << 30)
    first = seconds_of_epoch(cached, 0)
    both = zip(every.batches("train", _BATCH, ("same",)), cached.batches("train", _BATCH, ("same",)), strict=True)
    if not all(torch.equal(a, b) for (a, _), (b, _) in both):
        raise AssertionError("loading: images from the cache differ from the decoded ones.")
    later = statistics.median(seconds_of_epoch(cached, epoch) for epoch in range(1, 1 + _EPOCHS))
    return [1 / spent for spent in (decoded, first, later)]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benches.loading", description=__doc__)
    parser.add_argument("--images", type=int, default=512, help="files of each size (default: %(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="numbers of them (default: 0 2)")
    args = parser.parse_args(argv)
    if args.images < _BATCH:
        parser.error(f"--images: expected at least {_BATCH}, got {args.images}")
    torch.set_num_threads(1)
    rows = []
    for name, width, height, resize, size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            paths = write_images(Path(folder), args.images, width, height)
            for workers in args.workers:
                rates = measure(paths, resize, size, workers, Path(folder, f"cache{workers}"))
                files = f"{name}, {width}x{height}"
                rows.append([files, str(size), str(workers), *(f"{rate:.0f}" for rate in rates)])
    columns = ["files", "crop", "workers", *STATES]
    Console().print(Table("Images per second", columns, rows).rich())


if __name__ == "__main__":
    main()
