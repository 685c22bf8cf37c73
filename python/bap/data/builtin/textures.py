"""Textures without outlines: what repeats, how, and how fine."""

from __future__ import annotations

import numpy as np

from bap.data.builtin.canvas import SIZE, coordinates, cover, disturbed, painted, two_colours

__all__ = ["TEXTURES", "draw_texture", "noise", "pattern"]

TEXTURES = (
    "stripes",
    "waves",
    "checks",
    "diamonds",
    "dots",
    "holes",
    "bricks",
    "weave",
    "clouds",
    "grain",
    "rings",
    "cracks",
)


def noise(random: np.random.Generator, slope: float) -> np.ndarray:
    """Noise whose amplitude falls with the frequency f as f to the power -slope, (SIZE, SIZE), unit variance."""
    frequency = np.hypot(np.fft.fftfreq(SIZE)[:, None], np.fft.fftfreq(SIZE)[None])
    frequency[0, 0] = 1
    values = np.fft.ifft2(np.fft.fft2(random.normal(size=(SIZE, SIZE))) * frequency**-slope).real
    return (values - values.mean()) / values.std()


def pattern(random: np.random.Generator, kind: str) -> np.ndarray:
    """A pattern, positive where the second colour is, (SIZE, SIZE)."""
    x, y = coordinates(random, np.pi, (0.11, 0.2), 1.0)
    if kind == "stripes":
        return np.sin(x)
    if kind == "waves":
        return np.sin(x + 1.5 * np.sin(0.7 * y))
    if kind == "checks":
        return np.sin(x) * np.sin(y)
    if kind == "diamonds":
        return np.sin(x + y) + np.sin(x - y) - 0.7
    if kind in ("dots", "holes"):
        inside = np.cos(x) + np.cos(y) - 0.9
        return inside if kind == "dots" else -inside
    if kind == "bricks":
        row = np.floor(y / 2.4)
        joint = np.minimum(abs((x + 2.4 * (row % 2)) % 4.8 - 2.4), abs(y % 2.4 - 1.2))
        return joint - 0.35
    if kind == "weave":
        over = (np.floor(x / 2) + np.floor(y / 2)) % 2
        return np.where(over == 0, np.sin(np.pi * 1.5 * x), np.sin(np.pi * 1.5 * y))
    if kind == "clouds":
        return noise(random, 1.6)
    if kind == "grain":
        return noise(random, 0.4)
    if kind == "rings":
        return np.sin(np.hypot(x + random.uniform(-4, 4), y + random.uniform(-4, 4)))
    ridge = abs(noise(random, 1.3))
    return 0.25 - ridge


def draw_texture(random: np.random.Generator, label: int) -> np.ndarray:
    """One image of class ``TEXTURES[label]``, (3, SIZE, SIZE), uint8."""
    value = pattern(random, TEXTURES[label]) + 0.25 * noise(random, random.uniform(0.5, 1.5))
    first, second = two_colours(random, 0.1)
    image = np.broadcast_to(first.reshape(3, 1, 1), (3, SIZE, SIZE))
    return disturbed(random, painted(image, second, cover(-value, random.uniform(0.1, 0.6))), 0.15)
