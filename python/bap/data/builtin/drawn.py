"""Drawn domains: outlines with fillings (``shapes``), and signs of strokes, as of unknown alphabets (``glyphs``)."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from bap.data.builtin.canvas import (
    SIZE,
    coordinates,
    cover,
    disturbed,
    painted,
    polygon_distance,
    segment_distance,
    two_colours,
)
from bap.data.domain import random_of

__all__ = ["GLYPHS", "SHAPES", "draw_glyph", "draw_shape", "regular", "star", "strokes_distance", "strokes_of"]

_OUTLINES = ("disc", "square", "triangle", "pentagon", "star", "cross", "ring", "crescent")
_FILLINGS = ("plain", "stripes", "checks")
SHAPES = tuple(f"{filling} {outline}" for outline in _OUTLINES for filling in _FILLINGS)
GLYPHS = tuple(f"glyph {number:02d}" for number in range(20))


def regular(corners: int, radius: float = 1.0, start: float = -np.pi / 2) -> np.ndarray:
    """Corners of a regular polygon, (n, 2)."""
    angles = start + 2 * np.pi * np.arange(corners) / corners
    return radius * np.stack([np.cos(angles), np.sin(angles)], 1)


def star(points: int, inner: float = 0.42) -> np.ndarray:
    """Corners of a star, (2 n, 2)."""
    angles = -np.pi / 2 + np.pi * np.arange(2 * points) / points
    radius = np.where(np.arange(2 * points) % 2, inner, 1.0)
    return np.stack([radius * np.cos(angles), radius * np.sin(angles)], 1)


def _outline(kind: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    radius = np.hypot(x, y)
    if kind == "disc":
        return radius - 0.85
    if kind == "square":
        return np.maximum(abs(x), abs(y)) - 0.75
    if kind == "triangle":
        return polygon_distance(x, y, regular(3))
    if kind == "pentagon":
        return polygon_distance(x, y, regular(5, 0.92))
    if kind == "star":
        return polygon_distance(x, y, star(5))
    if kind == "cross":
        upright = np.maximum(abs(x) - 0.3, abs(y) - 0.9)
        return np.minimum(upright, np.maximum(abs(x) - 0.9, abs(y) - 0.3))
    if kind == "ring":
        return abs(radius - 0.68) - 0.24
    return np.maximum(radius - 0.9, 0.72 - np.hypot(x - 0.45, y))


def draw_shape(random: np.random.Generator, label: int) -> np.ndarray:
    """One image of class ``SHAPES[label]``, (3, SIZE, SIZE), uint8."""
    outline, filling = _OUTLINES[label // len(_FILLINGS)], label % len(_FILLINGS)
    x, y = coordinates(random, np.pi, (0.45, 0.8), 0.25, 0.25)
    ground, colour = two_colours(random, 0.12)
    image = np.broadcast_to(ground.reshape(3, 1, 1), (3, SIZE, SIZE))
    fill = np.broadcast_to(colour.reshape(3, 1, 1), image.shape)
    if filling:
        other = np.clip(colour + random.choice([-1, 1]) * random.uniform(0.25, 0.5, 3), 0, 1)
        rate = random.uniform(7, 10)
        wave = np.sin(rate * x + random.uniform(0, 6)) * (
            np.sin(rate * y + random.uniform(0, 6)) if filling == 2 else 1
        )
        fill = painted(fill, other, cover(-wave, 0.3))
    # Something else in the background.
    u, v = coordinates(random, np.pi, (0.1, 0.3), 0.9)
    image = painted(image, random.random(3), cover(np.hypot(u, v) - 1))
    return disturbed(random, painted(image, fill, cover(_outline(outline, x, y))), 0.12)


def strokes_of(random: np.random.Generator) -> list[np.ndarray]:
    """Two or three strokes of a sign, each (4, 2) corners."""
    strokes = []
    for _ in range(int(random.integers(2, 4))):
        start = random.uniform(-0.9, 0.9, 2)
        steps = random.uniform(-1.1, 1.1, (3, 2))
        strokes.append(np.clip(np.vstack([start, start + np.cumsum(steps, 0)]), -0.95, 0.95))
    return strokes


_STROKES = [strokes_of(random_of(7, "glyph", label)) for label in range(len(GLYPHS))]


def strokes_distance(
    random: np.random.Generator, x: np.ndarray, y: np.ndarray, strokes: list[np.ndarray], spread: float
) -> np.ndarray:
    """Distance of every pixel to the strokes, whose corners are moved at random, as by another hand.

    Args:
        random: moves the corners.
        x, y: coordinates of the pixels, (SIZE, SIZE).
        strokes: each (n, 2) corners.
        spread: standard deviation of the corners.
    """
    distance = np.full(x.shape, np.inf)
    for corners in strokes:
        moved = corners + random.normal(0, spread, corners.shape)
        for a, b in pairwise(moved):
            distance = np.minimum(distance, segment_distance(x, y, a, b))
    return distance


def draw_glyph(random: np.random.Generator, label: int) -> np.ndarray:
    """One image of class ``GLYPHS[label]`` in another hand, (3, SIZE, SIZE), uint8."""
    x, y = coordinates(random, 0.35, (0.6, 0.9), 0.15, 0.3)
    distance = strokes_distance(random, x, y, _STROKES[label], 0.13)
    ink = cover(distance - random.uniform(0.05, 0.12))
    paper = random.uniform(0.75, 1.0) * np.ones(3)
    image = np.broadcast_to(paper.reshape(3, 1, 1), (3, SIZE, SIZE))
    return disturbed(random, painted(image, random.uniform(0, 0.45) * np.ones(3), ink), 0.1, 0.2)
