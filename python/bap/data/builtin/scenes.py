"""Small scenes: clocks, faces, and things to count."""

from __future__ import annotations

import math

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
from bap.data.builtin.drawn import regular, star

__all__ = ["CLOCKS", "COUNTS", "FACES", "draw_clock", "draw_count", "draw_face"]

CLOCKS = tuple(f"{hour} o'clock and later" for hour in range(12))
COUNTS = tuple(str(number) for number in range(1, 9))
_MOUTHS = ("smiling", "frowning", "flat", "open")
_EYES = ("round", "closed", "winking")
FACES = tuple(f"{mouth}, {eyes} eyes" for mouth in _MOUTHS for eyes in _EYES)


def draw_clock(random: np.random.Generator, label: int) -> np.ndarray:
    """A dial whose short hand stands in hour ``label`` and whose long hand says how far; (3, SIZE, SIZE), uint8."""
    x, y = coordinates(random, 0.2, (0.7, 0.95), 0.12, 0.1)
    ground, dial = two_colours(random, 0.15)
    ink = np.clip(dial + np.where(dial > 0.5, -1, 1) * random.uniform(0.4, 0.6, 3), 0, 1)
    image = ground.reshape(3, 1, 1) + random.uniform(-0.2, 0.2, (3, 1, 1)) * np.linspace(-1, 1, SIZE).reshape(1, 1, -1)
    image = painted(image + np.zeros((3, SIZE, SIZE)), ink, cover(np.hypot(x, y) - 0.98))
    image = painted(image, dial, cover(np.hypot(x, y) - 0.88))
    # Twelve is marked, so that a turned dial can be read.
    image = painted(image, ink, cover(np.hypot(x, y + 0.72) - 0.1))
    part = random.random()
    for turn, length, width in (((label + part) / 12, 0.48, 0.1), (part, 0.75, 0.045)):
        end = length * np.array([np.sin(2 * np.pi * turn), -np.cos(2 * np.pi * turn)])
        image = painted(image, ink, cover(segment_distance(x, y, np.zeros(2), end) - width))
    return disturbed(random, image, 0.1)


def _places(random: np.random.Generator, count: int) -> list[tuple[float, float, float]]:
    """Centres and radii of discs that do not touch; smaller ones where they do not fit."""
    largest = min(0.42, 0.8 / count**0.5)
    while True:
        places: list[tuple[float, float, float]] = []
        for part, right, down in random.random((20 * count, 3)).tolist():
            radius = (0.6 + 0.4 * part) * largest
            x, y = (2 * right - 1) * (1 - radius), (2 * down - 1) * (1 - radius)
            if all(math.hypot(x - u, y - v) > radius + other + 0.06 for u, v, other in places):
                places.append((x, y, radius))
            if len(places) == count:
                return places
        largest *= 0.9


def draw_count(random: np.random.Generator, label: int) -> np.ndarray:
    """``label + 1`` things of one kind, sizes and places at random; (3, SIZE, SIZE), uint8."""
    ys, xs = np.mgrid[0:SIZE, 0:SIZE]
    x, y = (xs + 0.5) / SIZE * 2 - 1, (ys + 0.5) / SIZE * 2 - 1
    ground, colour = two_colours(random, 0.2)
    slope = random.uniform(-0.15, 0.15, (3, 1, 1)) * y
    image = ground.reshape(3, 1, 1) + slope
    kind = int(random.integers(4))
    for u, v, radius in _places(random, label + 1):
        angle = random.uniform(0, 2 * np.pi)
        a = (np.cos(angle) * (x - u) + np.sin(angle) * (y - v)) / radius
        b = (np.cos(angle) * (y - v) - np.sin(angle) * (x - u)) / radius
        if kind == 0:
            distance = np.hypot(a, b) - 0.95
        elif kind == 1:
            distance = np.maximum(abs(a), abs(b)) - 0.7
        else:
            distance = polygon_distance(a, b, regular(3) if kind == 2 else star(5))
        own = np.clip(colour + random.uniform(-0.12, 0.12, 3), 0, 1)
        image = painted(image, own, cover(distance, 0.15))
    return disturbed(random, image, 0.12)


def draw_face(random: np.random.Generator, label: int) -> np.ndarray:
    """A face with an expression, (3, SIZE, SIZE), uint8."""
    mouth, eyes = _MOUTHS[label // len(_EYES)], _EYES[label % len(_EYES)]
    x, y = coordinates(random, 0.35, (0.6, 0.95), 0.2, 0.15)
    ground, skin = two_colours(random, 0.15)
    ink = np.clip(skin + np.where(skin > 0.5, -1, 1) * random.uniform(0.35, 0.6, 3), 0, 1)
    image = np.broadcast_to(ground.reshape(3, 1, 1), (3, SIZE, SIZE))
    u, v = coordinates(random, np.pi, (0.1, 0.4), 0.9)
    image = painted(image, random.random(3), cover(np.maximum(abs(u), abs(v)) - 1))
    image = painted(image, skin, cover(np.hypot(x * random.uniform(1.0, 1.2), y) - 0.95))
    winked = int(random.integers(2))
    apart, height = random.uniform(0.3, 0.42), random.uniform(-0.35, -0.2)
    for number, side in enumerate((-1, 1)):
        a, b = x - side * apart, y - height
        if eyes == "closed" or (eyes == "winking" and number == winked):
            distance = np.maximum(abs(a) - 0.18, abs(b) - 0.04)
        else:
            distance = np.hypot(a, b) - 0.14
        image = painted(image, ink, cover(distance, 0.08))
    low, wide = random.uniform(0.35, 0.45), random.uniform(0.35, 0.5)
    a, b = x / wide, y - low
    if mouth == "open":
        distance = np.hypot(x, b) - random.uniform(0.16, 0.24)
    else:
        bend = {"smiling": -1.0, "frowning": 1.0, "flat": 0.0}[mouth] * random.uniform(0.2, 0.3)
        distance = np.maximum(abs(b - bend * (a * a - 0.5)) - 0.07, (abs(a) - 1) * wide)
    return disturbed(random, painted(image, ink, cover(distance, 0.08)), 0.1)
