"""The decathlon on disk: whatever is wrong in its files is named before training, and nothing is a traceback."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bap.config import Config
from bap.data import DECATHLON, DataError, load_decathlon
from bap.results.run import train_run
from bap.train.domains import check_source, load_domains
from PIL import Image

CODES = {"aircraft": 1, "dtd": 4, "imagenet12": 6}


def _domain(root: Path, domain: str, splits: tuple[str, ...] = ("train", "val", "test_stripped")) -> None:
    code = CODES.get(domain, 2) * 10**7
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split in splits:
        images, annotations = [], []
        for number in range(4):
            file = root / "data" / domain / split / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number, 0, 0)).save(file)
            identity = code + number + 100 * len(split)
            images.append({"id": identity, "width": 8, "height": 8, "file_name": str(file.relative_to(root))})
            annotations.append({"id": number, "image_id": identity, "category_id": code + 1 + number % 2})
        categories = [{"id": code + k, "name": f"kind {k}", "supercategory": domain} for k in (1, 2)]
        content: dict[str, Any] = {"images": images, "categories": categories}
        if split != "test_stripped":
            content["annotations"] = annotations
        (root / "annotations" / f"{domain}_{split}.json").write_text(json.dumps(content))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    _domain(tmp_path, "dtd")
    return tmp_path


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Ways to every value in a tree of JSON."""
    found = [path] if path else []
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            found += _places(value[key], (*path, key))
    return found


def _labels(root: Path) -> list[tuple[str, list[str], list[int] | None]]:
    domain = load_decathlon(root, ["dtd"], full=False)["dtd"]
    return [
        (name, [str(one) for one in split.paths], None if split.labels is None else split.labels.tolist())
        for name, split in domain.splits.items()
    ]


WRONG = [None, True, -1, 1.5, 10**30, "x", "", "../../etc/passwd", "/etc/passwd", "a\0b", [], {}, [1], float("nan")]


