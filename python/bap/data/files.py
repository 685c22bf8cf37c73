"""Images in files: checked before training, decoded in worker processes, augmented the same in every run."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from bap.data.cache import PixelCache
from bap.data.domain import Domain, Split, order_of, random_of
from bap.data.images import DataError, open_image, seems_cut
from bap.data.transform import middle_of, normalised, resized_pixels

__all__ = ["DECODED", "DataError", "ImageFiles", "check_images"]

# Images of a split that are decoded before training, evenly spread.
DECODED = 16

# Files whose end marker is checked, evenly spread over a split; only ImageNet's has more: seconds, not minutes.
_LOOKED_AT = 200_000


def _problem(path: Path) -> str | None:
    try:
        open_image(path)
    except DataError as error:
        return f"{path}: cannot be decoded ({error})"
    return None


def check_images(paths: Sequence[Path], decode: int = DECODED, most: int = 10) -> list[str]:
    """What is wrong with image files.

    All must exist and not be empty. A sample is decoded as a whole. Of up to 200,000, evenly spread, the end is
    looked at: a JPEG or PNG that lacks the mark of its end is decoded, too.

    Args:
        paths: the files.
        decode: so many, evenly spread, are decoded in any case; -1 decodes all.
        most: problems that are named; the last one then says how many more there are.
    """
    problems = []
    step = 1 if decode < 0 else max(1, len(paths) // max(decode, 1))
    look = max(1, -(-len(paths) // _LOOKED_AT))
    for number, path in enumerate(paths):
        problem = None
        try:
            if not path.is_file():
                problem = f"{path}: no such file"
            elif path.stat().st_size == 0:
                problem = f"{path}: an empty file"
            elif number % step == 0 or (number % look == 0 and seems_cut(path)):
                problem = _problem(path)
        except (OSError, ValueError) as error:
            problem = f"{path}: cannot be read ({error})"
        if problem is not None:
            problems.append(problem)
    if len(problems) > most:
        problems = [*problems[:most], f"and {len(problems) - most} more"]
    return problems


# Images of a batch, and the key of its augmentation.
_Item = tuple[np.ndarray, tuple[int | str, ...] | None]
# Processes that wait for the next epoch; those of splits beyond it end with their epoch.
_MOST_WAITING = 32
_waiting: list[weakref.ref[ImageFiles]] = []


class _Batches(Dataset):
    """One item is one batch, so that augmentation does not depend on which worker makes it."""

    def __init__(self, split: ImageFiles, domain: Domain) -> None:
        self.split, self.domain = split, domain

    def __getitem__(self, item: _Item) -> tuple[Tensor, Tensor] | DataError:
        chosen, key = item
        random = None if key is None else random_of(*key)
        try:
            x = torch.stack([self.split.image(int(image), self.domain, random) for image in chosen])
        except DataError as error:
            # Raised where the batch is asked for: a worker would add its traceback to the message.
            return error
        labels = self.split.labels
        y = torch.full((len(chosen),), -1) if labels is None else labels[torch.from_numpy(chosen)]
        return x, y


class _Order(Sampler[_Item]):
    """The batches of an epoch; another epoch puts others here, for the same workers."""

    def __init__(self) -> None:
        self.items: list[_Item] = []

    def __iter__(self) -> Iterator[_Item]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


class ImageFiles(Split):
    """Images in files. Workers that decode training images stay from epoch to epoch.

    Args:
        paths: the files.
        labels: (N,), int64, or None.
        resize: an int resizes the shorter side, keeping the aspect; a pair is (height, width).
        workers: processes that decode.
        image_ids, category_ids: numbers of the images and of the classes in a benchmark's format.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Tensor | None,
        resize: int | tuple[int, int],
        workers: int = 0,
        image_ids: Sequence[int] | None = None,
        category_ids: Sequence[int] | None = None,
    ) -> None:
        self.paths = list(paths)
        self.labels = labels
        self.resize = resize
        self.workers = workers
        self.image_ids = None if image_ids is None else list(image_ids)
        self.category_ids = None if category_ids is None else list(category_ids)
        self.cache: PixelCache | None = None
        self._loader: tuple[Domain, _Order, DataLoader] | None = None
        self._busy = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loader": None, "_busy": False}

    def keep_decoded(self, folder: str | Path, most: int) -> int:
        """Keeps decoded images on the disk, see :class:`bap.data.cache.PixelCache`.

        Args:
            folder: for the files.
            most: bytes.

        Returns:
            The bytes that are reserved.

        Raises:
            FileError: if they cannot be.
        """
        self.cache = PixelCache(folder, self.paths, self.resize, most)
        return self.cache.bytes

    def __len__(self) -> int:
        return len(self.paths)

    def joined(self, other: Split) -> ImageFiles:
        """As in :meth:`Split.joined`."""
        if not isinstance(other, ImageFiles) or (other.resize, other.category_ids) != (self.resize, self.category_ids):
            raise ValueError("joined(): expected `other` to be image files of the same size and classes, got others.")
        known = None
        if self.labels is not None and other.labels is not None:
            known = torch.cat([self.labels, other.labels])
        ids = None
        if self.image_ids is not None and other.image_ids is not None:
            ids = [*self.image_ids, *other.image_ids]
        return ImageFiles([*self.paths, *other.paths], known, self.resize, self.workers, ids, self.category_ids)

    def image(self, number: int, domain: Domain, random: np.random.Generator | None) -> Tensor:
        """One normalised image, (3, size, size), cropped in the middle, or at random if domain and ``random`` allow.

        Raises:
            DataError: if the file cannot be decoded; it is named.
        """
        image = self._pixels(number)
        height, width = image.shape[:2]
        size = domain.size
        if min(width, height) < size:
            raise DataError(
                f"ImageFiles: expected {domain.name!r} to be resized to at least its crop, {size}, "
                f"got {height} x {width}."
            )
        pixels = middle_of(image, size)
        if random is not None:
            if domain.crop:
                left, top = int(random.integers(0, width - size + 1)), int(random.integers(0, height - size + 1))
                pixels = image[top : top + size, left : left + size]
            if domain.flip and bool(random.random() < 0.5):
                pixels = pixels[:, ::-1]
        return normalised(pixels, domain.mean, domain.std)

    def _pixels(self, number: int) -> np.ndarray:
        """One decoded, resized image, (height, width, 3), uint8."""
        kept = None if self.cache is None else self.cache.get(number)
        if kept is not None:
            return kept
        try:
            image = open_image(self.paths[number])
        except DataError as error:
            raise DataError(f"ImageFiles: expected {self.paths[number]} to be an image, got {error}.") from None
        pixels = resized_pixels(image, self.resize)
        if self.cache is not None:
            self.cache.put(number, pixels)
        return pixels

    def batches(
        self, domain: Domain, batch: int, key: tuple[int | str, ...] | None, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As in :meth:`Split.batches`."""
        order = order_of(len(self), batch, None if key is None else random_of(*key), rank, world)
        items = [(chosen, None if key is None else (*key, rank, number)) for number, chosen in enumerate(order)]
        stays = key is not None and self.workers > 0 and not self._busy and self._may_wait()
        if stays:
            self._busy = True
        try:
            for batch_or_error in self._load(domain, items, stays):
                if isinstance(batch_or_error, DataError):
                    raise batch_or_error
                yield batch_or_error
        finally:
            if stays:
                self._busy = False

    def _load(self, domain: Domain, items: list[_Item], stays: bool) -> DataLoader:
        """What gives the batches: the workers of the last epoch, new ones that stay, or some for once."""
        if stays and self._loader is not None and self._loader[0] is domain:
            _, order, loader = self._loader
            order.items = items
            return loader
        order = _Order()
        order.items = items
        loader = DataLoader(
            _Batches(self, domain),
            batch_size=None,
            sampler=order,
            num_workers=self.workers,
            persistent_workers=stays,
        )
        if stays:
            self._loader = domain, order, loader
        return loader

    def _may_wait(self) -> bool:
        """Whether this split's workers may stay; those that have waited longest make room."""
        others = [split for split in (entry() for entry in _waiting) if split is not None and split is not self]
        for split in [split for split in others if split._loader is None]:
            others.remove(split)
        while sum(split.workers for split in others) + self.workers > _MOST_WAITING:
            idle = next((split for split in others if not split._busy), None)
            if idle is None:
                break
            # Workers end when the loader does.
            idle._loader = None
            others.remove(idle)
        room = sum(split.workers for split in others) + self.workers <= _MOST_WAITING
        _waiting[:] = [weakref.ref(split) for split in (*others, *([self] if room else []))]
        if not room:
            self._loader = None
        return room
