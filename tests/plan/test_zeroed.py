"""Lists from zeros in weights: what they leave out changes no result."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import bap_kernels as bk
from tests.networks import Block, Residual, randomise, unit


def listed(table: bk.ChannelTable, layer: str) -> list[int] | None:
    index = table["default"][layer].in_index
    return None if index is None else index.tolist()


@torch.no_grad()
def assert_unchanged(model: nn.Module, table: bk.ChannelTable, x: Tensor) -> None:
    """Layers and a plan with these lists equal the network itself; unread channels may hold anything."""
    expected = model.double()(x.double())
    model.float()
    swapped = bk.swap_(model)
    bk.attach_(swapped, table)
    bk.set_domain(swapped, "default")
    for run in (swapped, bk.plan(swapped, x, "default")):
        torch.testing.assert_close(run(x).double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


class Chain(nn.Module):
    """Two blocks of convolution, norm and ReLU, pooling, and a convolution with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = unit(3, 12), unit(12, 10)
        self.last = nn.Conv2d(10, 7, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.max_pool2d(self.second(self.first(x)), 2))


@pytest.fixture
def chain() -> Chain:
    return randomise(Chain())  # type: ignore[return-value]


X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_slices_of_zeros_are_not_read(chain: Chain) -> None:
    with torch.no_grad():
        chain.second[0].weight[:, [1, 4, 11]] = 0  # type: ignore[index]
    table = bk.ChannelTable.from_weights(chain)
    assert listed(table, "second.0") == [0, 2, 3, 5, 6, 7, 8, 9, 10]
    assert listed(table, "first.0") is None
    assert listed(table, "last") is None
    assert table.notes["default"]["second.0"] == "reads 9 of 12; zero slices of the weight: 3"
    assert_unchanged(chain, table, X)


@pytest.mark.parametrize(("bias", "leaves_out"), [(-0.5, True), (0.0, True), (0.5, False)])
def test_zero_scales_are_followed_where_that_is_exact(chain: Chain, bias: float, leaves_out: bool) -> None:
    """ReLU makes zero of a shift that is not positive; any other constant has to be read."""
    norm = chain.first[1]
    with torch.no_grad():
        norm.weight[3], norm.bias[3] = 0.0, bias  # type: ignore[operator,index]
        chain.last.weight[:, 0] = 0
    table = bk.ChannelTable.from_weights(chain)
    if leaves_out:
        assert listed(table, "second.0") == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11]
        assert "; other channels that arrive as zeros: 1" in table.notes["default"]["second.0"]
    else:
        assert listed(table, "second.0") is None
        assert "; channels that are constant but not zero, and read: 1" in table.notes["default"]["second.0"]
    assert_unchanged(chain, table, X)


def test_filters_of_zeros_need_their_norm_and_bias_to_be_zero(chain: Chain) -> None:
    conv, norm = chain.first[:2]
    with torch.no_grad():
        conv.weight[[2, 5]] = 0  # type: ignore[index,operator]
        norm.running_mean[[2, 5]] = 0  # type: ignore[index,operator]
        norm.bias[2], norm.bias[5] = -0.25, 0.25  # type: ignore[index,operator]
    table = bk.ChannelTable.from_weights(chain)
    assert listed(table, "second.0") == [0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert_unchanged(chain, table, X)


def test_zeros_pass_through_layers_that_read_zeros_alone(chain: Chain) -> None:
    """A filter whose remaining inputs are all zeros is one of zeros."""
    with torch.no_grad():
        chain.first[1].weight[:4] = 0  # type: ignore[index,operator]
        chain.first[1].bias[:4] = -1  # type: ignore[index,operator]
        chain.second[0].weight[6, 4:] = 0  # type: ignore[index,operator]
        chain.second[1].running_mean[6] = 1.0  # type: ignore[index,operator]
        chain.second[1].weight[6], chain.second[1].bias[6] = 1.0, 0.0  # type: ignore[index,operator]
    table = bk.ChannelTable.from_weights(chain, example_input=X)
    assert listed(table, "second.0") == list(range(4, 12))
    assert listed(table, "last") == [0, 1, 2, 3, 4, 5, 7, 8, 9]
    assert_unchanged(chain, table, X)


@torch.no_grad()
def test_sums_are_zero_where_both_terms_are() -> None:
    model = randomise(nn.Sequential(unit(3, 8), Block(8), nn.Conv2d(8, 4, 1)))
    model[0][1].weight[[1, 2]], model[0][1].bias[[1, 2]] = 0.0, -1.0
    model[1].conv2.weight[[2, 3]], model[1].conv2.bias[[2, 3]] = 0.0, 0.0
    table = bk.ChannelTable.from_weights(model)
    assert listed(table, "1.conv1") == [0, 3, 4, 5, 6, 7]
    assert listed(table, "2") == [0, 1, 3, 4, 5, 6, 7]
    assert_unchanged(model, table, X)


@torch.no_grad()
def test_concatenations_depthwise_and_grouped_layers_are_followed() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1)
            self.depthwise = nn.Conv2d(10, 10, 3, padding=1, groups=10)
            self.grouped = nn.Conv2d(10, 8, 1, groups=2, bias=False)
            self.last = nn.Conv2d(8, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.grouped(self.depthwise(torch.cat([self.a(x), self.b(x)], 1))))

    model = randomise(Net())
    model.b.weight[1], model.b.bias[1] = 0.0, 0.0  # channel 5 of the concatenation
    model.depthwise.bias.zero_()
    model.depthwise.weight[7] = 0.0
    model.grouped.weight[4, :] = 0.0
    model.grouped.weight[4, [0, 2]] = 1.0  # reads channels 5 and 7, both zeros
    table = bk.ChannelTable.from_weights(model)
    assert listed(table, "last") == [0, 1, 2, 3, 5, 6, 7]
    assert set(table["default"]) == {"a", "b", "last"}
    assert_unchanged(model, table, X)


