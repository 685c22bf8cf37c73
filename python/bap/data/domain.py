"""A domain: images, classes, and batches that are the same in every run with the same seed."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["SPLITS", "Arrays", "Domain", "Split", "order_of", "random_of"]

SPLITS = ("train", "val", "test")


def random_of(*key: int | str) -> np.random.Generator:
    """A generator that depends on its key only, so that a resumed run draws the same numbers."""
    numbers = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(numbers)))


def order_of(
    count: int, batch: int, shuffled: np.random.Generator | None, rank: int = 0, world: int = 1
) -> list[np.ndarray]:
    """Numbers of the images of each batch.

    Args:
        count: images.
        batch: images of a batch on one process.
        shuffled: draws the order of training, whose last, incomplete batch is left out unless it is the only one; None
            keeps the order and all images.
        rank, world: this process and their number; in training every process gets as many batches.

    Examples:
        >>> from bap.data import order_of, random_of
        >>> [batch.tolist() for batch in order_of(5, 2, None)]
        [[0, 1], [2, 3], [4]]
        >>> [len(batch) for batch in order_of(5, 2, random_of(0))]
        [2, 2]
    """
    if shuffled is None:
        numbers = np.arange(count)[rank::world]
        return [numbers[start : start + batch] for start in range(0, len(numbers), batch)]
    numbers = shuffled.permutation(count)
    each = count // world
    numbers = numbers[rank * each : (rank + 1) * each]
    if len(numbers) < batch:
        return [numbers] if len(numbers) else []
    return [numbers[start : start + batch] for start in range(0, len(numbers) - batch + 1, batch)]


class Split(ABC):
    """Images with labels, or without where a benchmark hides them."""

    labels: Tensor | None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batches(
        self, domain: Domain, batch: int, key: tuple[int | str, ...] | None, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images (N, 3, H, W), float32, and labels (N,), int64, -1 where there are none.

        Args:
            domain: whose split this is.
            batch: images of a batch.
            key: of the random order and augmentation of training; None gives the images as they are, in order.
            rank, world: as in :func:`order_of`.
        """

    def joined(self, other: Split) -> Split:
        """The images of both, these first; without labels where one has none.

        Raises:
            ValueError: if they are of different kinds or sizes.
        """
        raise ValueError(f"joined(): expected splits that can be joined, got {type(self).__name__}.")


class Arrays(Split):
    """Images in memory.

    Args:
        images: (N, 3, H, W), uint8.
        labels: (N,), int64, or None.

    Raises:
        ValueError: for other shapes, dtypes or lengths.

    Examples:
        >>> import torch
        >>> from bap.data import Arrays, Domain
        >>> split = Arrays(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0]))
        >>> domain = Domain("dots", ("a", "b"), {"train": split}, size=8)
        >>> [x.shape for x, y in split.batches(domain, 2, None)]
        [torch.Size([2, 3, 8, 8]), torch.Size([1, 3, 8, 8])]
    """

    def __init__(self, images: Tensor, labels: Tensor | None) -> None:
        if images.dim() != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
            raise ValueError(
                f"Arrays(): expected `images` to be (N, 3, H, W), uint8, got {tuple(images.shape)}, {images.dtype}."
            )
        if labels is not None and (labels.shape != images.shape[:1] or labels.dtype != torch.int64):
            raise ValueError(
                f"Arrays(): expected `labels` to be ({len(images)},), int64, got {tuple(labels.shape)}, {labels.dtype}."
            )
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def joined(self, other: Split) -> Arrays:
        """As in :meth:`Split.joined`."""
        if not isinstance(other, Arrays) or other.images.shape[1:] != self.images.shape[1:]:
            raise ValueError("joined(): expected `other` to be images in memory of the same size, got others.")
        known = None
        if self.labels is not None and other.labels is not None:
            known = torch.cat([self.labels, other.labels])
        return Arrays(torch.cat([self.images, other.images]), known)

    def batches(
        self, domain: Domain, batch: int, key: tuple[int | str, ...] | None, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As in :meth:`Split.batches`; training crops at random after padding, and flips where the domain allows it."""
        random = None if key is None else random_of(*key)
        mean = torch.tensor(domain.mean).view(3, 1, 1)
        std = torch.tensor(domain.std).view(3, 1, 1)
        for numbers in order_of(len(self), batch, random, rank, world):
            chosen = torch.from_numpy(numbers)
            x = (self.images[chosen].float() / 255 - mean) / std
            if random is not None:
                x = _augmented(x, random, domain.padding, domain.flip)
            labels = torch.full((len(x),), -1) if self.labels is None else self.labels[chosen]
            yield x, labels


def _augmented(x: Tensor, random: np.random.Generator, padding: int, flip: bool) -> Tensor:
    count, _, height, width = x.shape
    if padding:
        offsets = torch.from_numpy(random.integers(0, 2 * padding + 1, size=(2, count)))
        padded = torch.nn.functional.pad(x, (padding,) * 4, mode="replicate")
        rows = (offsets[0][:, None] + torch.arange(height))[:, None, :, None]
        columns = (offsets[1][:, None] + torch.arange(width))[:, None, None, :]
        x = padded[torch.arange(count)[:, None, None, None], torch.arange(3)[None, :, None, None], rows, columns]
    if flip:
        turned = torch.from_numpy(random.random(count) < 0.5)
        x = torch.where(turned[:, None, None, None], x.flip(-1), x)
    return x


@dataclass
class Domain:
    """A domain.

    Args:
        name: its name.
        classes: names of the classes; label k is the k-th.
        splits: {"train" | "val" | "test": Split}.
        size: height and width of a batch's images.
        mean, std: of the channels, of images in [0, 1].
        flip: whether training flips images left to right.
        crop: whether training crops image files at random; False takes the middle, as evaluation does.
        padding: pixels that training adds on each side before it crops at random; of images in memory.

    Raises:
        ValueError: for labels that no class has.
    """

    name: str
    classes: tuple[str, ...]
    splits: dict[str, Split]
    size: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.25, 0.25, 0.25)
    flip: bool = False
    padding: int = 2
    crop: bool = True

    def __post_init__(self) -> None:
        for name, split in self.splits.items():
            labels = split.labels
            if (
                labels is not None
                and len(labels)
                and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.classes)
            ):
                raise ValueError(
                    f"Domain(): expected labels of {self.name!r} ({name}) to be from 0 to {len(self.classes) - 1}, "
                    f"got {int(labels.min())} to {int(labels.max())}."
                )

    def batches(
        self, split: str, batch: int, key: tuple[int | str, ...] | None = None, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of one split, see :meth:`Split.batches`.

        Raises:
            ValueError: if there is no such split.
        """
        if split not in self.splits:
            raise ValueError(
                f"Domain.batches(): expected `split` of {self.name!r} to be one of {list(self.splits)}, got {split!r}."
            )
        return self.splits[split].batches(self, batch, None if key is None else (*key, self.name), rank, world)
