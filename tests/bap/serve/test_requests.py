from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from bap.config import Config
from bap.data import Domain, ImageFiles
from bap.data.transform import normalised
from bap.serve.requests import DomainInput, RequestError, decode, domain_inputs, find_domain
from PIL import Image

from .conftest import png

GREY = {"size": 32, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "classes": ["a", "b"]}


def _input(**changes: object) -> DomainInput:
    fields = {"name": "dots", "classes": ("a", "b"), "size": 8, "resize": 8, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return DomainInput(**{**fields, **changes})  # type: ignore[arg-type]


def _photograph(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize(
    ("suite", "name", "size", "resize"),
    [
        ("builtin", "digits", 32, 32),
        ("decathlon", "svhn", 64, 72),
        ("sketch", "flowers", 224, 256),
        ("sketch", "cubs_cropped", 224, (224, 224)),
    ],
)
def test_an_image_is_what_evaluation_makes_of_its_file(
    suite: str, name: str, size: int, resize: int | tuple[int, int], tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(_photograph(301, 177)))
    served = domain_inputs(Config(data={"suite": suite, "root": "."}), {name: {**GREY, "size": size}})[name]
    domain = Domain(name, ("a", "b"), {}, size, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    expected = ImageFiles([path], None, resize).image(0, domain, None)
    found = normalised(decode(path.read_bytes(), served, 10**6), served.mean, served.std)
    assert torch.equal(found, expected)
    assert found.shape == (3, size, size)


def test_the_middle_is_taken() -> None:
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 200
    assert (decode(png(pixels), _input(), 1000) == 200).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "PPM", "WEBP", "GIF"])
def test_formats_are_told_by_their_content(kind: str) -> None:
    file = io.BytesIO()
    Image.fromarray(_photograph(20, 10)).save(file, kind)
    assert decode(file.getvalue(), _input(), 200).shape == (8, 8, 3)


def _bomb(side: int) -> bytes:
    """A PNG of a few kilobytes that announces very many pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "expected an image as the body, got none"),
        (b"hello", 415, "no image of the formats JPEG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "no image"),
        (png(_photograph(20, 20))[:-400], 400, "expected an image that can be used"),
        (png(_photograph(400, 2)), 400, "longer than 32 : 1"),
        (png(_photograph(101, 100)), 413, "101 x 100 pixels, more than 10,000"),
        (_bomb(6000), 413, "6000 x 6000 pixels, more than 10,000"),
        (_bomb(60_000), 413, "more than"),
    ],
)
def test_bad_images_are_refused(body: bytes, status: int, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        decode(body, _input(), 10_000)
    assert caught.value.status == status


def test_unknown_domains_are_refused_and_the_known_ones_named() -> None:
    inputs = {"a": _input(name="a"), "b": _input(name="b")}
    assert find_domain(inputs, "b").name == "b"
    with pytest.raises(RequestError, match=r"one of \['a', 'b'\], got 'c'") as caught:
        find_domain(inputs, "c")
    assert caught.value.status == 404
    with pytest.raises(RequestError, match=r"one of \['a', 'b'\], got none") as caught:
        find_domain(inputs, None)
    assert caught.value.status == 400
    assert find_domain({"a": inputs["a"]}, None).name == "a"


def test_checkpoints_that_do_not_say_their_input_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected 'a' to say the size, std of its input"):
        domain_inputs(Config(), {"a": {**GREY, "size": None, "std": None}})


def test_domains_of_several_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one input size, got \{'a': 32, 'b': 16\}"):
        domain_inputs(Config(), {"a": GREY, "b": {**GREY, "size": 16}})