def test_random_damage_to_the_annotations_is_named_or_changes_nothing(root: Path) -> None:
    random = np.random.default_rng(0)
    path = root / "annotations" / "dtd_train.json"
    whole = json.loads(path.read_text())
    before = _labels(root)
    places = [place for place in _places(whole) if place[-1] not in ("width", "height", "supercategory")]
    refused = 0
    for number in range(250):
        content = copy.deepcopy(whole)
        place = places[random.integers(len(places))]
        holder = content
        for key in place[:-1]:
            holder = holder[key]
        if number % 5 == 0:
            del holder[place[-1]]
        elif number % 5 == 1 and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[place[-1]]))
        else:
            holder[place[-1]] = WRONG[random.integers(len(WRONG))]
        path.write_text(json.dumps(content))
        try:
            found = _labels(root)
        except DataError as error:
            refused += 1
            named = any(one in str(error) for one in ("dtd_train.json", "dtd (train)", "dtd_val.json: categories"))
        else:
            # An annotation's own id is not read; a repeated annotation says the same again.
            named = found == before or place[0] == "images" or place[-1] == "name"
            named &= not any("passwd" in one for _, paths, _ in found for one in paths)
        assert named, (place, content)
    assert refused > 150


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["images"][1].update(file_name="../x.png"),
            r"'../x.png' is not a file inside the folder of the data",
        ),
        (lambda c: c["images"][1].update(file_name="/x.png"), r"'/x.png' is not a file inside the folder of the data"),
        (lambda c: c["images"][1].update(file_name="data/\0"), r"is not a file inside the folder of the data"),
        (lambda c: c["images"][1].update(file_name=3), r"images.1.file_name: Input should be a valid string"),
        (lambda c: c["images"][1].pop("id"), r"images.1.id: Field required"),
        (lambda c: c["images"][1].update(id=True), r"images.1.id: Input should be a valid integer"),
        (lambda c: c["images"][1].update(c["images"][0], id=7), r"data/dtd/train/0.png is listed twice"),
        (lambda c: c["images"].__setitem__(0, None), r"images.0: Input should be a valid dictionary"),
        (lambda c: c["annotations"][0].update(image_id=5), r"image 5 is annotated, but not listed"),
        (
            lambda c: c["annotations"][0].update(category_id="1"),
            r"annotations.0.category_id: Input should be a valid int",
        ),
        (lambda c: c["annotations"][0].update(category_id=9), r"has category 9, which is not listed"),
        (lambda c: c.update(annotations={}), r"annotations: Input should be a valid list"),
        (lambda c: c["categories"].append(c["categories"][0]), r"category 40000001 is listed twice"),
        (lambda c: c["categories"][0].update(name=None), r"categories.0.name"),
        (
            lambda c: c["categories"][0].update(name="other"),
            r"dtd_val.json: categories other than those of the training",
        ),
        (lambda c: c.pop("categories"), r"no categories"),
        (lambda c: c["categories"].pop(), r"which is not listed"),
        (lambda c: c.update(images=[]), "to list `images`"),
    ],
)
def test_each_kind_of_damage_is_named(root: Path, change, message: str) -> None:
    path = root / "annotations" / "dtd_train.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        load_decathlon(root, ["dtd"], full=False)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"null", b"[" * 100_000, b'{"images": 1}'])
def test_invalid_annotation_files_are_named(root: Path, content: bytes) -> None:
    path = root / "annotations" / "dtd_val.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"dtd_val\.json"):
        load_decathlon(root, ["dtd"], full=False)


def test_an_image_of_two_splits_is_named(root: Path) -> None:
    path = root / "annotations" / "dtd_val.json"
    content = json.loads(path.read_text())
    content["images"][0]["file_name"] = "data/dtd/train/0.png"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"1 images are in train and in val, such as .*data/dtd/train/0.png"):
        load_decathlon(root, ["dtd"], full=False)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A decathlon of three domains, of four images each."""
    whole = dict(DECATHLON)
    specs = {name: ((2, 4, 4, 4), *whole[name][1:]) for name in whole if name in ("imagenet12", "aircraft", "dtd")}
    DECATHLON.clear()
    DECATHLON.update(specs)
    monkeypatch.setattr("bap.train.domains._SUITES", {"decathlon": tuple(DECATHLON)})
    yield
    # As a whole: entries that are put back one by one would stand in another order.
    DECATHLON.clear()
    DECATHLON.update(whole)


def _config(root: Path, **changes: Any) -> Config:
    options = {"widths": [4, 4, 4], "blocks": [1, 1, 1]}
    return Config(data="decathlon", root=str(root), model_options=options, epochs=1, batch=4, backend="aten", **changes)


def test_a_whole_benchmark_needs_every_domain_and_split(small: None, tmp_path: Path) -> None:
    root = tmp_path / "data"
    _domain(root, "aircraft")
    _domain(root, "dtd", ("train", "test_stripped"))
    with pytest.raises(DataError) as caught:
        train_run(_config(root), tmp_path / "run")
    assert "imagenet12: no annotations of train, val, test in" in str(caught.value)
    assert "dtd: no annotations of val in" in str(caught.value)
    assert "Hint: nothing is fetched here; full=False" in str(caught.value)
    # An extract without validation images is found before training, too.
    with pytest.raises(ValueError, match="expected 'dtd' to have images with labels in 'val', got no such split"):
        train_run(_config(root, full=False, source="dtd"), tmp_path / "run")
    _domain(root, "dtd")
    # The source is not replaced by the next domain, not in an extract either.
    chosen = _config(root, domains=["dtd", "aircraft"])
    with pytest.raises(ValueError, match=r"expected the source 'imagenet12' to be among the domains, got \['dtd'"):
        train_run(chosen, tmp_path / "run")
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    with pytest.raises(ValueError, match="expected the source 'svhn' to be among the domains"):
        check_source(_config(root, full=False, source="svhn"), ["dtd"])
    assert list(load_domains(_config(root, source_mode="excluded"))) == ["aircraft", "dtd"]
    with pytest.raises(ValueError, match=r"expected the source 'imagenet12' to be among the domains, got \['aircraft'"):
        train_run(_config(root, full=False), tmp_path / "run")
    results = train_run(_config(root, full=False, source="dtd"), tmp_path / "extract")
    assert results["protocol"]["source"] == "dtd"
    assert results["protocol"]["missing"] == ["imagenet12"]
    _domain(root, "imagenet12")
    for split in ("train", "val", "test_stripped"):
        path = root / "annotations" / f"imagenet12_{split}.json"
        path.write_text(path.read_text().replace("60000002", "69000002"))
    with pytest.raises(
        DataError, match="categories 60000001 to 69000002, expected 1 to 2 beyond a multiple of 10,000,000"
    ):
        load_domains(_config(root))
    _domain(root, "imagenet12")
    results = train_run(_config(root), tmp_path / "whole")
    assert results["protocol"]["whole"] is True
    assert results["protocol"]["source"] == "imagenet12"
    assert (results["domains"], results["split"]) == (["imagenet12", "aircraft", "dtd"], "val")


def test_evaluation_needs_its_split_only(small: None, tmp_path: Path) -> None:
    _domain(tmp_path, "dtd", ("train", "val"))
    config = _config(tmp_path, domains=["dtd"])
    assert list(load_domains(config, ("train", "val"))["dtd"].splits) == ["train", "val"]
    with pytest.raises(DataError, match="dtd: no annotations of test in"):
        load_domains(config, ("test",))
    with pytest.raises(DataError, match="expected `size` to be at most 72"):
        load_domains(_config(tmp_path, domains=["dtd"], size=80))
