"""Handwritten digits: scikit-learn's 8×8 images, enlarged, in colours, on uneven ground."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from bap.data.builtin.canvas import SIZE, coordinates, disturbed, painted, two_colours

__all__ = ["DIGITS", "draw_digit", "scans"]

DIGITS = tuple("0123456789")


@lru_cache(maxsize=1)
def scans() -> tuple[np.ndarray, np.ndarray]:
    """The 1797 scans, (N, 8, 8) in [0, 1], and their digits, (N,).

    Raises:
        ImportError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            f"scans(): expected scikit-learn, which has the digits, got {error}. Hint: pip install scikit-learn"
        ) from None
    data = load_digits()
    return data.images / 16.0, data.target.astype(np.int64)


def draw_digit(random: np.random.Generator, scan: np.ndarray) -> np.ndarray:
    """A scan, (8, 8), seen as a picture, (3, SIZE, SIZE), uint8."""
    x, y = coordinates(random, 0.3, (0.5, 0.95), 0.3, 0.3)
    # Bilinear, zeros outside.
    u, v = (x + 1) * 4 - 0.5, (y + 1) * 4 - 0.5
    left, top = np.floor(u).astype(int), np.floor(v).astype(int)
    padded = np.pad(scan, 2)

    def at(row: np.ndarray, column: np.ndarray) -> np.ndarray:
        return padded[np.clip(row + 2, 0, 11), np.clip(column + 2, 0, 11)]

    a, b = u - left, v - top
    ink = (1 - b) * ((1 - a) * at(top, left) + a * at(top, left + 1))
    ink += b * ((1 - a) * at(top + 1, left) + a * at(top + 1, left + 1))
    ground, colour = two_colours(random, 0.15)
    slope = random.uniform(-0.3, 0.3, (3, 1, 1)) * np.linspace(-1, 1, SIZE).reshape(1, 1, SIZE)
    image = ground.reshape(3, 1, 1) + slope + np.zeros((3, SIZE, SIZE))
    return disturbed(random, painted(image, colour, ink), 0.15)
