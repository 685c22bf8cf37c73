"""Decoded images on disk: 8-bit pixels in one memory-mapped file for each split, of a bounded size.

An image is decoded and resized once, in whichever worker needs it first, and read from then on. Pixels carry a
checksum: what a crash left half-written is decoded again. The files' names come from the names, sizes and times of the
images and the size they are resized to, so changed images have another file.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bap.data.images import DataError, image_size
from bap.files import FileError, digest_of

__all__ = ["PixelCache", "resized"]


def resized(width: int, height: int, resize: int | tuple[int, int]) -> tuple[int, int]:
    """Width and height after a resize: of the shorter side, keeping the aspect, or to (height, width).

    Examples:
        >>> from bap.data.cache import resized
        >>> resized(90, 60, 72), resized(90, 60, (32, 48))
        ((108, 72), (48, 32))
    """
    if isinstance(resize, int):
        factor = resize / min(width, height)
        return max(resize, round(width * factor)), max(resize, round(height * factor))
    return resize[1], resize[0]


class PixelCache:
    """The decoded images of one split.

    The space is reserved on the disk at once, so that no write can fail for want of it.

    Args:
        folder: where the files go; created if it is missing.
        paths: of the images.
        resize: as in :class:`bap.data.ImageFiles`.
        most: bytes of pixels; images beyond it, in the order of ``paths``, are decoded every time.

    Attributes:
        bytes: reserved for pixels.
        images: that have room.

    Raises:
        FileError: if the folder cannot be written, or the disk has less room.
    """

    def __init__(self, folder: str | Path, paths: Sequence[Path], resize: int | tuple[int, int], most: int) -> None:
        states = [os.stat(path) for path in paths]
        named = [[str(path), state.st_size, state.st_mtime_ns] for path, state in zip(paths, states, strict=True)]
        key = digest_of([list(resize) if isinstance(resize, tuple) else resize, most, named])[:24]
        self._base = Path(folder) / key
        self._views: tuple[Any, Any] | None = None
        sizes = np.zeros((len(paths), 2), np.int64)
        offsets = np.full(len(paths), -1, np.int64)
        index = self._base.with_suffix(".index.npy")
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            if index.exists():
                read = np.load(index)
                offsets, sizes = read[:, 0].copy(), read[:, 1:].copy()
            else:
                used = 0
                for number, path in enumerate(paths):
                    try:
                        width, height = image_size(path)
                    except DataError as error:
                        raise DataError(f"{path}: {error}") from None
                    width, height = resized(width, height, resize)
                    if used + 3 * width * height > most:
                        break
                    offsets[number], sizes[number] = used, (height, width)
                    used += 3 * width * height
                part = index.with_name(f".{index.name}.{os.getpid()}.npy")
                np.save(part, np.column_stack([offsets, sizes]))
                os.replace(part, index)
            self.images = int((offsets >= 0).sum())
            self.bytes = int((3 * sizes.prod(1))[offsets >= 0].sum())
            for suffix, length in ((".pixels", self.bytes), (".sums", 4 * self.images)):
                with open(self._base.with_suffix(suffix), "ab") as file:
                    if length and os.fstat(file.fileno()).st_size < length:
                        os.posix_fallocate(file.fileno(), 0, length)
        except (OSError, ValueError) as error:
            raise FileError(
                f"PixelCache(): expected to keep {len(paths)} images in {folder}, got {error}. Hint: a smaller "
                "cache_gib, or no cache."
            ) from None
        self._offsets, self._sizes = offsets, sizes

    def __getstate__(self) -> dict[str, Any]:
        # Every process maps the files itself.
        return {**self.__dict__, "_views": None}

    def _mapped(self) -> tuple[Any, Any]:
        if self._views is None:
            pixels = np.memmap(self._base.with_suffix(".pixels"), np.uint8, "r+", shape=(self.bytes,))
            sums = np.memmap(self._base.with_suffix(".sums"), np.uint32, "r+", shape=(self.images,))
            self._views = pixels, sums
        return self._views

    def get(self, number: int) -> np.ndarray | None:
        """Pixels of an image, (height, width, 3), uint8; None where they are not there yet, or have no room."""
        if self._offsets[number] < 0:
            return None
        pixels, sums = self._mapped()
        height, width = self._sizes[number]
        start = self._offsets[number]
        image = np.array(pixels[start : start + 3 * height * width])
        if int(sums[number]) != (zlib.crc32(image.data) or 1):
            return None
        return image.reshape(height, width, 3)

    def put(self, number: int, image: np.ndarray) -> None:
        """Keeps the pixels of an image, if it has room; two processes that do so at once write the same."""
        if self._offsets[number] < 0 or image.shape[:2] != tuple(self._sizes[number]):
            return
        pixels, sums = self._mapped()
        start, flat = self._offsets[number], np.ascontiguousarray(image).reshape(-1)
        pixels[start : start + len(flat)] = flat
        # Zero means that nothing is there.
        sums[number] = zlib.crc32(flat.data) or 1
