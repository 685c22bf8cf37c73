"""Printed capital letters in the fonts that come with Matplotlib."""

from __future__ import annotations

import string
from functools import lru_cache
from pathlib import Path

import numpy as np

from bap.data.builtin.canvas import SIZE, coordinates, cover, disturbed, painted, two_colours

__all__ = ["LETTERS", "draw_letter", "fonts"]

LETTERS = tuple(string.ascii_uppercase)
_PRINT = 48
_FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSerif-Italic.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralBol.ttf",
    "STIXGeneralItalic.ttf",
    "cmr10.ttf",
    "cmss10.ttf",
    "cmtt10.ttf",
)


def fonts() -> tuple[Path, ...]:
    """Files of the fonts.

    Raises:
        ImportError: if Matplotlib is not installed.
        FileNotFoundError: if it comes without one of the fonts.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            f"fonts(): expected Matplotlib, which has the fonts, got {error}. Hint: pip install matplotlib"
        ) from None
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    paths = tuple(folder / name for name in _FONTS)
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"fonts(): expected Matplotlib to have {path.name}, got none in {folder}.")
    return paths


@lru_cache(maxsize=len(LETTERS) * len(_FONTS))
def _printed(label: int, font: int) -> np.ndarray:
    """A letter in a font, in the middle, (_PRINT, _PRINT) in [0, 1]."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("L", (_PRINT, _PRINT))
    face = ImageFont.truetype(str(fonts()[font]), 40, layout_engine=ImageFont.Layout.BASIC)
    ImageDraw.Draw(image).text((_PRINT / 2, _PRINT / 2), LETTERS[label], 255, font=face, anchor="mm")
    return np.asarray(image, dtype=np.float64) / 255


def draw_letter(random: np.random.Generator, label: int) -> np.ndarray:
    """One letter in a font at random, (3, SIZE, SIZE), uint8."""
    printed = _printed(label, int(random.integers(len(_FONTS))))
    x, y = coordinates(random, 0.3, (0.55, 1.1), 0.25, 0.3)
    column = np.rint((x + 1) * _PRINT / 2 - 0.5).astype(int)
    row = np.rint((y + 1) * _PRINT / 2 - 0.5).astype(int)
    inside = (row >= 0) & (row < _PRINT) & (column >= 0) & (column < _PRINT)
    ink = np.where(inside, printed[row.clip(0, _PRINT - 1), column.clip(0, _PRINT - 1)], 0)
    ground, colour = two_colours(random, 0.12)
    slope = random.uniform(-0.25, 0.25, (3, 1, 1)) * np.linspace(-1, 1, SIZE).reshape(1, -1, 1)
    image = ground.reshape(3, 1, 1) + slope + np.zeros((3, SIZE, SIZE))
    for _ in range(2):
        u, v = coordinates(random, np.pi, (0.1, 0.3), 1.0)
        image = painted(image, random.random(3), cover(np.maximum(abs(u), abs(v) / 3) - 1))
    return disturbed(random, painted(image, colour, ink), 0.15)
