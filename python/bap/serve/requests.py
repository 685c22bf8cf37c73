"""From the body of a request to the pixels that the network takes."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bap.config import Config
from bap.data.images import DataError, TooManyPixelsError, UnknownFormatError, open_image
from bap.data.transform import middle_of, resized_pixels
from bap.train.domains import resize_of

__all__ = ["DomainInput", "RequestError", "decode", "domain_inputs", "find_domain"]


class RequestError(Exception):
    """A request that is refused.

    Args:
        status: of HTTP.
        message: for the client.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(status, message)
        self.status, self.message = status, message


@dataclass(frozen=True)
class DomainInput:
    """What a domain takes and what it answers.

    Args:
        name: of the domain.
        classes: names of its classes.
        size: height and width of the network's input.
        resize: as in :class:`bap.data.ImageFiles`.
        mean, std: of the channels, of images in [0, 1].
        accuracy, kept: as the checkpoint says; None where it does not.
    """

    name: str
    classes: tuple[str, ...]
    size: int
    resize: int | tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    accuracy: float | None = None
    kept: float | None = None


def domain_inputs(config: Config, specs: Mapping[str, Mapping[str, Any]]) -> dict[str, DomainInput]:
    """The inputs of a checkpoint's domains, whose transform is that of evaluation.

    Raises:
        ValueError: if a domain does not say how its input is made, or inputs differ in size.
    """
    inputs = {}
    for name, spec in specs.items():
        lacking = [key for key in ("size", "mean", "std") if spec.get(key) is None]
        if lacking:
            raise ValueError(
                f"serve(): expected {name!r} to say the {', '.join(lacking)} of its input, got a checkpoint without."
            )
        inputs[name] = DomainInput(
            name,
            tuple(spec["classes"]),
            spec["size"],
            resize_of(config, name, spec["size"]),
            tuple(spec["mean"]),
            tuple(spec["std"]),
            spec.get("accuracy"),
            spec.get("kept"),
        )
    sizes = {name: domain.size for name, domain in inputs.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"serve(): expected domains of one input size, got {sizes}. Hint: `domains` serves some of them."
        )
    return inputs


def find_domain(inputs: Mapping[str, DomainInput], name: str | None) -> DomainInput:
    """The domain that a request names; one that is served alone need not be named.

    Raises:
        RequestError: 400 if none is named, 404 for an unknown one.
    """
    if not name:
        if len(inputs) == 1:
            return next(iter(inputs.values()))
        raise RequestError(400, f"expected `domain` to be one of {list(inputs)}, got none")
    if name not in inputs:
        raise RequestError(404, f"expected `domain` to be one of {list(inputs)}, got {name[:100]!r}")
    return inputs[name]


def decode(body: bytes, domain: DomainInput, max_pixels: int) -> np.ndarray:
    """The pixels of an image as evaluation sees them, (size, size, 3), uint8.

    Raises:
        RequestError: 400 for an empty body or a damaged image, 413 for too many pixels, 415 for what is no image.
    """
    if not body:
        raise RequestError(400, "expected an image as the body, got none")
    try:
        image = open_image(io.BytesIO(body), max_pixels)
        return np.ascontiguousarray(middle_of(resized_pixels(image, domain.resize), domain.size))
    except TooManyPixelsError as error:
        raise RequestError(413, f"expected a smaller image, got {error}") from None
    except UnknownFormatError as error:
        raise RequestError(415, f"expected an image as the body, got {error}") from None
    except DataError as error:
        raise RequestError(400, f"expected an image that can be used, got {error}") from None
