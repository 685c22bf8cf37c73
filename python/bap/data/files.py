"""Images in files: checked before training, decoded in worker processes, augmented the same in every run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bap.data.domain import Domain, Split, order_of, random_of
from bap.data.images import DataError, open_image, seems_cut

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


class _Batches(Dataset):
    """One item is one batch, so that augmentation does not depend on which worker makes it."""

    def __init__(self, split: ImageFiles, domain: Domain, order: list[np.ndarray], key: tuple[int | str, ...] | None):
        self.split, self.domain, self.order, self.key = split, domain, order, key

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor] | DataError:
        chosen = self.order[number]
        random = None if self.key is None else random_of(*self.key, number)
        try:
            x = torch.stack([self.split.image(int(image), self.domain, random) for image in chosen])
        except DataError as error:
            # Raised where the batch is asked for: a worker would add its traceback to the message.
            return error
        labels = self.split.labels
        y = torch.full((len(chosen),), -1) if labels is None else labels[torch.from_numpy(chosen)]
        return x, y


class ImageFiles(Split):
    """Images in files.

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
        from PIL import Image

        try:
            image = open_image(self.paths[number])
        except DataError as error:
            raise DataError(f"ImageFiles: expected {self.paths[number]} to be an image, got {error}.") from None
        width, height = image.size
        if isinstance(self.resize, int):
            factor = self.resize / min(width, height)
            width, height = max(self.resize, round(width * factor)), max(self.resize, round(height * factor))
        else:
            height, width = self.resize
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        size = domain.size
        if min(width, height) < size:
            raise DataError(
                f"ImageFiles: expected {domain.name!r} to be resized to at least its crop, {size}, "
                f"got {height} x {width}."
            )
        left, top = (width - size) // 2, (height - size) // 2
        flip = False
        if random is not None:
            if domain.crop:
                left, top = int(random.integers(0, width - size + 1)), int(random.integers(0, height - size + 1))
            flip = domain.flip and bool(random.random() < 0.5)
        pixels = np.asarray(image, dtype=np.float32)[top : top + size, left : left + size] / 255
        if flip:
            pixels = pixels[:, ::-1]
        pixels = (pixels - np.array(domain.mean, np.float32)) / np.array(domain.std, np.float32)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))

    def batches(
        self, domain: Domain, batch: int, key: tuple[int | str, ...] | None, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As in :meth:`Split.batches`."""
        order = order_of(len(self), batch, None if key is None else random_of(*key), rank, world)
        dataset = _Batches(self, domain, order, None if key is None else (*key, rank))
        for item in DataLoader(dataset, batch_size=None, num_workers=self.workers):
            if isinstance(item, DataError):
                raise item
            yield item
