"""Puts the built-in domains together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from bap.data.builtin.digits import DIGITS, draw_digit, scans
from bap.data.builtin.drawn import GLYPHS, SHAPES, draw_glyph, draw_shape
from bap.data.builtin.letters import LETTERS, draw_letter
from bap.data.builtin.scenes import CLOCKS, COUNTS, FACES, draw_clock, draw_count, draw_face
from bap.data.builtin.signs import SIGNS, draw_sign
from bap.data.builtin.textures import TEXTURES, draw_texture
from bap.data.builtin.things import THINGS, draw_thing
from bap.data.domain import SPLITS, Arrays, Domain, random_of

__all__ = ["BUILTIN_DOMAINS", "BUILTIN_SUITES", "VARIED_DOMAINS", "builtin_suite"]

# The first of each is its source.
BUILTIN_DOMAINS = ("shapes", "digits", "glyphs", "textures", "signs")
VARIED_DOMAINS = (
    "things",
    "shapes",
    "digits",
    "glyphs",
    "textures",
    "signs",
    "letters",
    "clocks",
    "counts",
    "faces",
)


class _Suite(NamedTuple):
    """Its domains, the source first, and how many times as many images the source has."""

    domains: tuple[str, ...]
    source_images: int


_SUITES = {"builtin": _Suite(BUILTIN_DOMAINS, 2), "varied": _Suite(VARIED_DOMAINS, 4)}
BUILTIN_SUITES = tuple(_SUITES)


class _Kind(NamedTuple):
    """The classes of a drawn domain, what draws an image, and whether a mirrored image is of the same class."""

    classes: tuple[str, ...]
    draw: Callable[[np.random.Generator, int], np.ndarray]
    flip: bool


_DRAWN = {
    "things": _Kind(THINGS, draw_thing, False),
    "shapes": _Kind(SHAPES, draw_shape, True),
    "glyphs": _Kind(GLYPHS, draw_glyph, False),
    "textures": _Kind(TEXTURES, draw_texture, True),
    "signs": _Kind(SIGNS, draw_sign, False),
    "letters": _Kind(LETTERS, draw_letter, False),
    "clocks": _Kind(CLOCKS, draw_clock, False),
    "counts": _Kind(COUNTS, draw_count, True),
    "faces": _Kind(FACES, draw_face, True),
}
_SHARES = {"train": 1.0, "val": 0.25, "test": 0.5}


def _drawn(name: str, split: str, count: int) -> Arrays:
    kind = _DRAWN[name]
    labels = np.arange(count) % len(kind.classes)
    images = [kind.draw(random_of(1, name, split, number), int(label)) for number, label in enumerate(labels)]
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
    counts = {split: int(images * _SHARES[split]) for split in SPLITS}
    if name == "digits":
        return Domain(name, DIGITS, {split: _digits(split, count) for split, count in counts.items()}, 32)
    kind = _DRAWN[name]
    splits = {split: _drawn(name, split, count) for split, count in counts.items()}
    return Domain(name, kind.classes, dict(splits), 32, flip=kind.flip)


def builtin_suite(
    domains: Iterable[str] | None = None, images: int = 1200, suite: str = "builtin"
) -> dict[str, Domain]:
    """The domains of a built-in suite, kept in memory once they are drawn.

    ``builtin`` has five: ``shapes`` (the source): 8 outlines × 3 fillings; ``digits``: scikit-learn's scans in colours;
    ``glyphs``: 20 signs of strokes; ``textures``: 12 kinds; ``signs``: 16 kinds of traffic signs.

    ``varied`` has these and five more: ``things`` (the source): 44 outlines, 28 textures and 24 signs of strokes;
    ``letters``: 26, printed in 14 fonts; ``clocks``: the hour; ``counts``: one to eight things; ``faces``: 12
    expressions.

    Args:
        domains: names, of the suite; None is all.
        images: training images of a domain; ``val`` has a quarter and ``test`` half as many. The source has twice
            (``builtin``) or four times (``varied``) the images.
        suite: one of :data:`BUILTIN_SUITES`.

    Raises:
        ValueError: for other names, or too few images for every class to occur.
        ImportError: if scikit-learn, which has the digits, or Matplotlib, which has the fonts, is needed and missing.

    Examples:
        >>> from bap.data import builtin_suite
        >>> suite = builtin_suite(["digits", "signs"], images=100)
        >>> {name: (len(domain.classes), len(domain.splits["test"])) for name, domain in suite.items()}
        {'digits': (10, 50), 'signs': (16, 50)}
    """
    if suite not in _SUITES:
        raise ValueError(f"builtin_suite(): expected `suite` to be one of {list(_SUITES)}, got {suite!r}.")
    if images < 100:
        raise ValueError(f"builtin_suite(): expected `images` to be at least 100, got {images}.")
    known, more = _SUITES[suite]
    names = list(known if domains is None else domains)
    for name in names:
        if name not in known:
            raise ValueError(f"builtin_suite(): expected `domains` to be among {list(known)}, got {name!r}.")
    return {name: _domain(name, images * (more if name == known[0] else 1)) for name in names}
