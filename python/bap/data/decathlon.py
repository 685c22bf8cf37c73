"""Loader of the Visual Decathlon's files [P].

    <root>/annotations/<domain>_{train,val}.json, <domain>_test_stripped.json
    <root>/data/<domain>/{train,val}/0001/000001.jpg, data/<domain>/test/000001.jpg

The JSON is COCO's: images {id, file_name, ...}, annotations {image_id, category_id}, categories {id, name}. The folder
of an image is not always its class, so labels are taken from the JSON, joined by image_id.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, StrictInt, StrictStr, ValidationError

from bap.data.domain import SPLITS, Domain, Split
from bap.data.files import DECODED, DataError, ImageFiles, check_images
from bap.files import FileError, read_json

__all__ = ["DECATHLON", "DECATHLON_RESIZE", "load_decathlon"]

# (classes, train, val, test), mean, std, whether training crops at random and flips; means and deviations are published
# [P], and so are the domains without augmentation but for DTD [Q].
_Spec = tuple[tuple[int, int, int, int], tuple[float, ...], tuple[float, ...], bool]
DECATHLON: dict[str, _Spec] = {
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
# The shorter side, and the crop.
DECATHLON_RESIZE, _CROP = 72, 64
# Domains whose images the residual adapters' public loader takes whole, in training and evaluation [P].
_WHOLE = ("gtsrb", "omniglot", "svhn")
# Ids of a domain's categories follow a multiple of this [P].
_BLOCK = 10**7


def _fail(what: str, problems: list[str]) -> None:
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise DataError(f"load_decathlon(): expected {what} to be whole, got:{listed}")


class _Image(BaseModel):
    id: StrictInt
    file_name: Annotated[StrictStr, Field(min_length=1)]


class _Annotation(BaseModel):
    image_id: StrictInt
    category_id: StrictInt


class _Category(BaseModel):
    id: StrictInt
    name: StrictStr | StrictInt


class _File(BaseModel):
    """The required content of an annotation file; other entries, such as sizes, are ignored."""

    images: Annotated[list[_Image], Field(min_length=1)]
    annotations: list[_Annotation] = []
    categories: list[_Category] = []


def _annotations(path: Path) -> _File:
    try:
        read = read_json(path)
    except FileError as error:
        raise DataError(
            f"load_decathlon(): expected {path}, got none that can be read: {error} Hint: the user downloads and "
            "unpacks the benchmark; nothing is fetched here."
        ) from None
    if not isinstance(read, dict) or not isinstance(read.get("images"), list) or not read["images"]:
        raise DataError(f"load_decathlon(): expected {path} to list `images`, got {str(read)[:60]}.")
    try:
        return _File.model_validate(read)
    except ValidationError as error:
        entries = [f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}" for entry in error.errors(include_url=False)]
        more = [f"and {len(entries) - 5} more"] if len(entries) > 5 else []
        _fail(str(path), entries[:5] + more)
        raise AssertionError from None


def _outside(name: str) -> bool:
    """Whether a file's name leaves the folder of the data."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or not name.isprintable()


