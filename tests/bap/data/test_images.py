"""Images: limits before decoding, and the right values of every kind of pixel."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from bap.data import DataError, Domain, ImageFiles
from bap.data.files import check_images
from bap.data.images import open_image
from PIL import Image


def _png_head(width: int, height: int) -> bytes:
    """A PNG that says how large it is, and has next to no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")


def _frames(kind: str) -> bytes:
    held = io.BytesIO()
    one, two = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    one.save(held, kind, save_all=True, append_images=[two])
    return held.getvalue()


def _encoded(kind: str, size: tuple[int, int] = (8, 8)) -> bytes:
    held = io.BytesIO()
    Image.new("RGB", size, "red").save(held, kind)
    return held.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_png_head(50_000, 50_000), "more than 67,108,864"),
        (_png_head(9000, 9000), "9000 x 9000 pixels, more than 67,108,864"),
        (_png_head(1, 60_000), "1 x 60000 pixels, longer than 32 : 1"),
        (_png_head(0, 8), ""),
        (_encoded("TIFF"), "no image of the formats JPEG, PNG"),
        (_encoded("ICO", (16, 16)), "no image of the formats"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "no image of the formats"),
        (b"no image", "no image of the formats"),
        (_frames("GIF"), "an animation of 2 frames"),
        (_frames("PNG"), "an animation of 2 frames"),
        (_frames("WEBP"), "an animation of 2 frames"),
    ],
)
def test_unsupported_images_are_refused_before_decoding(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(data)
    (problem,) = check_images([path])
    assert problem.startswith(f"{path}: cannot be decoded (")
    assert message in problem
    split = ImageFiles([path], torch.tensor([0]), 16)
    domain = Domain("one", ("a",), {"train": split}, 8)
    with pytest.raises(DataError) as caught:
        list(domain.batches("train", 1))
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64 * 64).round().astype(np.uint16).reshape(64, 64)
    for name in ("a.png", "a.pgm"):
        Image.fromarray(values).save(tmp_path / name)
        found = np.asarray(open_image(tmp_path / name))
        assert found.shape == (64, 64, 3)
        expected = values / 65535 * 255
        assert np.abs(found.astype(float) - expected[..., None]).max() <= 0.5 + 1e-9, name


def _half(mode: str, left: object, right: object) -> Image.Image:
    image = Image.new(mode, (16, 16), left)
    image.paste(right, (8, 0, 16, 16))
    return image


def _palette(transparent: bool) -> Image.Image:
    image = Image.new("P", (16, 16), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (8, 0, 16, 16))
    if transparent:
        image.info["transparency"] = 1
    return image


@pytest.mark.parametrize(
    ("image", "file", "left", "right"),
    [
        (_half("RGB", (255, 0, 0), (0, 0, 255)), "a.png", (255, 0, 0), (0, 0, 255)),
        (_half("RGBA", (255, 0, 0, 255), (0, 0, 255, 0)), "a.png", (255, 0, 0), (255, 255, 255)),
        (_half("RGBA", (255, 0, 0, 255), (0, 0, 0, 51)), "a.png", (255, 0, 0), (204, 204, 204)),
        (_half("LA", (100, 255), (100, 0)), "a.png", (100, 100, 100), (255, 255, 255)),
        (_half("L", 100, 200), "a.png", (100, 100, 100), (200, 200, 200)),
        (_half("1", 0, 1), "a.png", (0, 0, 0), (255, 255, 255)),
        (_palette(False), "a.gif", (255, 0, 0), (0, 0, 255)),
        (_palette(True), "a.png", (255, 0, 0), (255, 255, 255)),
        (_half("CMYK", (0, 255, 255, 0), (255, 255, 0, 0)), "a.jpg", (255, 0, 0), (0, 0, 255)),
        (_half("RGB", (255, 0, 0), (0, 0, 255)), "a.bmp", (255, 0, 0), (0, 0, 255)),
        (_half("RGB", (255, 0, 0), (0, 0, 255)), "a.ppm", (255, 0, 0), (0, 0, 255)),
    ],
    ids=["rgb", "clear", "shaded", "grey-alpha", "grey", "bits", "palette", "key", "cmyk", "bmp", "ppm"],
)
def test_pixel_modes(
    image: Image.Image, file: str, left: tuple[int, ...], right: tuple[int, ...], tmp_path: Path
) -> None:
    image.save(tmp_path / file)
    found = np.asarray(open_image(tmp_path / file)).astype(int)
    assert np.abs(found[4, 2] - left).max() <= 3
    assert np.abs(found[4, 13] - right).max() <= 3


