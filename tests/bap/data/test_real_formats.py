"""Tiny folders in the real formats, trained and evaluated end to end; what is wrong in them is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bap.config import Config
from bap.data import DECATHLON, Arrays, DataError, ImageFiles, load_decathlon, load_sketch, random_of
from bap.results.report import make_report
from bap.results.run import train_run
from bap.train.domains import load_domains
from bap.train.evaluate import predict
from bap.train.resume import check_same_data, data_fingerprint
from PIL import Image

COLOURS = {0: (200, 40, 40), 1: (40, 200, 40)}


def _image(path: Path, label: int, random: np.random.Generator, size: tuple[int, int] = (90, 72)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.clip(np.array(COLOURS[label]) + random.normal(0, 30, (size[1], size[0], 3)), 0, 255)
    Image.fromarray(pixels.astype(np.uint8)).save(path, quality=95)


def _decathlon(root: Path, domain: str, code: int, count: int = 12) -> None:
    """Two classes; every third image lies in the folder of the other class, as in the real ones."""
    random = np.random.default_rng(code)
    categories = [{"id": code * 10**7 + k, "name": f"kind {k}", "supercategory": domain} for k in (2, 1)]
    for split in ("train", "val", "test"):
        images, annotations = [], []
        for number in range(count):
            label = number % 2
            folder = (1 - label if number % 3 == 0 else label) + 1
            name = f"{number + 1:06d}.jpg"
            file = f"data/{domain}/{split}/{name}" if split == "test" else f"data/{domain}/{split}/{folder:04d}/{name}"
            _image(root / file, label, random)
            identity = code * 10**7 + number + {"train": 0, "val": 100, "test": 200}[split]
            images.append({"id": identity, "width": 90, "height": 72, "file_name": file})
            annotations.append({"id": number, "image_id": identity, "category_id": code * 10**7 + label + 1})
        # Joined by the id, not by the place in the list.
        annotations.reverse()
        content = {"images": images, "categories": categories}
        if split != "test":
            content["annotations"] = annotations
        path = root / "annotations" / f"{domain}_{'test_stripped' if split == 'test' else split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    _decathlon(tmp_path, "aircraft", 1)
    _decathlon(tmp_path, "dtd", 4)
    return tmp_path


def test_labels_come_from_the_json_and_not_from_the_folder(root: Path) -> None:
    domains = load_decathlon(root, full=False, decode=-1)
    assert list(domains) == ["aircraft", "dtd"]
    air = domains["aircraft"]
    assert air.classes == ("kind 1", "kind 2")
    assert air.splits["train"].labels.tolist() == [0, 1] * 6
    assert air.splits["test"].labels is None
    assert (air.mean, air.flip) == ((0.4798, 0.5107, 0.5344), True)
    assert (domains["dtd"].size, domains["dtd"].flip) == (64, False)
    for x, y in air.batches("train", 4, (0,)):
        assert x.shape == (4, 3, 64, 64)
        pixels = x * torch.tensor(air.std).view(3, 1, 1) + torch.tensor(air.mean).view(3, 1, 1)
        red = pixels[:, 0].mean((1, 2)) > pixels[:, 1].mean((1, 2))
        assert torch.equal(red, y == 0)


def test_file_batches_do_not_depend_on_workers(root: Path) -> None:
    one = load_decathlon(root, ["dtd"], full=False)["dtd"]
    two = load_decathlon(root, ["dtd"], workers=2, full=False)["dtd"]
    for (x, y), (u, v) in zip(one.batches("train", 4, (3, 1)), two.batches("train", 4, (3, 1)), strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)
    again = next(one.batches("train", 4, (3, 2)))[0]
    assert not torch.equal(again, next(one.batches("train", 4, (3, 1)))[0])


SETTINGS = {
    "full": False,
    "model": "resnet26",
    "model_options": {"widths": [8, 8, 16], "blocks": [1, 1, 1]},
    "epochs": 8,
    "batch": 4,
    "lr_head": 0.1,
    "lr_norm": 0.02,
    "lr_switch": 2e-3,
    "multiplier_rate": 1.0,
    "backend": "aten",
}


def test_domains_without_augmentation_train_on_what_is_evaluated(root: Path) -> None:
    domains = load_decathlon(root, full=False)
    cropped = {name: (domain.crop, domain.flip) for name, domain in domains.items()}
    assert cropped == {"aircraft": (True, True), "dtd": (False, False)}
    assert {name for name, spec in DECATHLON.items() if not spec[3]} == {"dtd", "gtsrb", "omniglot", "svhn"}
    for name, domain in domains.items():
        split = domain.splits["train"]
        assert isinstance(split, ImageFiles)
        same = []
        for number in range(len(split)):
            evaluated = split.image(number, domain, None)
            same += [torch.equal(split.image(number, domain, random_of(seed)), evaluated) for seed in range(4)]
        assert all(same) == (name == "dtd"), name
    # A run that was started with random crops does not go on without them.
    before = data_fingerprint({"dtd": replace(domains["dtd"], crop=True)})
    assert "crop" not in before["dtd"]
    with pytest.raises(ValueError, match=r"got others for \['dtd'\]"):
        check_same_data(before, {"dtd": domains["dtd"]}, "there")


def test_crops_of_the_residual_adapters_loader(tmp_path: Path) -> None:
    # Its classes for DTD, and for the three that are not flipped, in training and evaluation: sizes, crop, flip.
    expected = {"aircraft": (64, True), "dtd": (64, True), "gtsrb": (72, False), "svhn": (72, False)}
    for number, name in enumerate(expected, 1):
        _decathlon(tmp_path, name, number, 4)
    for size in (None, 48):
        domains = load_decathlon(tmp_path, full=False, size=size, crops="rebuffi")
        for name, (side, augmented) in expected.items():
            domain = domains[name]
            side = side if size is None or not augmented else size
            assert (domain.size, domain.crop, domain.flip) == (side, augmented, augmented)
            x, _ = next(domain.batches("val", 2))
            assert x.shape == (2, 3, side, side)
    config = Config(data="decathlon", root=str(tmp_path), crops="rebuffi", source="aircraft", **SETTINGS)
    results = train_run(config.replace(epochs=1), tmp_path / "run")
    assert set(results["accuracy"]) == set(expected)
    with pytest.raises(ValueError, match=r"data.crops: stored 'rebuffi', asked 'papers'"):
        train_run(config.replace(epochs=1, crops="papers"), tmp_path / "run", resume=True)


def test_training_on_validation_images_too_is_never_evaluated_on_them(root: Path, tmp_path: Path) -> None:
    shown = {**SETTINGS, "epochs": 1, "data": "decathlon", "root": str(root), "source": "dtd", "train_on": "train+val"}
    with pytest.raises(ValueError, match=r"`data.evaluate_on` to be 'test' or 'train' where .* got 'val', which is tr"):
        Config(**shown)
    with pytest.raises(ValueError, match=r"expected `data.train_on` to be 'train' for 'sketch'"):
        Config(**{**shown, "data": "sketch", "evaluate_on": "test"})
    config = Config(**shown, evaluate_on="train")
    domains = load_domains(config)
    apart = load_decathlon(root, full=False)
    for name, domain in domains.items():
        assert list(domain.splits) == ["train", "test"]
        both, parts = domain.splits["train"], [apart[name].splits[split] for split in ("train", "val")]
        assert isinstance(both, ImageFiles)
        assert both.paths == parts[0].paths + parts[1].paths
        assert both.image_ids == parts[0].image_ids + parts[1].image_ids
        assert both.labels is not None
        assert both.labels.tolist() == parts[0].labels.tolist() + parts[1].labels.tolist()
    results = train_run(config, tmp_path / "both")
    assert results["split"] == "train"
    assert results["protocol"]["trained_on"] == "train+val"
    assert results["protocol"]["images"] == {"aircraft": 24, "dtd": 24}
    assert "S_partial_train" in results["scores"]
    # The labels of the test images are hidden: nothing could be measured on them.
    with pytest.raises(ValueError, match="expected 'aircraft' to have images with labels in 'test', got no labels"):
        train_run(config.replace(evaluate_on="test"), None)
    (root / "annotations" / "dtd_val.json").unlink()
    with pytest.raises(ValueError, match=r"expected 'dtd' to have 'val' for `data.train_on`, got no such split"):
        load_domains(config)
    with pytest.raises(ValueError, match="to be images in memory of the same size, got others"):
        Arrays(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), None).joined(domains["dtd"].splits["train"])
    with pytest.raises(ValueError, match="to be image files of the same size and classes, got others"):
        domains["dtd"].splits["train"].joined(domains["aircraft"].splits["train"])


def test_decathlon_end_to_end(root: Path, tmp_path: Path) -> None:
    config = Config(data="decathlon", root=str(root), source="aircraft", **SETTINGS)
    results = train_run(config, tmp_path / "run")
    # Labels of the test images are not public: the accuracy is that of the validation images, and it says so.
    assert results["split"] == results["protocol"]["evaluated_on"] == "val"
    assert results["domains"] == ["aircraft", "dtd"]
    assert (results["protocol"]["domains"], results["protocol"]["of"], results["protocol"]["whole"]) == (2, 10, False)
    assert "imagenet12" in results["protocol"]["missing"]
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results
    assert results["mean_accuracy"] > 90
    assert all(value <= 0.5 for value in results["kept"].values())
    # S of two of ten domains is not called S, and no published row stands beside it.
    assert 0 < results["scores"]["S_partial_val"] <= 2000
    assert "S" not in results["scores"]
    text = make_report([tmp_path / "run"], tmp_path / "report").read_text()
    assert "(2 of 10 domains, val) |" in text
    assert "Published rows are left out" in text
    assert "Piggyback" not in text
    from bap.train.checkpoint import load_checkpoint

    model, _, _ = load_checkpoint(tmp_path / "run" / "checkpoint")
    domains = load_domains(config)
    answers = predict(model, domains["aircraft"])
    assert [one["image_id"] for one in answers] == [10**7 + 200 + number for number in range(12)]
    right = sum(one["category_id"] == 10**7 + 1 + number % 2 for number, one in enumerate(answers))
    assert right >= 11


def test_sketch_end_to_end(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name in ("cubs_cropped", "flowers"):
        for split, count in (("train", 8), ("test", 3)):
            for label, kind in enumerate(("001.alpha", "002.beta")):
                for number in range(count):
                    _image(tmp_path / name / split / kind / f"{number}.png", label, random, (40, 60))
    domains = load_sketch(tmp_path, size=32, full=False, decode=-1)
    assert list(domains) == ["cubs_cropped", "flowers"]
    # Cropped sets are squeezed to the size; others are resized on the shorter side and cropped.
    assert domains["cubs_cropped"].splits["train"].resize == (32, 32)
    assert domains["flowers"].splits["train"].resize == 37
    assert domains["flowers"].splits["train"].labels.tolist() == [0] * 8 + [1] * 8
    config = Config(data="sketch", root=str(tmp_path), size=32, **SETTINGS)
    results = train_run(config, tmp_path / "run", domains=domains)
    assert results["mean_accuracy"] > 80
    assert set(results["scores"]["domains"]) == {"cubs_cropped", "flowers"}


def test_missing_broken_and_wrong_files_are_named(root: Path) -> None:
    with pytest.raises(
        DataError, match="aircraft to be whole, got:\n  2 classes, expected 100\n  12 train images, exp"
    ):
        load_decathlon(root, ["aircraft"])
    broken = root / "data/dtd/train/0002/000001.jpg"
    assert broken.exists()
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(DataError, match=r"dtd \(train\) to be whole, got:\n  .*000001.jpg: cannot be decoded"):
        load_decathlon(root, ["dtd"], full=False)
    broken.write_bytes(b"")
    with pytest.raises(DataError, match=r"000001.jpg: an empty file"):
        load_decathlon(root, ["dtd"], full=False)
    broken.unlink()
    with pytest.raises(DataError, match=r"000001.jpg: no such file"):
        load_decathlon(root, ["dtd"], full=False)
    with pytest.raises(DataError, match=r"among \['imagenet12', .*got 'mnist'"):
        load_decathlon(root, ["mnist"])
    with pytest.raises(DataError, match="nothing is fetched here"):
        load_decathlon(root, ["svhn"])
    with pytest.raises(DataError, match="expected annotations of the decathlon in"):
        load_decathlon(root / "data")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"].pop(), "1 images without annotation, such as"),
        (lambda c: c["annotations"][0].update(category_id=77), "category 77, which is not listed"),
        (lambda c: c["images"][1].update(id=c["images"][0]["id"]), "1 image ids are used twice"),
        (
            lambda c: (
                c["annotations"].append({**c["annotations"][0], "category_id": c["categories"][0]["id"]})
                or c["annotations"].append({**c["annotations"][0], "category_id": c["categories"][1]["id"]})
            ),
            "has two categories",
        ),
        (lambda c: c.pop("images"), "to list `images`"),
    ],
)
def test_annotations_are_checked(root: Path, change, message: str) -> None:
    path = root / "annotations" / "dtd_train.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        load_decathlon(root, ["dtd"], full=False)


def test_image_damaged_after_loading_is_named(root: Path) -> None:
    domain = load_decathlon(root, ["aircraft"], full=False)["aircraft"]
    path = domain.splits["train"].paths[5]
    path.write_bytes(b"no image")
    with pytest.raises(DataError, match=f"expected .*{path.name} to be an image"):
        list(domain.batches("train", 12, (0,)))


def test_wrong_folders_are_named(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    with pytest.raises(DataError, match="expected folders such as"):
        load_sketch(tmp_path)
    _image(tmp_path / "flowers/train/a/1.jpg", 0, random)
    with pytest.raises(DataError, match=r"expected the folder .*imagenet/train, got none"):
        load_sketch(tmp_path)
    with pytest.raises(DataError, match=r"expected the folder .*test, got none"):
        load_sketch(tmp_path, full=False)
    _image(tmp_path / "flowers/test/b/1.jpg", 0, random)
    with pytest.raises(DataError, match=r"got others: \['b'\]"):
        load_sketch(tmp_path, full=False)
    _image(tmp_path / "flowers/train/b/1.jpg", 0, random)
    with pytest.raises(DataError, match=r"expected 102 classes in .* got 2"):
        load_sketch(tmp_path, ["flowers"])
    (tmp_path / "flowers/test/b/2.tif").write_bytes(b"II*\0")
    with pytest.raises(DataError, match=r"b/2.tif: a format that is not read"):
        load_sketch(tmp_path, full=False)
    with pytest.raises(DataError, match="a: no images"):
        load_sketch(tmp_path, full=False)
    with pytest.raises(DataError, match="got 'faces'"):
        load_sketch(tmp_path, ["faces"])


def test_published_sizes_are_complete() -> None:
    assert len(DECATHLON) == 10
    assert sum(specs[0][0] for specs in DECATHLON.values()) == 1000 + 100 + 100 + 2 + 47 + 43 + 1623 + 10 + 101 + 102
