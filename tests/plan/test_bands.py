"""Blocks of a plan with a depthwise convolution in the middle, computed in one pass over bands of rows."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bap_kernels as bk
from bap_kernels._load import _C
from bap_kernels.plan.planned import PlannedNetwork
from tests.networks import randomise
from tests.plan.test_joined import run_apart

pytestmark = pytest.mark.skipif(_C.isa() == "none", reason="no native kernels")
KEPT = torch.tensor([0, 2, 3, 7, 8, 10, 12])
CHANNELS = 13


@pytest.fixture(autouse=True)
def _native() -> object:
    with bk.use_backend("native"):
        yield


class Block(nn.Module):
    """Expand, depthwise, project, with a residual where the shapes allow it."""

    def __init__(
        self,
        hidden: int = 45,
        out: int = CHANNELS,
        kernel: int = 3,
        stride: int = 1,
        dilation: int = 1,
        padding: int = 1,
    ) -> None:
        super().__init__()
        self.adds = (out, stride, (kernel - 1) * dilation) == (CHANNELS, 1, 2 * padding)
        self.expand, self.norm1 = nn.Conv2d(CHANNELS, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, kernel, stride, padding, dilation, groups=hidden, bias=False)
        self.norm2 = nn.BatchNorm2d(hidden)
        self.project, self.norm3 = nn.Conv2d(hidden, out, 1, bias=False), nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.relu6(self.norm1(self.expand(x)))
        y = nn.functional.relu6(self.norm2(self.depthwise(y)))
        y = self.norm3(self.project(y))
        return x + y if self.adds else y


class Stem(nn.Module):
    """A strided convolution of an image in the place of the expanding one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(CHANNELS, 37, 3, 2, 1)
        self.depthwise = nn.Conv2d(37, 37, 3, padding=1, groups=37)
        self.project = nn.Conv2d(37, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(torch.relu(self.depthwise(torch.relu(self.stem(x)))))


class Shared(nn.Module):
    """Both hidden tensors are results, too."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(out=6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block.expand(x)
        z = self.block.depthwise(y)
        return torch.cat([y, z, self.block.project(z)], 1)


class Around(nn.Module):
    """The projection is added to what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(CHANNELS, 37, 1)
        self.depthwise = nn.Conv2d(37, 37, 3, padding=1, groups=37)
        self.project = nn.Conv2d(37, 37, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.depthwise(torch.relu(self.expand(x))))
        return self.project(y) + y


def expected(model: nn.Module, first: str, x: Tensor) -> Tensor:
    """In float64, the unlisted channels of the first layer zero."""
    model = copy.deepcopy(model).double()
    mask = torch.zeros(CHANNELS, dtype=torch.double)
    mask[KEPT] = 1
    weight = model.get_submodule(first).weight
    with torch.no_grad():
        weight.mul_(mask[:, None, None])
        return model(x.double())


def planned(model: nn.Module, first: str, x: Tensor) -> PlannedNetwork:
    swapped = bk.swap_(copy.deepcopy(model))
    table = bk.ChannelTable({"a": {first: bk.ChannelLists(KEPT.int())}})
    return bk.plan(bk.attach_(swapped, table), x, "a", memory="fast")


def regions(plan: PlannedNetwork, x: Tensor) -> int:
    """How many parallel regions the native kernels have in one call that packs no weight."""
    plan(x)
    return len(_C.record_tasks(lambda: plan(x)))


def image(batch: int, height: int, width: int, memory_format: torch.memory_format = torch.channels_last) -> Tensor:
    return torch.randn(batch, CHANNELS, height, width).contiguous(memory_format=memory_format)


BLOCKS = {
    "residual": ({}, (2, 37, 41)),
    "stride 2": ({"stride": 2, "out": 9}, (2, 36, 47)),
    "5x5": ({"kernel": 5, "padding": 2, "out": 17}, (1, 53, 39)),
    "dilated": ({"dilation": 3, "padding": 3}, (2, 41, 33)),
    "unpadded": ({"padding": 0}, (1, 60, 31)),
    "padded beyond the filter": ({"padding": 4, "stride": 2}, (1, 41, 40)),
    "few long rows": ({"out": 3}, (1, 3, 700)),
    "whole vectors": ({"hidden": 48, "out": 32}, (2, 40, 33)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_every_shape(name: str, isa: str) -> None:
    options, size = BLOCKS[name]
    model, x = randomise(Block(**options)), image(*size)
    plan = planned(model, "expand", x)
    assert regions(plan, x) == 1
    result = plan(x)
    torch.testing.assert_close(result.double(), expected(model, "expand", x), rtol=1e-4, atol=1e-4)
    assert torch.equal(result, run_apart(plan, x))


def test_other_convolutions_than_1x1_run_by_themselves() -> None:
    model, x = randomise(Stem()), image(2, 87, 91)
    plan = planned(model, "stem", x)
    assert regions(plan, x) == 3
    torch.testing.assert_close(plan(x).double(), expected(model, "stem", x), rtol=1e-4, atol=1e-4)


def test_results_do_not_depend_on_threads() -> None:
    x = image(3, 37, 41)
    plan = planned(randomise(Block(stride=2)), "expand", x)
    alone = plan(x)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        try:
            assert torch.equal(plan(x), alone)
        finally:
            torch.set_num_threads(1)
    assert torch.equal(plan(x[1:2].contiguous(memory_format=torch.channels_last)), alone[1:2])


def test_unlisted_channels_are_not_read() -> None:
    model, x = randomise(Block(out=7)), image(2, 37, 41)
    plan = planned(model, "expand", x)
    clean = plan(x)
    for channel in set(range(CHANNELS)) - set(KEPT.tolist()):
        x[:, channel] = float("nan")
    assert torch.equal(plan(x), clean)


def test_nan_reaches_what_its_filters_reach() -> None:
    x = image(1, 50, 50)
    plan = planned(randomise(Block(out=7)), "expand", x)
    x[0, KEPT[0], 20, 30] = float("nan")
    reached = plan(x).isnan().all(1)[0]
    assert reached.sum() == 9
    assert reached[19:22, 29:32].all()


@pytest.mark.usefixtures("nan_filled_empty")
def test_memory_that_nobody_wrote_is_not_read() -> None:
    model, x = randomise(Block()), image(2, 37, 41)
    plan = planned(model, "expand", x)
    assert plan(x).isfinite().all()


@pytest.mark.parametrize("layer", ["expand", "project"])
@pytest.mark.parametrize("batch", [0, 2])
def test_layers_that_keep_nothing_and_empty_batches(layer: str, batch: int) -> None:
    model, x = bk.swap_(randomise(Block())), image(2, 60, 61)
    bk.attach_(model, bk.ChannelTable({"a": {layer: bk.ChannelLists([])}, "b": {layer: bk.ChannelLists([1, 4])}}))
    plan = bk.plan(model, x, "b")
    for domain in ("a", "b"):
        bk.set_domain(plan, domain)
        bk.set_domain(model, domain)
        torch.testing.assert_close(plan(x[:batch]), model(x[:batch]), rtol=1e-4, atol=1e-4)
    bk.set_domain(model, "a")
    torch.testing.assert_close(bk.plan(model, x, "a")(x[:batch]), model(x[:batch]), rtol=1e-4, atol=1e-4)


def test_small_blocks_and_planes_run_one_by_one() -> None:
    model = randomise(Block())
    for x in (image(1, 9, 9), image(2, 37, 41, torch.contiguous_format)):
        plan = planned(model, "expand", x)
        assert regions(plan, x) == 3
        assert torch.equal(plan(x), run_apart(plan, x))


def test_threads_with_few_rows_each_run_layers() -> None:
    model, x = randomise(Block()), image(1, 30, 41)
    plan = planned(model, "expand", x)
    alone = plan(x)
    assert regions(plan, x) == 1
    torch.set_num_threads(8)
    try:
        assert regions(plan, x) == 3
        assert torch.equal(plan(x), alone)
        # Rows of several images are as many more.
        assert regions(plan, x.expand(3, -1, -1, -1).contiguous(memory_format=torch.channels_last)) == 1
    finally:
        torch.set_num_threads(1)


def test_another_size_is_decided_anew() -> None:
    model, x = randomise(Block()), image(1, 9, 9)
    plan = planned(model, "expand", x)
    x = image(2, 38, 40)
    assert regions(plan, x) == 1
    torch.testing.assert_close(plan(x).double(), expected(model, "expand", x), rtol=1e-4, atol=1e-4)


def test_hidden_tensors_with_other_readers_are_stored() -> None:
    model, x = randomise(Shared()), image(2, 37, 41)
    plan = planned(model, "block.expand", x)
    assert regions(plan, x) == 3
    torch.testing.assert_close(plan(x).double(), expected(model, "block.expand", x), rtol=1e-4, atol=1e-4)


def test_a_hidden_tensor_that_is_the_residual_too_is_stored() -> None:
    model, x = randomise(Around()), image(2, 37, 41)
    plan = planned(model, "expand", x)
    assert regions(plan, x) == 3
    torch.testing.assert_close(plan(x).double(), expected(model, "expand", x), rtol=1e-4, atol=1e-4)


def test_a_change_of_each_weight_is_seen() -> None:
    model, x = randomise(Block()), image(2, 37, 41)
    plan = planned(model, "expand", x)
    for name in ("expand", "depthwise", "project"):
        for network in (model, plan.model):
            with torch.no_grad():
                network.get_submodule(name).weight.mul_(1.5)
        torch.testing.assert_close(plan(x).double(), expected(model, "expand", x), rtol=1e-4, atol=1e-4)


def settle(path: Path, way: str) -> None:
    """Has a file of choices say that blocks are computed in that way, and all else by the native kernels."""
    head, *lines = path.read_text().splitlines()
    settled = []
    for line in lines:
        machine, case, _, times, _, when = line.split("\t")
        chosen = way if case.startswith("block ") else "native"
        ways = [time.split("=")[0] for time in times.split()]
        assert chosen in ways
        times = " ".join(f"{name}={1 if name == chosen else 1000}" for name in ways)
        settled.append("\t".join((machine, case, chosen, times, "2 2 16 16", when)))
    path.write_text("\n".join([head, *settled, ""]))


@pytest.mark.usefixtures("own_choice_table")
def test_auto_measures_both_ways_and_takes_the_chosen_one(tmp_path: Path) -> None:
    model, x = randomise(Block()), image(2, 37, 41)
    path = tmp_path / "choices.tsv"
    _C.set_choice_file(str(path))
    with bk.use_backend("auto"):
        plan = planned(model, "expand", x)
        torch.testing.assert_close(plan(x).double(), expected(model, "expand", x), rtol=1e-4, atol=1e-4)
        (block,) = [choice for choice in bk.choices() if choice["case"].startswith("block ")]
        assert set(block["candidates"]) == {"bands", "layers"}
        assert len(bk.choices()) == 4
        for way, number in (("bands", 1), ("layers", 3)):
            settle(path, way)
            _C.clear_choices()
            _C.set_choice_file(str(path))
            assert regions(plan, x) == number
            torch.testing.assert_close(plan(x).double(), expected(model, "expand", x), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("own_choice_table")
def test_blocks_that_differ_are_cases_of_their_own() -> None:
    blocks = ({}, {"out": 9}, {"hidden": 48}, {"stride": 2}, {"kernel": 5, "padding": 2}, {"dilation": 2, "padding": 2})
    with bk.use_backend("auto"):
        for number, options in enumerate(blocks):
            x = image(2, 37, 41)
            planned(randomise(Block(**options)), "expand", x)(x)
            cases = [choice["case"] for choice in bk.choices() if choice["case"].startswith("block ")]
            assert len(cases) == number + 1


@pytest.mark.usefixtures("own_choice_table")
def test_auto_measures_no_block_that_has_nothing_to_gain() -> None:
    model, x = randomise(Block()), image(1, 9, 9)
    with bk.use_backend("auto"):
        planned(model, "expand", x)(x)
    assert not [choice for choice in bk.choices() if choice["case"].startswith("block ")]
