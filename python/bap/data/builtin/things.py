"""The source of the varied suite: outlines filled with patterns, textures, and strokes, of many fixed kinds."""

from __future__ import annotations

import numpy as np

from bap.data.builtin.canvas import (
    SIZE,
    coordinates,
    cover,
    disturbed,
    painted,
    two_colours,
)
from bap.data.builtin.drawn import strokes_distance, strokes_of
from bap.data.builtin.textures import TEXTURES, noise, pattern
from bap.data.domain import random_of

__all__ = ["THINGS", "draw_thing"]

_OUTLINES, _SPECTRA, _SIGNS = 44, 28, 24
THINGS = (
    *(f"outline {number:02d}" for number in range(_OUTLINES)),
    *(f"spectrum {number:02d}" for number in range(_SPECTRA)),
    *(f"strokes {number:02d}" for number in range(_SIGNS)),
)


def _curve(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Amplitudes and phases of a closed curve r(angle) = 1 + sum of a_k cos(k angle + phase_k), k from 2 to 7."""
    random = random_of(11, "outline", number)
    amplitudes = random.uniform(0, 1, 6) ** 2 * np.array([0.4, 0.4, 0.35, 0.3, 0.25, 0.2])
    return amplitudes * min(1.0, 0.75 / amplitudes.sum()), random.uniform(0, 2 * np.pi, 6)


def _waves(number: int) -> np.ndarray:
    """Waves of a texture, (n, 3): frequency, angle, and how much each bends the next."""
    random = random_of(11, "spectrum", number)
    count = int(random.integers(1, 4))
    return np.stack([random.uniform(5, 14, count), random.uniform(0, np.pi, count), random.uniform(0, 2, count)], 1)


_CURVES = [_curve(number) for number in range(_OUTLINES)]
_WAVES = [_waves(number) for number in range(_SPECTRA)]
_STROKES = [strokes_of(random_of(11, "strokes", number)) for number in range(_SIGNS)]


def _ground(random: np.random.Generator, colour: np.ndarray) -> np.ndarray:
    """A background: even, with a slope, or clouded."""
    image = colour.reshape(3, 1, 1) + np.zeros((3, SIZE, SIZE))
    if random.random() < 0.6:
        image = image + random.uniform(0.02, 0.12) * noise(random, random.uniform(0.8, 1.6))
    u, v = coordinates(random, np.pi, (0.1, 0.35), 0.9)
    return painted(image, random.random(3), cover(np.maximum(abs(u), abs(v)) - 1))


def _filled_outline(random: np.random.Generator, number: int) -> np.ndarray:
    x, y = coordinates(random, np.pi, (0.5, 0.75), 0.25, 0.2)
    amplitudes, phases = _CURVES[number]
    angle = np.arctan2(y, x)
    radius = 1 + sum(a * np.cos(k * angle + p) for k, (a, p) in enumerate(zip(amplitudes, phases, strict=True), 2))
    ground, colour = two_colours(random, 0.15)
    fill = np.broadcast_to(colour.reshape(3, 1, 1), (3, SIZE, SIZE))
    if random.random() < 0.7:
        other = np.clip(colour + random.choice([-1, 1]) * random.uniform(0.15, 0.45, 3), 0, 1)
        kind = TEXTURES[int(random.integers(len(TEXTURES)))]
        fill = painted(fill, other, cover(-pattern(random, kind), random.uniform(0.1, 0.5)))
    return painted(_ground(random, ground), fill, cover(np.hypot(x, y) - 0.85 * radius))


def _texture(random: np.random.Generator, number: int) -> np.ndarray:
    x, y = coordinates(random, 0.4, (0.8, 1.25), 1.0, 0.15)
    bend, value = np.zeros(x.shape), np.zeros(x.shape)
    for frequency, angle, more in _WAVES[number]:
        wave = np.sin(frequency * (np.cos(angle) * x + np.sin(angle) * y) + bend + random.uniform(0, 2 * np.pi))
        bend = more * wave
        value = value + wave
    value = value + random.uniform(0.1, 0.6) * noise(random, random.uniform(0.3, 1.5))
    first, second = two_colours(random, 0.12)
    image = np.broadcast_to(first.reshape(3, 1, 1), (3, SIZE, SIZE))
    return painted(image, second, cover(-value, random.uniform(0.1, 0.8)))


def _sign(random: np.random.Generator, number: int) -> np.ndarray:
    x, y = coordinates(random, 0.4, (0.5, 0.9), 0.2, 0.3)
    distance = strokes_distance(random, x, y, _STROKES[number], 0.1)
    ground, colour = two_colours(random, 0.2)
    return painted(_ground(random, ground), colour, cover(distance - random.uniform(0.05, 0.14)))


def draw_thing(random: np.random.Generator, label: int) -> np.ndarray:
    """One image of class ``THINGS[label]``, (3, SIZE, SIZE), uint8."""
    if label < _OUTLINES:
        image = _filled_outline(random, label)
    elif label < _OUTLINES + _SPECTRA:
        image = _texture(random, label - _OUTLINES)
    else:
        image = _sign(random, label - _OUTLINES - _SPECTRA)
    return disturbed(random, image, 0.12)
