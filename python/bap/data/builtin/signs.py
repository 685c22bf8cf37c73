"""Signs beside a road: a board of some form and colour, a rim, and a pictogram."""

from __future__ import annotations

import numpy as np

from bap.data.builtin.canvas import SIZE, coordinates, cover, disturbed, painted, polygon_distance
from bap.data.builtin.drawn import regular

__all__ = ["SIGNS", "draw_sign"]

_RED, _BLUE, _YELLOW = np.array([0.8, 0.1, 0.1]), np.array([0.1, 0.25, 0.75]), np.array([0.95, 0.8, 0.1])
_WHITE, _BLACK = np.ones(3) * 0.95, np.ones(3) * 0.08
# Form of the board, its colour, that of its rim, that of the pictogram, and the pictogram.
_KINDS: dict[str, tuple[str, np.ndarray, np.ndarray, np.ndarray, str]] = {
    "no entry": ("disc", _RED, _RED, _WHITE, "bar"),
    "speed": ("disc", _WHITE, _RED, _BLACK, "zero"),
    "no passing": ("disc", _WHITE, _RED, _BLACK, "pair"),
    "no stopping": ("disc", _BLUE, _RED, _RED, "cross"),
    "no parking": ("disc", _BLUE, _RED, _RED, "slash"),
    "straight on": ("disc", _BLUE, _BLUE, _WHITE, "up"),
    "turn left": ("disc", _BLUE, _BLUE, _WHITE, "left"),
    "turn right": ("disc", _BLUE, _BLUE, _WHITE, "right"),
    "danger": ("triangle", _WHITE, _RED, _BLACK, "mark"),
    "crossing": ("triangle", _WHITE, _RED, _BLACK, "cross"),
    "yield": ("turned", _WHITE, _RED, _WHITE, "none"),
    "stop": ("octagon", _RED, _WHITE, _WHITE, "bar"),
    "priority": ("diamond", _YELLOW, _WHITE, _YELLOW, "none"),
    "end of priority": ("diamond", _YELLOW, _WHITE, _BLACK, "slash"),
    "one way": ("square", _BLUE, _WHITE, _WHITE, "up"),
    "dead end": ("square", _BLUE, _WHITE, _RED, "tee"),
}
SIGNS = tuple(_KINDS)


def _board(form: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if form == "disc":
        return np.hypot(x, y) - 0.95
    if form == "square":
        return np.maximum(abs(x), abs(y)) - 0.85
    corners = {
        "triangle": regular(3, 1.05),
        "turned": regular(3, 1.05, np.pi / 2),
        "octagon": regular(8, 1.0, np.pi / 8),
        "diamond": regular(4, 1.05),
    }
    return polygon_distance(x, y, corners[form])


def _pictogram(kind: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if kind == "bar":
        return np.maximum(abs(x) - 0.6, abs(y) - 0.16)
    if kind == "zero":
        return abs(np.hypot(x / 0.75, y) - 0.4) - 0.1
    if kind == "pair":
        return np.minimum(np.maximum(abs(x - 0.3) - 0.17, abs(y) - 0.3), np.maximum(abs(x + 0.3) - 0.17, abs(y) - 0.3))
    if kind in ("slash", "cross"):
        one = np.maximum(abs(x + y) - 0.16, abs(x - y) - 1.0)
        return one if kind == "slash" else np.minimum(one, np.maximum(abs(x - y) - 0.16, abs(x + y) - 1.0))
    if kind in ("up", "left", "right"):
        across, along = {"up": (x, y), "left": (y, x), "right": (y, -x)}[kind]
        shaft = np.maximum(abs(across) - 0.12, abs(along - 0.15) - 0.4)
        head = np.maximum(abs(across) - 0.75 * (along + 0.65), along + 0.1)
        return np.minimum(shaft, head)
    if kind == "mark":
        return np.minimum(np.maximum(abs(x) - 0.1, abs(y - 0.0) - 0.28), np.hypot(x, y - 0.45) - 0.1)
    if kind == "tee":
        return np.minimum(np.maximum(abs(x) - 0.1, abs(y - 0.2) - 0.4), np.maximum(abs(x) - 0.4, abs(y + 0.25) - 0.13))
    return np.full(x.shape, np.inf)


def draw_sign(random: np.random.Generator, label: int) -> np.ndarray:
    """One image of class ``SIGNS[label]``, (3, SIZE, SIZE), uint8: far or near, at night, half hidden."""
    form, board, rim, ink, pictogram = _KINDS[SIGNS[label]]
    x, y = coordinates(random, 0.25, (0.3, 0.8), 0.25, 0.2)
    top, bottom = random.random(3), random.random(3)
    height = np.linspace(0, 1, SIZE).reshape(1, SIZE, 1)
    image = top.reshape(3, 1, 1) * (1 - height) + bottom.reshape(3, 1, 1) * height + np.zeros((3, SIZE, SIZE))
    for _ in range(3):
        u, v = coordinates(random, np.pi, (0.1, 0.5), 1.0)
        image = painted(image, random.random(3), cover(np.maximum(abs(u), abs(v)) - 1))
    distance = _board(form, x, y)
    image = painted(image, rim, cover(distance))
    image = painted(image, board, cover(distance + 0.16))
    image = painted(image, ink, cover(_pictogram(pictogram, x, y)))
    if random.random() < 0.4:
        u, v = coordinates(random, np.pi, (0.2, 0.35), 0.7)
        image = painted(image, random.random(3), cover(np.maximum(abs(u), abs(v)) - 1))
    # Faded and dark, each channel by its own factor.
    image = image * random.uniform(0.3, 1.0) * random.uniform(0.8, 1.0, (3, 1, 1))
    return disturbed(random, image, 0.12)
