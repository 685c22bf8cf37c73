"""The Visual Decathlon as it lies on disk [P].

    <root>/annotations/<domain>_{train,val}.json, <domain>_test_stripped.json
    <root>/data/<domain>/{train,val}/0001/000001.jpg, data/<domain>/test/000001.jpg

The JSON is COCO's: images {id, file_name, ...}, annotations {image_id, category_id}, categories {id, name}. The folder
of an image is not always its class, so labels are taken from the JSON, joined by image_id.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from bap.data.domain import Domain, Split
from bap.data.files import DataError, ImageFiles, check_images
from bap.files import FileError, read_json

__all__ = ["DECATHLON", "load_decathlon"]

# (classes, train, val, test), mean, std, whether training flips; means and deviations are published [P].
_Facts = tuple[tuple[int, int, int, int], tuple[float, ...], tuple[float, ...], bool]
DECATHLON: dict[str, _Facts] = {
    "imagenet12": ((1000, 1232167, 49000, 48238), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), True),
    "aircraft": ((100, 3334, 3333, 3333), (0.4798, 0.5107, 0.5344), (0.2107, 0.2051, 0.2373), True),
    "cifar100": ((100, 40000, 10000, 10000), (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), True),
    "daimlerpedcls": ((2, 23520, 5880, 19600), (0.482,) * 3, (0.2361,) * 3, True),
    "dtd": ((47, 1880, 1880, 1880), (0.527, 0.4703, 0.424), (0.2523, 0.2409, 0.2499), False),
    "gtsrb": ((43, 31367, 7842, 12630), (0.3392, 0.3118, 0.3205), (0.2756, 0.2658, 0.2709), False),
    "omniglot": ((1623, 17853, 6492, 8115), (0.081,) * 3, (0.2705,) * 3, False),
    "svhn": ((10, 47217, 26040, 26032), (0.4377, 0.4438, 0.4728), (0.198, 0.201, 0.197), False),
    "ucf101": ((101, 7585, 1952, 3783), (0.4995,) * 3, (0.109,) * 3, True),
    "vgg-flowers": ((102, 1020, 1020, 6149), (0.4341, 0.3831, 0.2971), (0.2851, 0.2384, 0.264), True),
}
_RESIZE, _CROP = 72, 64


def _fail(what: str, problems: list[str]) -> None:
    if problems:
        listed = "".join(f"\n  {one}" for one in problems)
        raise DataError(f"load_decathlon(): expected {what} to be whole, got:{listed}")


def _annotations(path: Path) -> dict[str, Any]:
    try:
        read = read_json(path)
    except FileError as error:
        raise DataError(
            f"load_decathlon(): expected {path}, got none that can be read: {error} Hint: the user downloads and "
            "unpacks the benchmark; nothing is fetched here."
        ) from None
    if not isinstance(read, dict) or not isinstance(read.get("images"), list) or not read["images"]:
        raise DataError(f"load_decathlon(): expected {path} to list `images`, got {str(read)[:60]}.")
    return read


def _split(
    root: Path, domain: str, split: str, categories: dict[int, int] | None, workers: int, decode: int
) -> tuple[ImageFiles, dict[int, int], list[str]]:
    """One split with {category id: label} and names of the classes."""
    path = root / "annotations" / f"{domain}_{split}.json"
    stripped = split == "test" and not path.exists()
    if stripped:
        path = root / "annotations" / f"{domain}_test_stripped.json"
    read = _annotations(path)
    named = sorted(read.get("categories", []), key=lambda one: one["id"])
    if categories is None:
        categories = {one["id"]: label for label, one in enumerate(named)}
    names = [str(one["name"]) for one in named]
    labels: dict[int, int] = {}
    problems = []
    for one in read.get("annotations", []):
        if one["category_id"] not in categories:
            problems.append(
                f"{path.name}: image {one['image_id']} has category {one['category_id']}, which is not listed"
            )
        elif labels.setdefault(one["image_id"], categories[one["category_id"]]) != categories[one["category_id"]]:
            problems.append(f"{path.name}: image {one['image_id']} has two categories")
    ids = [one["id"] for one in read["images"]]
    if len(set(ids)) != len(ids):
        problems.append(f"{path.name}: {len(ids) - len(set(ids))} image ids are used twice")
    lacking = [] if stripped else [one for one in ids if one not in labels]
    if lacking:
        problems.append(f"{path.name}: {len(lacking)} images without annotation, such as {lacking[:3]}")
    files = [root / one["file_name"] for one in read["images"]]
    _fail(f"{domain} ({split})", problems[:10] + check_images(files, decode))
    known = None if stripped else torch.tensor([labels[one] for one in ids])
    made = ImageFiles(files, known, _RESIZE, workers, ids, list(categories))
    return made, categories, names


def load_decathlon(
    root: str | Path,
    domains: Iterable[str] | None = None,
    size: int | None = None,
    workers: int = 0,
    full: bool = True,
    decode: int = 16,
) -> dict[str, Domain]:
    """The domains of the Visual Decathlon, checked.

    Args:
        root: folder that has ``annotations`` and ``data``.
        domains: names; None takes those of the ten that have annotations there.
        size: of the crop; None is 64, cut from images whose shorter side is 72.
        workers: processes that decode images.
        full: whether the numbers of images and classes must be the published ones; False accepts an extract.
        decode: images of each split that are decoded to check them; -1: all.

    Raises:
        DataError: if files are missing or broken, ids or labels do not fit, or numbers differ; problems are named.
    """
    root = Path(root)
    names = (
        list(domains)
        if domains is not None
        else [name for name in DECATHLON if (root / "annotations" / f"{name}_train.json").exists()]
    )
    if not names:
        raise DataError(f"load_decathlon(): expected annotations of the decathlon in {root / 'annotations'}, got none.")
    made = {}
    for name in names:
        if name not in DECATHLON:
            raise DataError(f"load_decathlon(): expected `domains` to be among {list(DECATHLON)}, got {name!r}.")
        (classes, *counts), mean, std, flip = DECATHLON[name]
        splits: dict[str, Split] = {}
        train, categories, titles = _split(root, name, "train", None, workers, decode)
        splits["train"] = train
        for split in ("val", "test"):
            if any((root / "annotations" / f"{name}_{split}{end}.json").exists() for end in ("", "_stripped")):
                splits[split] = _split(root, name, split, categories, workers, decode)[0]
        if full:
            problems = [] if len(categories) == classes else [f"{len(categories)} classes, expected {classes}"]
            for split, expected in zip(("train", "val", "test"), counts, strict=True):
                # The numbers of ImageNet's images are those of its extract, which was not at hand to check.
                if split in splits and len(splits[split]) != expected and name != "imagenet12":
                    problems.append(f"{len(splits[split])} {split} images, expected {expected}")
            if problems:
                problems.append("Hint: full=False, or --set full=false, accepts an extract")
            _fail(name, problems)
        made[name] = Domain(
            name,
            tuple(titles),
            splits,
            size or _CROP,
            mean=(mean[0], mean[1], mean[2]),
            std=(std[0], std[1], std[2]),
            flip=flip,
        )
    return made
