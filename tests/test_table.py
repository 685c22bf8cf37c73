"""ChannelTable: random lists, unions and densities, and files."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import bap_kernels as bk
from bap_kernels import ChannelLists, ChannelTable


def _int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3),
        nn.Conv2d(32, 32, 3, groups=32),
        nn.Conv2d(32, 32, 1, groups=4),
    )


def test_random_draws_in_lists_except_for_the_stem() -> None:
    table = ChannelTable.random(_model(), ["birds", "cars"], density=0.25, seed=3)
    assert list(table) == ["birds", "cars"]
    assert list(table["birds"]) == ["0", "2", "3"]
    assert table["birds"]["0"] == ChannelLists()
    assert table["birds"]["2"].counts == (4, None)
    assert table["birds"]["3"] == ChannelLists()
    assert table["birds"] != table["cars"]


def test_random_both_draws_one_list_for_depthwise() -> None:
    table = ChannelTable.random(_model(), 2, density=0.5, both=True)
    assert list(table) == ["domain0", "domain1"]
    assert table["domain0"]["0"].counts == (None, 8)
    assert table["domain0"]["2"].counts == (8, 16)
    depthwise = table["domain0"]["3"]
    assert depthwise.counts == (16, 16)
    assert torch.equal(depthwise.in_index, depthwise.out_index)


def test_random_lists_are_reproducible() -> None:
    # Literal values: published measurements depend on these lists.
    lists = ChannelTable.random(_model(), "birds", density=0.25, seed=3)["birds"]["2"]
    assert lists.in_index.tolist() == [2, 8, 9, 11]
    assert lists == ChannelTable.random(nn.ModuleDict({"2": nn.Conv2d(16, 8, 1)}), ["birds"], 0.25, 3)["birds"]["2"]
    assert lists != ChannelTable.random(_model(), "birds", density=0.25, seed=4)["birds"]["2"]


def test_random_keeps_one_to_all_channels() -> None:
    assert ChannelTable.random(_model(), "a", density=0.0)["a"]["2"].counts == (1, None)
    assert ChannelTable.random(_model(), "a", density=1.0)["a"]["2"].in_index.tolist() == list(range(16))
    with pytest.raises(ValueError, match=r"`density` to be in \[0, 1\], got 1.5"):
        ChannelTable.random(_model(), "a", density=1.5)


def test_random_refuses_no_domain_and_a_repeated_one() -> None:
    for domains in ([], 0, ["a", "b", "a"]):
        with pytest.raises(
            ValueError, match=r"random\(\): expected `domains` to be at least one name, and each name once"
        ):
            ChannelTable.random(_model(), domains)


def test_random_lists_with_exact_off_are_ragged_and_reproducible() -> None:
    model = nn.Sequential(nn.Conv2d(64, 64, 1))
    domains = [f"d{number}" for number in range(200)]
    table = ChannelTable.random(model, domains, density=0.5, both=True, exact=False)
    assert table == ChannelTable.random(model, domains, density=0.5, both=True, exact=False)
    lengths = torch.tensor([layers["0"].counts for layers in table.values()], dtype=torch.float64)
    # Binomial: 32 expected, standard deviation 4, both of 400 draws known to about 1 and 4 %.
    assert abs(lengths.mean() - 32) < 1
    assert 3.4 < lengths.std() < 4.6
    assert len(set(lengths[:, 0].tolist())) > 8
    assert table["d0"]["0"].in_index.tolist() != table["d0"]["0"].out_index.tolist()
    # Literal values: published measurements depend on these lists.
    small = ChannelTable.random(nn.Sequential(nn.Conv2d(8, 8, 1)), ["birds"], 0.5, exact=False)
    assert small["birds"]["0"].in_index.tolist() == [0, 1, 2, 3, 5, 6]


@pytest.mark.parametrize("density", [0.0, 0.01, 1.0])
def test_random_lists_with_exact_off_keep_one_to_all_channels(density: float) -> None:
    for seed in range(30):
        lists = ChannelTable.random(_model(), "a", density, seed, exact=False)["a"]["2"]
        assert lists.counts[0] >= 1
        if density != 0.01:
            assert lists.counts == (16 if density else 1, None)


def test_random_uses_all_channels_evenly() -> None:
    domains = [f"d{number}" for number in range(400)]
    table = ChannelTable.random(nn.Sequential(nn.Conv2d(16, 8, 1)), domains, density=0.5)
    counts = torch.zeros(16)
    for layers in table.values():
        counts[layers["0"].in_index.long()] += 1
    # 200 expected, standard deviation 10.
    assert counts.min() > 150
    assert counts.max() < 250


def test_random_draws_for_swapped_layers_only() -> None:
    model = bk.swap_(_model(), lambda module, name: name == "2")
    assert list(ChannelTable.random(model, "a")["a"]) == ["2"]


def test_union_merges_lists_of_all_domains() -> None:
    table = ChannelTable(
        {
            "a": {"x": ChannelLists([0, 2], [1]), "y": ChannelLists([1]), "z": ChannelLists([], [])},
            "b": {"x": ChannelLists([2, 5], None), "z": ChannelLists([], [3])},
        }
    )
    assert table.union() == {
        "x": ChannelLists([0, 2, 5], None),
        "y": ChannelLists(),
        "z": ChannelLists([], [3]),
    }


def test_density_is_kept_share_of_channels() -> None:
    model = nn.Sequential(nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 1))
    table = ChannelTable({"a": {"0": ChannelLists([0, 1], [0])}, "b": {"1": ChannelLists([], [])}})
    assert table.density(model) == {"a": (0.625, 0.625), "b": (0.5, 0.5)}


def test_table_copies_its_source() -> None:
    source = {"a": {"x": ChannelLists([0])}}
    table = ChannelTable(source)
    source["a"]["y"] = ChannelLists()
    source["b"] = {}
    assert table == ChannelTable({"a": {"x": ChannelLists([0])}})
    assert len(table) == 1
    assert "b" not in table
    assert repr(table) == "ChannelTable(domains=['a'], layers=1)"
    assert pickle.loads(pickle.dumps(table)) == table


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], r"`domains` to be a mapping, got list"),
        ({1: {}}, r"to map names to \{layer name: ChannelLists\}, got 1: dict"),
        ({"a": []}, r"got 'a': list"),
        ({"a": {"x": [0, 1]}}, r"domain 'a' to map layer names to ChannelLists, got 'x': list"),
    ],
)
def test_invalid_table_raises(value, message) -> None:
    with pytest.raises(TypeError, match=message):
        ChannelTable(value)


UNUSUAL = ChannelTable(
    {
        "birds/été \n": {
            "layer1.0.conv": ChannelLists([0, 2], []),
            "": ChannelLists(),
            '"__metadata__"': ChannelLists([]),
        },
        "empty": {},
        "": {"x": ChannelLists(None, [2**31 - 1])},
    }
)


def test_saved_table_loads_equal(tmp_path: Path) -> None:
    path = tmp_path / "table.safetensors"
    UNUSUAL.save(path)
    loaded = ChannelTable.load(str(path))
    assert loaded == UNUSUAL
    assert list(loaded) == list(UNUSUAL)
    assert loaded["birds/été \n"][""].in_index is None
    assert loaded["birds/été \n"]['"__metadata__"'].in_index.shape == (0,)


def test_save_replaces_file_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "table.safetensors"
    path.write_bytes(b"older")
    UNUSUAL.save(path)
    assert ChannelTable.load(path) == UNUSUAL
    assert list(tmp_path.iterdir()) == [path]


def test_failed_save_keeps_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.safetensors"
    UNUSUAL.save(path)

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("bap_kernels._table_file.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        ChannelTable({}).save(path)
    assert ChannelTable.load(path) == UNUSUAL
    assert list(tmp_path.iterdir()) == [path]


def test_load_of_missing_file_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        ChannelTable.load(tmp_path / "none.safetensors")
    with pytest.raises(IsADirectoryError, match=r"load\(\): expected `path` to be a file, got the folder '/"):
        ChannelTable.load(tmp_path)


def test_errors_of_save_name_the_path_that_was_given(tmp_path: Path) -> None:
    missing = tmp_path / "none" / "table.safetensors"
    with pytest.raises(FileNotFoundError, match=rf"save\(\): expected `path` .*, got '{missing}': No such file"):
        UNUSUAL.save(missing)
    with pytest.raises(IsADirectoryError, match=rf"save\(\): expected `path` .*, got '{tmp_path}': Is a directory"):
        UNUSUAL.save(tmp_path)
    assert [*tmp_path.iterdir(), *tmp_path.parent.glob("*.partial")] == []


def _metadata(**changes: str) -> dict[str, str]:
    names = json.dumps([["a", [["x", "0", None]]]])
    return {"format": "bap_kernels.channel_table", "version": "1", "table": names} | changes


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"0": _int32(1, 2)}, None),
        ({"0": _int32(1, 2)}, _metadata(format="other")),
        ({"0": _int32(1, 2)}, _metadata(version="2")),
        ({"0": _int32(1, 2)}, _metadata(table="{")),
        ({"0": _int32(1, 2)}, _metadata(table="[1]")),
        ({"0": _int32(2, 1)}, _metadata()),
        ({"0": torch.tensor([0.5])}, _metadata()),
        ({"1": _int32(1, 2)}, _metadata()),
        ({"0": _int32(-1, 2)}, _metadata()),
    ],
    ids=["plain", "format", "version", "json", "structure", "unsorted", "dtype", "missing", "negative"],
)
def test_load_of_foreign_file_raises(tmp_path: Path, tensors, metadata) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=r"that ChannelTable.save wrote, got '.*foreign\.safetensors'"):
        ChannelTable.load(path)


@pytest.mark.parametrize("keep", [0, 5, 40, -1], ids=["empty", "head", "header", "last byte"])
def test_load_of_truncated_file_raises(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "damaged.safetensors"
    UNUSUAL.save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"got '.*damaged\.safetensors'"):
        ChannelTable.load(path)


def test_load_of_file_with_flipped_bit_raises(tmp_path: Path) -> None:
    path = tmp_path / "table.safetensors"
    table = ChannelTable({"z": {"conv1": ChannelLists([0, 2, 5])}, "a": {"conv1": ChannelLists([1], [0, 3])}})
    table.save(path)
    data = path.read_bytes()
    harmless = total = 0
    for bit in range(0, 8 * len(data), 5):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        total += 1
        try:
            loaded = ChannelTable.load(path)
        except ValueError as error:
            right = str(path) in str(error)
        else:
            # The bit belongs to the padding of the header.
            harmless += 1
            right = list(loaded) == ["z", "a"] and loaded == table
        assert right, bit
    assert total > 500
    assert harmless < 16


def test_table_without_digest_loads(tmp_path: Path) -> None:
    path = tmp_path / "table.safetensors"
    table = ChannelTable({"z": {"conv1": ChannelLists([0, 2, 5])}, "a": {"conv1": ChannelLists([1])}})
    table.save(path)
    with safe_open(path, framework="pt") as file:
        head = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no mapping
    del head["digest"]
    save_file(tensors, path, head)
    assert ChannelTable.load(path) == table
    save_file(tensors, path, {**head, "digest": "0" * 64})
    with pytest.raises(ValueError, match="its digest is that of other content"):
        ChannelTable.load(path)
    save_file(tensors, path, {**head, "digesT": "0" * 64})
    with pytest.raises(ValueError, match="its header has the keys"):
        ChannelTable.load(path)