def _twice(values: Iterable[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]


def _labels(read: _File, path: Path, categories: dict[int, int]) -> tuple[dict[int, int], list[str]]:
    """{image id: label} and what is wrong with the annotations."""
    labels: dict[int, int] = {}
    problems = []
    known = {entry.id for entry in read.images}
    for entry in read.annotations:
        if entry.category_id not in categories:
            problems.append(
                f"{path.name}: image {entry.image_id} has category {entry.category_id}, which is not listed"
            )
        elif entry.image_id not in known:
            problems.append(f"{path.name}: image {entry.image_id} is annotated, but not listed")
        elif labels.setdefault(entry.image_id, categories[entry.category_id]) != categories[entry.category_id]:
            problems.append(f"{path.name}: image {entry.image_id} has two categories")
    return labels, problems


def _split(
    root: Path, domain: str, split: str, classes: dict[int, str] | None, workers: int, decode: int
) -> tuple[ImageFiles, dict[int, str]]:
    """One split, and {category id: name}, in the order of the labels."""
    path = root / "annotations" / f"{domain}_{split}.json"
    stripped = split == "test" and not path.exists()
    if stripped:
        path = root / "annotations" / f"{domain}_test_stripped.json"
    read = _annotations(path)
    problems = [f"{path.name}: category {id} is listed twice" for id in _twice(entry.id for entry in read.categories)]
    named = {entry.id: str(entry.name) for entry in sorted(read.categories, key=lambda entry: entry.id)}
    if classes is None:
        classes = named
        if not named:
            problems.append(f"{path.name}: no categories")
    elif named and named != classes:
        others = sorted(set(named.items()) ^ set(classes.items()))
        problems.append(f"{path.name}: categories other than those of the training images, such as {others[:3]}")
    labels, wrong = _labels(read, path, {identity: label for label, identity in enumerate(classes)})
    problems += wrong
    ids = [entry.id for entry in read.images]
    if len(set(ids)) != len(ids):
        problems.append(f"{path.name}: {len(ids) - len(set(ids))} image ids are used twice")
    problems += [f"{path.name}: {name} is listed twice" for name in _twice(entry.file_name for entry in read.images)]
    lacking = [] if stripped else [image for image in ids if image not in labels]
    if lacking:
        problems.append(f"{path.name}: {len(lacking)} images without annotation, such as {lacking[:3]}")
    outside = [entry.file_name for entry in read.images if _outside(entry.file_name)]
    problems += [f"{path.name}: {name!r} is not a file inside the folder of the data" for name in outside]
    _fail(f"{domain} ({split})", problems[:10] + ([f"and {len(problems) - 10} more"] if len(problems) > 10 else []))
    files = [root / entry.file_name for entry in read.images]
    _fail(f"{domain} ({split})", check_images(files, decode))
    known = None if stripped else torch.tensor([labels[image] for image in ids])
    return ImageFiles(files, known, DECATHLON_RESIZE, workers, ids, list(classes)), classes


def _names(root: Path, domains: Iterable[str] | None, size: int | None, splits: Sequence[str], full: bool) -> list[str]:
    """Names of the domains; raises if annotations that are required are missing."""
    present = [name for name in DECATHLON if (root / "annotations" / f"{name}_train.json").exists()]
    names = list(domains) if domains is not None else list(DECATHLON) if full and present else present
    if not names:
        raise DataError(f"load_decathlon(): expected annotations of the decathlon in {root / 'annotations'}, got none.")
    if size is not None and size > DECATHLON_RESIZE:
        raise DataError(
            f"load_decathlon(): expected `size` to be at most {DECATHLON_RESIZE}, the shorter side of the images, got "
            f"{size}."
        )
    problems = []
    for name in names:
        if name not in DECATHLON:
            raise DataError(f"load_decathlon(): expected `domains` to be among {list(DECATHLON)}, got {name!r}.")
        lacking = [split for split in splits if not _has(root, name, split)]
        if full and lacking and present:
            problems.append(f"{name}: no annotations of {', '.join(lacking)} in {root / 'annotations'}")
    if problems:
        problems.append("Hint: nothing is fetched here; full=False, or --set full=false, accepts an extract")
    _fail("the decathlon", problems)
    return names


def _has(root: Path, name: str, split: str) -> bool:
    endings = ("", "_stripped") if split == "test" else ("",)
    return any((root / "annotations" / f"{name}_{split}{end}.json").exists() for end in endings)


def load_decathlon(
    root: str | Path,
    domains: Iterable[str] | None = None,
    size: int | None = None,
    workers: int = 0,
    full: bool = True,
    decode: int = DECODED,
    splits: Sequence[str] = SPLITS,
    crops: str = "papers",
) -> dict[str, Domain]:
    """The domains of the Visual Decathlon, checked.

    Args:
        root: folder that has ``annotations`` and ``data``.
        domains: names; None takes all ten, or, if not ``full``, those of the ten that have annotations.
        size: of the crop, at most 72; None is 64, cut from images whose shorter side is 72.
        workers: processes that decode images.
        full: whether all ``splits`` must exist, and the numbers of images and classes must be the published ones;
            False accepts an extract, which has ``train`` at least.
        decode: images of each split that are decoded to check them; -1: all.
        splits: which are loaded, ``train`` in any case.
        crops: ``papers``: training crops at random and flips but for DTD, GTSRB, Omniglot and SVHN, which have the
            middle of their images; ``rebuffi``: as the residual adapters' public loader [P]: DTD is cropped and
            flipped, too, and GTSRB, Omniglot and SVHN have the middle 72 of their pixels.

    Raises:
        DataError: if files are missing or broken, ids or labels do not fit, or numbers differ; problems are named.
    """
    root = Path(root)
    splits = [part for part in SPLITS if part in splits or part == "train"]
    loaded = {}
    for name in _names(root, domains, size, splits, full):
        (count, *counts), mean, std, augmented = DECATHLON[name]
        side = size or _CROP
        if crops == "rebuffi":
            augmented = name not in _WHOLE
            side = side if augmented else DECATHLON_RESIZE
        parts: dict[str, Split] = {}
        classes: dict[int, str] | None = None
        files: dict[str, list[Path]] = {}
        for split in splits:
            if split == "train" or _has(root, name, split):
                images, classes = _split(root, name, split, classes, workers, decode)
                parts[split], files[split] = images, images.paths
        assert classes is not None
        problems = []
        # Test images must not occur in another split.
        for split in [part for part in parts if part != "train"]:
            both = set(files["train"]) & set(files[split])
            if both:
                problems.append(f"{len(both)} images are in train and in {split}, such as {sorted(both)[0]}")
        if full:
            # The numbers of ImageNet's images are those of its extract, which could not be checked.
            expected = dict(zip(SPLITS, counts, strict=True)) if name != "imagenet12" else {}
            differences = [] if len(classes) == count else [f"{len(classes)} classes, expected {count}"]
            first = min(classes) // _BLOCK * _BLOCK
            if sorted(classes) != list(range(first + 1, first + len(classes) + 1)):
                differences.append(
                    f"categories {min(classes)} to {max(classes)}, expected 1 to {len(classes)} beyond a multiple of "
                    f"{_BLOCK:,}"
                )
            for split in parts:
                if len(parts[split]) != expected.get(split, len(parts[split])):
                    differences.append(f"{len(parts[split])} {split} images, expected {expected[split]}")
            if differences:
                differences.append("Hint: full=False, or --set full=false, accepts an extract")
            problems += differences
        _fail(name, problems)
        loaded[name] = Domain(
            name,
            tuple(classes.values()),
            parts,
            side,
            mean=(mean[0], mean[1], mean[2]),
            std=(std[0], std[1], std[2]),
            flip=augmented,
            crop=augmented,
        )
    return loaded
