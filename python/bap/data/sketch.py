"""Loader of ImageNet-to-Sketch's files [P]: image folders <root>/<name>/{train,test}/<class>/<file>.

Images of the cropped sets are resized to the input's size directly; others to 256 on the shorter side, then cropped.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from bap.data.domain import Domain, Split
from bap.data.files import DECODED, DataError, ImageFiles, check_images

__all__ = ["SKETCH", "load_sketch", "sketch_resize"]

# Classes [P]; ImageNet, the source, is not one of the folders that are usually distributed.
SKETCH = {
    "imagenet": 1000,
    "cubs_cropped": 200,
    "stanford_cars_cropped": 196,
    "flowers": 102,
    "wikiart": 195,
    "sketches": 250,
}
_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".gif")
# Image formats that are refused, not skipped silently.
_REFUSED = (".tif", ".tiff", ".jp2", ".avif", ".heic", ".heif")


def sketch_resize(name: str, size: int) -> int | tuple[int, int]:
    """How images of a domain are resized for an input of ``size``, as in :class:`bap.data.ImageFiles`."""
    return (size, size) if "cropped" in name else round(size * 256 / 224)


def _folder(path: Path, classes: list[str], resize: int | tuple[int, int], workers: int, decode: int) -> ImageFiles:
    files: list[Path] = []
    labels: list[int] = []
    problems = []
    for label, name in enumerate(classes):
        entries = sorted((path / name).glob("*"))
        images = [file for file in entries if file.suffix.lower() in _ENDINGS]
        problems += [f"{file}: a format that is not read" for file in entries if file.suffix.lower() in _REFUSED]
        if not images:
            problems.append(f"{path / name}: no images")
        files += images
        labels += [label] * len(images)
    problems = problems[:10] + check_images(files, decode)
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise DataError(f"load_sketch(): expected {path} to be whole, got:{listed}")
    return ImageFiles(files, torch.tensor(labels), resize, workers)


def _classes(path: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"load_sketch(): expected {path} to be a folder that can be read, got {error}.") from None


def load_sketch(
    root: str | Path,
    domains: Iterable[str] | None = None,
    size: int | None = None,
    workers: int = 0,
    full: bool = True,
    decode: int = DECODED,
) -> dict[str, Domain]:
    """The domains of ImageNet-to-Sketch, checked. ``val`` is ``test``, as the benchmark has no third split.

    Args:
        root: folder that has the folders of the domains.
        domains: names; None takes all six, or, if not ``full``, those that exist.
        size: of the input; None is 224, cut from images whose shorter side is 256.
        workers: processes that decode images.
        full: whether the numbers of domains and classes must be the published ones.
        decode: images of each split that are decoded to check them; -1: all.

    Raises:
        DataError: if folders or images are missing or broken, or classes differ; problems are named.
    """
    root, size = Path(root), size or 224
    present = [name for name in SKETCH if (root / name / "train").is_dir()]
    names = list(domains) if domains is not None else list(SKETCH) if full and present else present
    if not names:
        raise DataError(f"load_sketch(): expected folders such as {root / 'flowers' / 'train'}, got none.")
    loaded = {}
    for name in names:
        if name not in SKETCH:
            raise DataError(f"load_sketch(): expected `domains` to be among {list(SKETCH)}, got {name!r}.")
        train, test = root / name / "train", root / name / "test"
        for folder in (train, test):
            if not folder.is_dir():
                raise DataError(
                    f"load_sketch(): expected the folder {folder}, got none. Hint: nothing is fetched here; "
                    "full=False, or --set full=false, takes the domains that are there."
                )
        classes, tested_classes = _classes(train), _classes(test)
        others = sorted(set(tested_classes) - set(classes))
        if others:
            raise DataError(f"load_sketch(): expected {test} to have classes of {train}, got others: {others[:5]}.")
        if full and len(classes) != SKETCH[name]:
            raise DataError(
                f"load_sketch(): expected {SKETCH[name]} classes in {train}, got {len(classes)}. "
                "Hint: full=False, or --set full=false, accepts an extract."
            )
        resize = sketch_resize(name, size)
        tested = _folder(test, classes, resize, workers, decode)
        splits: dict[str, Split] = {
            "train": _folder(train, classes, resize, workers, decode),
            "val": tested,
            "test": tested,
        }
        loaded[name] = Domain(
            name, tuple(classes), splits, size, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), flip=True
        )
    return loaded