@torch.no_grad()
def test_a_layer_that_is_used_twice_reads_what_either_use_needs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 1, bias=False), nn.Conv2d(3, 6, 1, bias=False)
            self.shared = nn.Conv2d(6, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(self.a(x)) + self.shared(self.b(x))

    model = randomise(Twice())
    model.a.weight[[0, 1]], model.b.weight[[1, 2]] = 0.0, 0.0
    table = bk.ChannelTable.from_weights(model)
    assert listed(table, "shared") == [0, 2, 3, 4, 5]
    assert_unchanged(model, table, X)


@torch.no_grad()
def test_a_layer_that_is_also_called_where_nothing_is_followed_keeps_its_inputs() -> None:
    class Inner(nn.Module):
        def __init__(self, shared: nn.Conv2d) -> None:
            super().__init__()
            self.shared = shared

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(x) if float(x.sum()) > -1e9 else x  # a value decides: run as it is

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 1, bias=False), nn.Conv2d(3, 6, 1, bias=False)
            self.shared = nn.Conv2d(6, 4, 1)
            self.inner = Inner(self.shared)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(self.a(x)) + self.inner(self.b(x))

    model = randomise(Outer())
    model.a.weight[[0, 1]] = 0.0
    model.shared.weight[:, 5] = 0.0
    table = bk.ChannelTable.from_weights(model, example_input=X)
    assert listed(table, "shared") == [0, 1, 2, 3, 4]
    expected = model(X)
    swapped = bk.attach_(bk.swap_(model), table)
    bk.set_domain(swapped, "default")
    torch.testing.assert_close(swapped(X), expected)


@pytest.mark.parametrize("seed", range(6))
@torch.no_grad()
def test_random_zeros_change_no_result(seed: int) -> None:
    model = randomise(Residual(), seed)
    generator = torch.Generator().manual_seed(seed)

    def some(count: int) -> Tensor:
        return torch.rand(count, generator=generator) < 0.4

    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.in_channels > 3:
            module.weight[:, some(module.in_channels)] = 0
            module.weight[some(module.out_channels)] = 0
        elif isinstance(module, nn.BatchNorm2d):
            module.weight[some(module.num_features)] = 0
    table = bk.ChannelTable.from_weights(model, example_input=X)
    assert sum(lists.in_index is not None for lists in table["default"].values()) > 3
    assert_unchanged(model, table, X)


