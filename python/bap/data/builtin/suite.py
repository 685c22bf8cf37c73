"""Puts the built-in domains together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

import numpy as np
import torch

from bap.data.builtin.digits import DIGITS, draw_digit, scans
from bap.data.builtin.drawn import GLYPHS, SHAPES, draw_glyph, draw_shape
from bap.data.builtin.signs import SIGNS, draw_sign
from bap.data.builtin.textures import TEXTURES, draw_texture
from bap.data.domain import SPLITS, Arrays, Domain, random_of

__all__ = ["BUILTIN_DOMAINS", "builtin_suite"]

# The first is the source, and has twice the images.
BUILTIN_DOMAINS = ("shapes", "digits", "glyphs", "textures", "signs")
_DRAWN: dict[str, tuple[tuple[str, ...], Callable[[np.random.Generator, int], np.ndarray], bool]] = {
    "shapes": (SHAPES, draw_shape, True),
    "glyphs": (GLYPHS, draw_glyph, False),
    "textures": (TEXTURES, draw_texture, True),
    "signs": (SIGNS, draw_sign, False),
}
_SHARES = {"train": 1.0, "val": 0.25, "test": 0.5}


def _drawn(name: str, split: str, count: int) -> Arrays:
    classes, draw, _ = _DRAWN[name]
    labels = np.arange(count) % len(classes)
    images = [draw(random_of(1, name, split, number), int(label)) for number, label in enumerate(labels)]
    return Arrays(torch.from_numpy(np.stack(images)), torch.from_numpy(labels))


def _digits(split: str, count: int) -> Arrays:
    images, digits = scans()
    order = random_of(1, "digits").permutation(len(images))
    # Scans of the three splits are different ones: 1000, 297 and 500.
    start, end = {"train": (0, 1000), "val": (1000, 1297), "test": (1297, 1797)}[split]
    chosen = np.resize(order[start:end], count)
    drawn = [draw_digit(random_of(1, "digits", split, n), images[scan]) for n, scan in enumerate(chosen)]
    return Arrays(torch.from_numpy(np.stack(drawn)), torch.from_numpy(digits[chosen]))


@lru_cache(maxsize=32)
def _domain(name: str, images: int) -> Domain:
    if name == "digits":
        splits = {split: _digits(split, int(images * _SHARES[split])) for split in SPLITS}
        return Domain(name, DIGITS, dict(splits), 32)
    classes, _, flip = _DRAWN[name]
    splits = {split: _drawn(name, split, int(images * _SHARES[split])) for split in SPLITS}
    return Domain(name, classes, dict(splits), 32, flip=flip)


def builtin_suite(domains: Iterable[str] = BUILTIN_DOMAINS, images: int = 1200) -> dict[str, Domain]:
    """The built-in domains, kept in memory once they are drawn.

    ``shapes`` (the source): 8 outlines × 3 fillings; ``digits``: scikit-learn's scans in colours; ``glyphs``: 20 signs
    of strokes; ``textures``: 12 kinds; ``signs``: 16 kinds of traffic signs.

    Args:
        domains: names, of :data:`BUILTIN_DOMAINS`.
        images: training images of a domain; ``val`` has a quarter and ``test`` half as many, and ``shapes`` twice.

    Raises:
        ValueError: for other names, or too few images for every class to occur.

    Examples:
        >>> from bap.data import builtin_suite
        >>> suite = builtin_suite(["digits", "signs"], images=100)
        >>> {name: (len(domain.classes), len(domain.splits["test"])) for name, domain in suite.items()}
        {'digits': (10, 50), 'signs': (16, 50)}
    """
    if images < 100:
        raise ValueError(f"builtin_suite(): expected `images` to be at least 100, got {images}.")
    suite = {}
    for name in domains:
        if name not in BUILTIN_DOMAINS:
            raise ValueError(f"builtin_suite(): expected `domains` to be among {list(BUILTIN_DOMAINS)}, got {name!r}.")
        suite[name] = _domain(name, images * (2 if name == BUILTIN_DOMAINS[0] else 1))
    return suite
