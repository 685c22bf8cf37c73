"""From a decoded image to the network's input, as evaluation does it; training crops at random and flips as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bap.data.cache import resized

__all__ = ["middle_of", "normalised", "resized_pixels"]


def resized_pixels(image: Any, resize: int | tuple[int, int]) -> np.ndarray:
    """Pixels of PIL's RGB image, (height, width, 3), uint8.

    Args:
        image: from :func:`bap.data.images.open_image`.
        resize: as in :class:`bap.data.ImageFiles`.
    """
    from PIL import Image

    width, height = image.size
    size = resized(width, height, resize)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    return np.asarray(image)


def middle_of(pixels: np.ndarray, size: int) -> np.ndarray:
    """The square of ``size`` in the middle of (height, width, 3)."""
    height, width = pixels.shape[:2]
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]


def normalised(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(3, height, width), float32, of pixels (height, width, 3), uint8.

    Args:
        pixels: the image.
        mean, std: of the channels, of images in [0, 1].

    Examples:
        >>> import numpy as np
        >>> from bap.data.transform import normalised
        >>> normalised(np.full((1, 1, 3), 255, np.uint8), (0.5, 0.5, 0.0), (0.5, 0.25, 1.0)).flatten().tolist()
        [1.0, 2.0, 1.0]
    """
    values = pixels.astype(np.float32) / 255
    values = (values - np.array(mean, np.float32)) / np.array(std, np.float32)
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))