@pytest.mark.parametrize("permanent", [False, True])
def test_masks_of_torch_prune_count(chain: Chain, permanent: bool) -> None:
    prune.ln_structured(chain.second[0], "weight", amount=5, n=2, dim=1)  # type: ignore[arg-type]
    kept = np.flatnonzero(chain.second[0].weight_mask.any(3).any(2).any(0))  # type: ignore[union-attr,operator]
    if permanent:
        prune.remove(chain.second[0], "weight")  # type: ignore[arg-type]
    table = bk.ChannelTable.from_weights(chain)
    assert listed(table, "second.0") == kept.tolist()
    assert len(kept) == 7
    if not permanent:
        assert prune.is_pruned(chain)  # it is not changed
        with pytest.raises(ValueError, match=r"computed by a hook: remove .* or torch.nn.utils.prune first"):
            bk.attach_(bk.swap_(chain), table)
        prune.remove(chain.second[0], "weight")  # type: ignore[arg-type]
    assert_unchanged(chain, table, X)


def test_unstructured_zeros_warn_and_say_how_many(chain: Chain) -> None:
    for name in ("first", "second"):
        prune.l1_unstructured(chain.get_submodule(name)[0], "weight", amount=0.5)  # type: ignore[index]
    with pytest.warns(
        UserWarning, match=r"no channel can be left out of any of 3 convolutions; 4[0-9]% of their single"
    ):
        table = bk.ChannelTable.from_weights(chain)
    assert all(lists.in_index is None for lists in table["default"].values())


@torch.no_grad()
def test_a_network_that_cannot_be_followed_tells_its_own_slices(chain: Chain) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor, scale: float) -> Tensor:
            return self.conv(x) * scale

    model = Odd().eval()
    model.conv.weight[:, 2] = 0
    table = bk.ChannelTable.from_weights(model)
    assert listed(table, "conv") == [0, 1, 3]
    assert "its input was not followed" in table.notes["default"]["conv"]
    with pytest.raises(ValueError, match=r"from_weights\(\): expected `example_input` to be what `model` takes"):
        bk.ChannelTable.from_weights(model, example_input=X)
    chain.second[0].weight[:, 0] = 0  # type: ignore[index,operator]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bk.ChannelTable.from_weights(chain, "birds")["birds"]["second.0"].in_index is not None


@torch.no_grad()
def test_made_up_images_are_small_where_memory_grows_with_the_square_of_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    class Attention(nn.Module):
        """Over all pixels: 2.5 billion numbers for an image of 224 x 224."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x).flatten(2)
            y = y @ torch.softmax(y.transpose(1, 2) @ y, -1)
            return self.last(y.view(x.shape[0], 4, *x.shape[2:]))

    example = importlib.import_module("bap_kernels.plan.example")
    sides: list[int] = []

    def traced(op: str, model: nn.Module, inputs: tuple[Tensor, ...], *arguments: Any) -> Any:
        sides.append(inputs[0].shape[-1])
        return trace(op, model, inputs, *arguments)

    trace = example.trace
    monkeypatch.setattr(example, "trace", traced)
    model = Attention().eval()
    model.last.weight[:, 1] = 0
    # Images of 64 x 64 would make 64 MiB, those of 32 x 32 make 4.
    monkeypatch.setattr(example, "_MOST_BYTES", 2**24)
    table = bk.ChannelTable.from_weights(model)
    assert listed(table, "last") == [0, 2, 3]
    assert "not followed" not in table.notes["default"]["last"]
    assert sides == [32]


def test_a_layer_of_zeros_reads_nothing(chain: Chain) -> None:
    with torch.no_grad():
        chain.second[0].weight.zero_()  # type: ignore[union-attr,operator]
    table = bk.ChannelTable.from_weights(chain)
    assert listed(table, "second.0") == []
    assert_unchanged(chain, table, X)


def test_models_without_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected `model` to have convolutions with groups=1, got none"):
        bk.ChannelTable.from_weights(nn.Linear(3, 3))
    with torch.device("meta"), pytest.raises(ValueError, match=r"got one on the meta device: 0\.weight"):
        bk.ChannelTable.from_weights(nn.Sequential(nn.Conv2d(3, 3, 1)))


@torch.no_grad()
def test_a_subclass_that_cannot_be_swapped_reads_all_and_says_why(chain: Chain) -> None:
    class Own(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    own = Own(12, 10, 3, padding=1, bias=False)
    own.weight[:, 3] = 0
    chain.second[0] = own.eval()  # type: ignore[index,operator]
    chain.last.weight[:, 4] = 0
    table = bk.ChannelTable.from_weights(chain, example_input=X)
    assert "second.0" not in table["default"]
    assert (
        "zero slices of the weight: 1; reads all, as it cannot be swapped: Own is a sub"
        in (table.notes["default"]["second.0"])
    )
    assert listed(table, "last") == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert_unchanged(chain, table, X)
