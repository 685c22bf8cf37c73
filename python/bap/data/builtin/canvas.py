"""Drawing on small images: distances to outlines, colours, and the disturbances of a camera."""

from __future__ import annotations

import numpy as np

__all__ = [
    "SIZE",
    "coordinates",
    "cover",
    "disturbed",
    "painted",
    "polygon_distance",
    "segment_distance",
    "two_colours",
]

SIZE = 32


def coordinates(
    random: np.random.Generator, turn: float, scale: tuple[float, float], shift: float, shear: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of the pixels in the system of an object: turned, scaled, shifted and sheared at random.

    Args:
        random: draws the transformation.
        turn: largest angle, radians.
        scale: least and largest size of the object, as part of half the image.
        shift: largest shift, as part of half the image.
        shear: largest shear.

    Returns:
        x and y, each (SIZE, SIZE); the object spans about [-1, 1].
    """
    ys, xs = np.mgrid[0:SIZE, 0:SIZE]
    x = (xs + 0.5) / SIZE * 2 - 1 - random.uniform(-shift, shift)
    y = (ys + 0.5) / SIZE * 2 - 1 - random.uniform(-shift, shift)
    angle = random.uniform(-turn, turn)
    size = random.uniform(*scale)
    u = (np.cos(angle) * x + np.sin(angle) * y) / size
    v = (-np.sin(angle) * x + np.cos(angle) * y) / size
    return u + random.uniform(-shear, shear) * v, v


def segment_distance(x: np.ndarray, y: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distance of every pixel to the line from a to b, points (2,)."""
    direction = b - a
    along = ((x - a[0]) * direction[0] + (y - a[1]) * direction[1]) / max(float(direction @ direction), 1e-9)
    along = np.clip(along, 0, 1)
    return np.hypot(x - a[0] - along * direction[0], y - a[1] - along * direction[1])


def polygon_distance(x: np.ndarray, y: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Signed distance to a polygon, (n, 2) corners in order: negative inside, concave ones too."""
    nearest = np.full(x.shape, np.inf)
    inside = np.zeros(x.shape, dtype=bool)
    for a, b in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        nearest = np.minimum(nearest, segment_distance(x, y, a, b))
        crosses = (a[1] > y) != (b[1] > y)
        at = a[0] + (y - a[1]) * (b[0] - a[0]) / (b[1] - a[1] if b[1] != a[1] else 1e-9)
        inside ^= crosses & (x < at)
    return np.where(inside, -nearest, nearest)


def cover(distance: np.ndarray, softness: float = 0.06) -> np.ndarray:
    """How far a pixel is inside an outline, from 0 to 1, with soft edges."""
    return np.clip(0.5 - distance / (2 * softness), 0, 1)


def two_colours(random: np.random.Generator, contrast: float) -> tuple[np.ndarray, np.ndarray]:
    """Two colours, (3,) in [0, 1], that differ by at least ``contrast`` on average over the channels."""
    while True:
        first, second = random.random(3), random.random(3)
        if np.abs(first - second).mean() >= contrast:
            return first, second


def painted(background: np.ndarray, colour: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A (3, SIZE, SIZE) image with a colour, (3,) or (3, SIZE, SIZE), where the (SIZE, SIZE) mask is 1."""
    colour = colour.reshape(3, 1, 1) if colour.ndim == 1 else colour
    return background * (1 - mask) + colour * mask


def disturbed(random: np.random.Generator, image: np.ndarray, noise: float, light: float = 0.3) -> np.ndarray:
    """A picture of it: uneven light, noise of the sensor, and eight bits; (3, SIZE, SIZE), uint8."""
    ys, xs = np.mgrid[0:SIZE, 0:SIZE] / (SIZE - 1) - 0.5
    slope = random.uniform(-light, light, 2)
    image = image * (1 + slope[0] * xs + slope[1] * ys) + random.uniform(-light, light) / 3
    image = image + random.normal(0, random.uniform(0.3, 1) * noise, image.shape)
    return np.clip(np.rint(image * 255), 0, 255).astype(np.uint8)