def test_the_orientation_of_exif_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (20, 10)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "PPM", "WEBP", "GIF"])
def test_truncated_image_is_found_at_any_position(kind: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (72, 90, 3)).astype(np.uint8)
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, kind)
    paths = [tmp_path / f"{number}.img" for number in range(40)]
    for path in paths:
        path.write_bytes(held.getvalue())
    assert check_images(paths) == []
    # The sample decodes every second one; those that end without their mark are decoded as well.
    number = 17 if kind in ("JPEG", "PNG") else 16
    paths[number].write_bytes(held.getvalue()[: len(held.getvalue()) * 2 // 3])
    (problem,) = check_images(paths)
    assert problem.startswith(f"{paths[number]}: cannot be decoded")


def test_random_damage_is_a_data_error_or_an_image(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    path = tmp_path / "image"
    for kind in ("JPEG", "PNG", "BMP", "PPM", "WEBP", "GIF"):
        data = _encoded(kind, (12, 9))
        for _ in range(60):
            damaged = bytearray(data)
            for place in random.integers(0, len(data), 3):
                damaged[place] = random.integers(0, 256)
            path.write_bytes(damaged[: random.integers(1, len(data) + 1)])
            with contextlib.suppress(DataError):
                assert open_image(path).mode == "RGB"


def test_workers_name_the_file_without_a_traceback(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for path in paths:
        path.write_bytes(_encoded("PNG"))
    paths[2].write_bytes(_encoded("PNG")[:45])
    split = ImageFiles(paths, torch.zeros(4, dtype=torch.int64), 8, workers=1)
    domain = Domain("one", ("a",), {"train": split}, 8)
    with pytest.raises(DataError) as caught:
        list(domain.batches("train", 2))
    assert str(caught.value).startswith(f"ImageFiles: expected {paths[2]} to be an image, got ")
    assert "Traceback" not in str(caught.value)


def test_a_crop_larger_than_the_image_and_labels_without_class(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(_encoded("PNG"))
    split = ImageFiles([tmp_path / "a.png"], torch.tensor([3]), 8)
    with pytest.raises(ValueError, match=r"expected labels of 'one' \(train\) to be from 0 to 0, got 3 to 3"):
        Domain("one", ("a",), {"train": split}, 8)
    split = ImageFiles([tmp_path / "a.png"], torch.tensor([0]), 8)
    with pytest.raises(DataError, match="resized to at least its crop, 9, got 8 x 8"):
        list(Domain("one", ("a",), {"train": split}, 9).batches("train", 1, (0,)))


def test_every_file_is_decoded_where_the_settings_say_so(tmp_path: Path) -> None:
    from bap.config import Config
    from bap.train.domains import load_domains

    for split in ("train", "test"):
        for name in ("a", "b"):
            folder = tmp_path / "flowers" / split / name
            folder.mkdir(parents=True)
            for number in range(20):
                (folder / f"{number:02}.bmp").write_bytes(_encoded("BMP", (16, 16)))
    # A BMP has no mark of its end, and this one is not in the sample: every second of 40 files.
    path = tmp_path / "flowers" / "train" / "a" / "03.bmp"
    path.write_bytes(path.read_bytes()[:-300])
    config = Config(data="sketch", root=str(tmp_path), domains=["flowers"], source="flowers", full=False, size=16)
    assert list(load_domains(config)) == ["flowers"]
    with pytest.raises(DataError, match=r"03\.bmp: cannot be decoded"):
        load_domains(config.replace(decode_all=True))
