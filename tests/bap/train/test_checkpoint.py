"""Files of a checkpoint belong together: a flipped bit, and a file of another run, are found and named."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bap.config import Config
from bap.data import Arrays, Domain
from bap.files import FileError, read_tensors, write_tensors
from bap.models import build, load_weights
from bap.train.checkpoint import domains_of, load_checkpoint, save_checkpoint, save_domain
from bap.train.network import switched_network
from bap.train.trainer import STATE, Trainer
from safetensors.torch import save_file

import bap_kernels as bk

sys.path.insert(0, str(Path(__file__).parent))
from old_format import old_checkpoint, old_tensors

SPEC = {"size": 8, "mean": [0.5] * 3, "std": [0.25] * 3, "kept": 0.5, "accuracy": 61.25}


def _config(seed: int = 0) -> Config:
    return Config(model_options={"widths": [2, 2, 2], "blocks": [1, 1, 1]}, seed=seed)


def _saved(folder: Path, seed: int = 0) -> Path:
    config = _config(seed)
    model = switched_network(config, {"z": 3, "a": 2})
    specs = {"z": {"classes": ["x", "y", "w"], **SPEC}, "a": {"classes": ["u", "v"], **SPEC}}
    save_checkpoint(folder, model, config, specs)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return _saved(tmp_path / "checkpoint")


def _content(folder: Path) -> tuple[object, ...]:
    model, config, specs = load_checkpoint(folder)
    state = {name: (value.dtype, value.tolist()) for name, value in model.state_dict().items()}
    return state, config, specs, bk.domain_names(model) if hasattr(bk, "domain_names") else None


def _tried(call: Callable[[], Any]) -> tuple[Any, str | None]:
    """What a call gives, or the message with which it refuses a file."""
    try:
        return call(), None
    except (FileError, ValueError) as error:
        return None, str(error)


def _flips(folder: Path, count: int, seed: int) -> Iterator[tuple[Path, int, int]]:
    """Bits of all files: every file the same number, evenly drawn."""
    random = np.random.default_rng(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        size = path.stat().st_size
        for place in random.choice(8 * size, min(count, 8 * size), replace=False):
            yield path, int(place) // 8, int(place) % 8


def test_domains_keep_their_order(folder: Path) -> None:
    assert domains_of(folder) == ["z", "a"]
    model, config, specs = load_checkpoint(folder)
    assert list(specs) == ["z", "a"]
    for name in ("n", "b"):
        bk.nn.add_domain_(model, name, classes=2)
        save_domain(folder, model, name, {"classes": ["u", "v"], **SPEC})
    assert list(load_checkpoint(folder)[2]) == ["z", "a", "n", "b"]
    assert list(load_checkpoint(folder, ["b", "z"])[2]) == ["b", "z"]
    assert config == _config()


def test_every_flipped_bit_is_found_or_changes_nothing(folder: Path) -> None:
    before = _content(folder)
    harmless = total = 0
    for path, byte, bit in _flips(folder, 110, 0):
        data = path.read_bytes()
        damaged = bytearray(data)
        damaged[byte] ^= 1 << bit
        path.write_bytes(damaged)
        total += 1
        found, problem = _tried(lambda: _content(folder))
        if problem is not None:
            assert path.name in problem, (path, byte, bit)
            assert str(folder) in problem
        else:
            # Such as white space in JSON.
            harmless += 1
            assert path.suffix == ".json"
            assert found == before, (path, byte, bit)
        path.write_bytes(data)
    assert total >= 500
    assert harmless < total // 20
    assert _content(folder) == before


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("model.safetensors", ("model.safetensors", "config.json")),
        ("config.json", ("config.json",)),
        ("domains/z/domain.safetensors", ("domain.safetensors", "domain_config.json")),
        ("domains/z/domain_config.json", ("domain_config.json",)),
    ],
)
def test_a_file_of_another_run_is_refused(folder: Path, file: str, named: tuple[str, ...], tmp_path: Path) -> None:
    other = _saved(tmp_path / "other", seed=1)
    shutil.copy(other / file, folder / file)
    with pytest.raises(FileError, match=r"of another network|belong to") as caught:
        load_checkpoint(folder)
    assert all(name in str(caught.value) for name in named)


def test_a_domain_of_another_run_is_refused(folder: Path, tmp_path: Path) -> None:
    other = _saved(tmp_path / "other", seed=1)
    shutil.rmtree(folder / "domains" / "a")
    shutil.copytree(other / "domains" / "a", folder / "domains" / "a")
    assert list(load_checkpoint(folder, ["z"])[2]) == ["z"]
    with pytest.raises(FileError, match=r"a/domain_config.json to belong to .*config.json, got a domain of another"):
        load_checkpoint(folder)
    shutil.rmtree(folder / "domains" / "a")
    shutil.copytree(folder / "domains" / "z", folder / "domains" / "a")
    with pytest.raises(FileError, match="to be of 'a', got that of 'z'"):
        load_checkpoint(folder)


def test_a_domain_that_is_lost_is_missed_unless_the_others_are_named(folder: Path) -> None:
    (folder / "domains" / "a" / "domain_config.json").unlink()
    with pytest.raises(FileError, match=r"all domains that config.json lists, got no domain_config.json of \['a'\]"):
        load_checkpoint(folder)
    assert list(load_checkpoint(folder, ["z"])[2]) == ["z"]


def test_settings_are_validated_and_named(folder: Path) -> None:
    path = folder / "config.json"
    head = json.loads(path.read_text())
    head["config"]["beta"] = 0.25
    path.write_text(json.dumps(head))
    with pytest.raises(FileError, match=r"config.json to have the digest .* a damaged or edited file"):
        load_checkpoint(folder)
    for content in ("[]", "{}", '{"format": 3}', '{"format": "2"}', "[" * 100_000, "\x00"):
        path.write_text(content)
        with pytest.raises(FileError, match=r"config.json to be"):
            load_checkpoint(folder)


@pytest.mark.filterwarnings("error")
def test_checkpoints_of_earlier_versions_load_with_a_warning(folder: Path) -> None:
    before = _content(folder)
    old_checkpoint(folder)
    with pytest.warns(UserWarning, match="of an earlier format, without digests"):
        model, config, specs = load_checkpoint(folder)
    assert list(specs) == ["a", "z"]
    assert specs["a"]["classes"] == ["u", "v"]
    assert (config, {k: (v.dtype, v.tolist()) for k, v in model.state_dict().items()}) == (before[1], before[0])
    bk.nn.add_domain_(model, "b", classes=2)
    save_domain(folder, model, "b", {"classes": ["u", "v"]})
    with pytest.warns(UserWarning, match="earlier format"):
        assert list(load_checkpoint(folder)[2]) == ["a", "z", "b"]


@pytest.mark.filterwarnings("ignore:load_checkpoint")
def test_damaged_old_files_raise_file_errors(folder: Path) -> None:
    old_checkpoint(folder)
    for path, byte, bit in _flips(folder, 60, 1):
        data = path.read_bytes()
        damaged = bytearray(data)
        damaged[byte] ^= 1 << bit
        path.write_bytes(damaged)
        _, problem = _tried(lambda: load_checkpoint(folder))
        assert problem is None or str(folder) in problem
        path.write_bytes(data)


def test_saving_over_a_checkpoint_is_all_or_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    count = len(before)
    write = open
    for full_after in range(count):
        left = [full_after]

        def limited(path, mode="r", *more, left=left, **options):
            if "w" in mode:
                if not left[0]:
                    raise OSError(28, "No space left on device")
                left[0] -= 1
            return write(path, mode, *more, **options)

        with monkeypatch.context() as patch:
            patch.setattr("builtins.open", limited)
            with pytest.raises(FileError, match=r"got No space left on device\. Hint: is the disk full\?"):
                _saved(folder, seed=1)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def _flipped(path: Path, count: int) -> Iterator[bytes]:
    """Writes a file with one bit flipped, again and again; gives what it held, and writes that back."""
    data = path.read_bytes()
    for place in np.random.default_rng(0).choice(8 * len(data), count, replace=False):
        damaged = bytearray(data)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        yield data
    path.write_bytes(data)


def test_flips_in_a_state_are_found(tmp_path: Path) -> None:
    split = Arrays(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]))
    domains = {"a": Domain("a", ("x", "y"), {"train": split, "val": split}, 8)}
    config = Config(model_options={"widths": [2, 2, 2], "blocks": [1, 1, 1]}, epochs=2, batch=2, backend="aten")
    Trainer(config, domains, tmp_path).fit(until=1)
    path = tmp_path / STATE
    before, specs = read_tensors(path)
    found = 0
    for _ in _flipped(path, 200):
        read, problem = _tried(lambda: read_tensors(path))
        if problem is not None:
            found += 1
            assert str(path) in problem
        else:
            tensors, info = read
            assert info == specs
            assert all(torch.equal(tensors[key], value) for key, value in before.items())
    assert found > 190
    old_tensors(path)
    assert Trainer(config, domains, tmp_path, resume=True).open().epoch == 1


def test_flips_in_a_backbone_are_found(tmp_path: Path) -> None:
    model = build("resnet26", 2, widths=[2, 2, 2], blocks=[1, 1, 1])
    path = tmp_path / "backbone.safetensors"
    write_tensors(path, model.state_dict(), {"source": "a"})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = 0
    for _ in _flipped(path, 200):
        _, problem = _tried(lambda: load_weights(model, path, "fc"))
        if problem is not None:
            found += 1
            assert str(path) in problem
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found > 190


def test_a_backbone_loads_without_the_classifier_that_does_not_fit(tmp_path: Path) -> None:
    options = {"widths": [2, 2, 2], "blocks": [1, 1, 1]}
    source, model = build("resnet26", 3, **options), build("resnet26", 2, **options)
    for name in ("ours.safetensors", "foreign.safetensors"):
        if name == "ours.safetensors":
            write_tensors(tmp_path / name, source.state_dict(), {"source": "a"})
        else:
            save_file(source.state_dict(), tmp_path / name)
        assert load_weights(model, tmp_path / name, "fc") == ["fc.weight", "fc.bias"]
        assert torch.equal(model.conv1.weight, source.conv1.weight)


def test_loading_one_domain_reads_no_other(finished: Path, copy_of) -> None:
    folder = copy_of(finished / "checkpoint")
    for file in (folder / "domains" / "digits").iterdir():
        file.write_bytes(b"damaged")
    whole, _, _ = load_checkpoint(finished / "checkpoint")
    one, _, specs = load_checkpoint(folder, ["glyphs"])
    assert list(specs) == ["glyphs"]
    assert not [key for key in one.state_dict() if ".digits." in key or ".shapes." in key]
    x = torch.randn(3, 3, 32, 32)
    bk.set_domain(whole, "glyphs")
    with bk.use_backend("aten"), torch.inference_mode():
        assert torch.equal(one(x), whole(x))
    with pytest.raises(FileError, match="to be a JSON file"):
        load_checkpoint(folder, ["digits"])
    with pytest.raises(FileError, match=r"to have one of .*got 'signs'"):
        load_checkpoint(folder, ["signs"])


@pytest.mark.parametrize("file", ["model.safetensors", "domains/glyphs/domain.safetensors"])
def test_damaged_checkpoints_are_refused(finished: Path, copy_of, file: str) -> None:
    folder = copy_of(finished / "checkpoint")
    data = bytearray((folder / file).read_bytes())
    data[-5] ^= 1
    (folder / file).write_bytes(data)
    with pytest.raises(FileError, match="got a damaged file"):
        load_checkpoint(folder, ["glyphs"])
    (folder / "config.json").unlink()
    with pytest.raises(FileError, match=r"config.json to be a JSON file"):
        load_checkpoint(folder)


def test_domain_names_that_are_invalid_folders_are_refused(tiny: Config, tmp_path: Path) -> None:
    model = switched_network(tiny, {"a": 3})
    for name in ("../a", "/a", "a/b"):
        with pytest.raises(ValueError, match="it is the name of a folder"):
            save_domain(tmp_path, model, name, {})
    with pytest.raises(ValueError, match="to have the domain 'b'"):
        save_domain(tmp_path, model, "b", {})
