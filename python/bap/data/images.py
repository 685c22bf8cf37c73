"""Image files to 8-bit RGB: formats, sizes, and the conversion of 16 bits, palettes, alpha and CMYK.

Read are JPEG, PNG, BMP, PPM/PGM, WebP and GIF, by their content and not by their name, of at most 67 million pixels and
with sides at most 32 : 1; the sizes are looked at before anything is decoded. Grey and 16-bit images are scaled to 8
bits, alpha and transparent colours are laid over white, CMYK is converted without a colour profile. Animations are
refused, as which frame is meant is not known. The EXIF orientation is not applied, as in torchvision's ImageFolder.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

__all__ = [
    "FORMATS",
    "MAX_PIXELS",
    "MAX_RATIO",
    "DataError",
    "TooManyPixelsError",
    "UnknownFormatError",
    "image_size",
    "open_image",
    "seems_cut",
]

FORMATS = ("JPEG", "PNG", "BMP", "PPM", "WEBP", "GIF")
MAX_PIXELS = 2**26
MAX_RATIO = 32
_EIGHT_BIT = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")


class DataError(ValueError):
    """The data on disk do not follow their format."""


class UnknownFormatError(DataError):
    """No image of a format that is read."""


class TooManyPixelsError(DataError):
    """An image that is too large to decode."""


def _opened(source: Path | BinaryIO) -> Any:
    from PIL import Image

    try:
        return Image.open(source, formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise UnknownFormatError(f"no image of the formats {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise TooManyPixelsError(f"more than {MAX_PIXELS:,} pixels") from None


def _checked_size(image: Any, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise DataError(f"no pixels: {width} x {height}")
    if width * height > max_pixels:
        raise TooManyPixelsError(f"{width} x {height} pixels, more than {max_pixels:,}")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise DataError(f"{width} x {height} pixels, longer than {MAX_RATIO} : 1")
    # MPO is what some cameras write as JPEG: the picture, then previews.
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise DataError(f"an animation of {image.n_frames} frames")


def _from_wide(image: Any) -> Any:
    """Grey values of 16 bits, 0 to 65535, as the nearest of 0 to 255; Pillow's own conversion would cut them off."""
    from PIL import Image

    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise DataError(f"grey values from {values.min()} to {values.max()}, outside of 16 bits")
    grey = (values + 128) // 257
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey.astype(np.uint8), "L").convert("RGB")


def _as_rgb(image: Any) -> Any:
    from PIL import Image

    if image.mode.startswith("I"):
        return _from_wide(image)
    if image.mode not in _EIGHT_BIT:
        raise DataError(f"pixels of the kind {image.mode!r}")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        whole = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole).convert("RGB")
    return image.convert("RGB")


def open_image(source: Path | BinaryIO, max_pixels: int = MAX_PIXELS) -> Any:
    """The whole image, decoded, as PIL's RGB.

    Args:
        source: a file's path, or its content.
        max_pixels: an image of more is not decoded.

    Raises:
        DataError: if it cannot be used; the message says why and leaves the naming of the file to the caller.
    """
    with warnings.catch_warnings():
        # Odd EXIF data are no reason to warn in every epoch; sizes are checked here.
        warnings.simplefilter("ignore")
        try:
            with _opened(source) as image:
                _checked_size(image, max_pixels)
                image.load()
                return _as_rgb(image)
        except DataError:
            raise
        except Exception as error:
            # Decoders raise anything when bytes are damaged: struct.error, EOFError, IndexError, zlib.error ...
            raise DataError(f"{error}" or type(error).__name__) from None


def image_size(path: Path) -> tuple[int, int]:
    """Width and height, from the head of the file.

    Raises:
        DataError: if it is no image that can be used.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with _opened(path) as image:
                _checked_size(image, MAX_PIXELS)
                width, height = image.size
                return width, height
        except DataError:
            raise
        except Exception as error:
            # As in open_image.
            raise DataError(f"{error}" or type(error).__name__) from None


def seems_cut(path: Path) -> bool:
    """Whether a JPEG or PNG lacks its end marker: a cheap test for what to decode."""
    with open(path, "rb") as file:
        head = file.read(8)
        if head[:2] == b"\xff\xd8":
            end, mark = 2, b"\xff\xd9"
        elif head == b"\x89PNG\r\n\x1a\n":
            end, mark = 12, b"\0\0\0\0IEND\xaeB`\x82"
        else:
            return False
        file.seek(0, 2)
        if file.tell() < end:
            return True
        file.seek(-end, 2)
        return file.read() != mark
