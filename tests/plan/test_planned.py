"""Planned networks equal the masked dense network."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import bap_kernels as bk
from bap_kernels._load import _C
from bap_kernels.plan.steps import MapStep
from tests.networks import (
    LARGE,
    SMALL,
    Dense,
    Inverted,
    PreActivation,
    Residual,
    masked_dense,
    random_network,
    randomise,
)

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture(autouse=True)
def _one_backend() -> None:
    # Plans choose no backend; measuring each shape of each network would take most of the time.
    with bk.use_backend("aten" if _C.unsupported_reason("native") else "native"):
        yield


def swapped(model: nn.Module, density: float, seed: int, both: bool = False) -> tuple[nn.Module, nn.Module]:
    """(swapped network with lists, masked dense network of the same weights)."""
    dense = copy.deepcopy(model)
    bk.swap_(model, layer_type=bk.nn.MaskedConv2d if both else bk.nn.GatheredConv2d)
    table = bk.ChannelTable.random(model, ["a", "b"], density, seed, both)
    bk.attach_(model, table)
    return model, masked_dense(dense, table, "a")


def assert_equal(got: Tensor, expected: Tensor, share: float = 2e-5) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= share * expected.abs().max()


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("both", [False, True], ids=["in", "both"])
@pytest.mark.parametrize("network", SMALL)
@torch.no_grad()
def test_small_networks(network: str, both: bool, layout: str) -> None:
    for density in (1.0, 0.6, 0.2):
        model, masked = swapped(randomise(SMALL[network]()), density, seed=3, both=both)
        x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        planned = bk.plan(model, x, "a", memory_format=FORMATS[layout])
        assert_equal(planned(x), masked(x))
        assert planned.max_error < 2e-5


@pytest.mark.parametrize("chunk", range(4))
@torch.no_grad()
def test_random_networks(chunk: int) -> None:
    for seed in range(25 * chunk, 25 * chunk + 25):
        both = seed % 2 == 1
        model, masked = swapped(randomise(random_network(seed), seed), (0.3, 0.6, 1.0)[seed % 3], seed, both)
        x = torch.randn(2, 3, 7, 9, generator=torch.Generator().manual_seed(seed))
        planned = bk.plan(model, x, "a", memory_format=list(FORMATS.values())[seed // 2 % 2])
        try:
            assert_equal(planned(x), masked(x))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {model}\n{planned}") from error


@pytest.mark.parametrize("network", LARGE)
@torch.no_grad()
def test_known_networks(network: str) -> None:
    for seed, density in enumerate((0.75, 0.25)):
        model, masked = swapped(randomise(LARGE[network](), seed), density, seed)
        x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
        for memory_format in FORMATS.values():
            planned = bk.plan(model, x, "a", memory_format=memory_format)
            assert_equal(planned(x), masked(x))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("torchvision", "mobilenet_v2"),
        ("torchvision", "mobilenet_v3_small"),
        ("torchvision", "efficientnet_b0"),
        ("timm", "mobilenetv2_100"),
        ("timm", "mobilenetv3_small_100"),
        ("timm", "efficientnet_b0"),
    ],
)
@torch.no_grad()
def test_depthwise_networks(package: str, name: str, layout: str) -> None:
    # By the native kernels, as all calls here.
    models = pytest.importorskip(package)
    make = models.models.get_model if package == "torchvision" else models.create_model
    model, masked = swapped(randomise(make(name), 1), 0.5, 1)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    planned = bk.plan(model, x, "a", memory_format=FORMATS[layout])
    assert_equal(planned(x), masked(x))


@torch.no_grad()
def test_relu6_and_depthwise_convolutions_are_fused() -> None:
    model, masked = swapped(randomise(Inverted()), 0.6, 3)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for memory_format in FORMATS.values():
        planned = bk.plan(model, 4 * x, "a", memory_format=memory_format)
        kinds = [step.kind for step in planned._program.steps]
        assert kinds.count("conv+norm+relu6") == 2
        assert kinds.count("depthwise+relu6") == 1
        assert not any(isinstance(step, MapStep) and step.act for step in planned._program.steps)
        for backend in ("aten", "auto"):
            with bk.use_backend(backend):
                assert_equal(planned(4 * x), masked(4 * x))


@torch.no_grad()
def test_other_batches_and_sizes() -> None:
    model, masked = swapped(randomise(Residual()), 0.5, 0)
    planned = bk.plan(model, torch.randn(2, 3, 16, 16), "a")
    for shape in ((1, 3, 16, 16), (5, 3, 24, 10), (0, 3, 16, 16)):
        x = torch.randn(shape)
        if shape[0]:
            assert_equal(planned(x), masked(x))
        assert planned(x).shape == masked(x).shape


def test_inference_mode_and_gradients() -> None:
    model, masked = swapped(randomise(Residual()), 0.5, 0)
    x = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        planned = bk.plan(model, x, "a")
        assert_equal(planned(x), masked(x))
    assert_equal(planned(x), masked(x).detach())
    assert not planned(x).requires_grad
    with pytest.raises(NotImplementedError, match=r"PlannedNetwork\(\): expected inputs that need no gradient, got"):
        planned(x.requires_grad_())


@torch.no_grad()
def test_unread_channels_are_not_computed() -> None:
    conv = [nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 4, 1)]
    model = bk.swap_(nn.Sequential(*conv).eval())
    lists = {"1": bk.ChannelLists([2, 3, 11]), "2": bk.ChannelLists([0, 5])}
    bk.attach_(model, {"a": lists})
    planned = bk.plan(model, torch.randn(1, 3, 8, 8), "a")
    flop = torch.utils.flop_counter.FlopCounterMode(display=False)
    with flop:
        planned(torch.randn(1, 3, 8, 8))
    assert flop.get_total_flops() == 2 * (3 * 3 * 9 * 36 + 3 * 2 * 9 * 16 + 2 * 4 * 16)
    assert [step.kept for step in planned._program.steps] == ["3/3", "3/16", "2/16", "4/4"]


@torch.no_grad()
def test_fused_operations() -> None:
    def kinds(model: nn.Module) -> list[str]:
        swapped(randomise(model), 0.5, 0)
        return [step.kind for step in bk.plan(model, torch.randn(1, 3, 16, 16), "a")._program.steps]

    stream = [
        "conv+norm+relu",
        "conv+norm+relu",
        "conv+norm+add+relu",
        "conv+norm+relu",
        "conv+norm",
        "conv+norm+add+relu",
    ]
    found = [kind for kind in kinds(Residual()) if kind not in ("view", "gather")]
    assert found == ["input", *stream, "conv"]
    found = [kind for kind in kinds(PreActivation()) if kind not in ("view", "gather")]
    first = ["input", "conv+norm+relu", "conv+norm+relu", "conv", "conv+add", "norm+relu+conv+add"]
    assert found[:6] == first
    found = kinds(Dense())
    assert found.count("buffer") == 4
    assert not {"cat", "norm"} & set(found)
    assert "depthwise+relu6" in kinds(Inverted())


@torch.no_grad()
def test_streams_are_read_by_views() -> None:
    model = LARGE["resnet50"]()
    swapped(randomise(model), 0.25, 0)
    kinds = [step.kind for step in bk.plan(model, torch.randn(1, 3, 64, 64), "a", check=False)._program.steps]
    assert kinds.count("view") > 5
    assert not {"gather", "fill"} & set(kinds)


@torch.no_grad()
def test_switching_domains() -> None:
    model, _ = swapped(randomise(Residual()), 0.5, 0)
    x = torch.randn(2, 3, 16, 16)
    planned = bk.plan(model, x, "a")
    bk.set_domain(planned, "b")
    assert planned.domain == "b"
    assert torch.equal(planned(x), bk.plan(model, x, "b")(x))
    first = planned._program
    bk.set_domain(planned, None)
    assert_equal(planned(x), bk.plan(model, x)(x))
    bk.set_domain(planned, "b")
    assert planned._program is first
    with pytest.raises(ValueError, match=r"set_domain\(\): expected `name` to be one of \['a', 'b'\], got 'c'"):
        bk.set_domain(planned, "c")
    assert planned.domain == "b"


@torch.no_grad()
def test_weights_are_shared_and_norms_are_followed() -> None:
    model, masked = swapped(randomise(Residual()), 0.5, 0)
    x = torch.randn(2, 3, 16, 16)
    planned = bk.plan(model, x, "a")
    assert {id(p) for p in planned.parameters()} == {id(p) for p in model.parameters()}
    for one in (model, masked):
        one.c.weight.mul_(2)
    assert_equal(planned(x), masked(x))
    for one in (model, masked):
        one.na.bias.add_(1)
    assert_equal(planned(x), masked(x))
    assert_equal(planned.remake()(x), masked(x))


@torch.no_grad()
def test_copies_moves_and_pickles() -> None:
    model, _ = swapped(randomise(Residual()), 0.5, 0)
    x = torch.randn(2, 3, 16, 16)
    planned = bk.plan(model, x, "a")
    expected = planned(x)
    for other in (copy.deepcopy(planned), pickle.loads(pickle.dumps(planned))):
        assert torch.equal(other(x), expected)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
    with bk.use_backend("aten"):
        assert_equal(planned.double()(x.double()).float(), expected)


@torch.no_grad()
def test_peak_bytes_is_what_is_held() -> None:
    model = bk.swap_(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 2, 1)).eval())
    bk.attach_(model, {"a": {"2": bk.ChannelLists([1, 3, 4]), "3": bk.ChannelLists([0])}})
    planned = bk.plan(model, torch.randn(2, 3, 10, 10), "a")
    assert planned.peak_bytes() == 4 * 200 * (3 + 3)
    assert planned.peak_bytes((1, 3, 20, 10)) == 4 * 200 * (3 + 3)
    with pytest.raises(ValueError, match=r"expected an input of shape \(N, 3, H, W\), got \(1, 4, 20, 10\)"):
        planned.peak_bytes((1, 4, 20, 10))
    with pytest.raises(TypeError, match=r"peak_bytes\(\): expected `shapes` to be a shape for each input, got 1"):
        planned.peak_bytes(1, 3, 20, 10)
    assert bk.plan(model, torch.randn(2, 3, 10, 10)).peak_bytes() == 4 * 200 * (8 + 4)


def test_export() -> None:
    model, masked = swapped(randomise(Residual()), 0.5, 0)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        planned = bk.plan(model, x, "a")
        program = torch.export.export(planned, (x,))
        assert_equal(program.module()(x), masked(x))


@torch.no_grad()
def test_bfloat16() -> None:
    model, masked = swapped(randomise(Residual()), 0.5, 0)
    x = torch.randn(2, 3, 16, 16)
    expected = masked(x)
    planned = bk.plan(model.bfloat16(), x.bfloat16(), "a")
    assert_equal(planned(x.bfloat16()).float(), expected, 0.05)


def test_errors() -> None:
    model, _ = swapped(randomise(Residual()), 0.5, 0)
    x = torch.randn(2, 3, 16, 16)
    model.na.train()
    with pytest.raises(ValueError, match=r"plan\(\): expected `model` to be in eval mode, got 'na' in training mode"):
        bk.plan(model, x, "a")
    model.eval()
    with pytest.raises(ValueError, match=r"plan\(\): expected `example_input` to be what `model` takes, got \(2, 4, "):
        bk.plan(model, torch.randn(2, 4, 16, 16), "a")
    with pytest.raises(ValueError, match=r"plan\(\): expected `domain` to be one of \[\], got 'a'. Hint: call swap_"):
        bk.plan(Residual().eval(), x, "a")
    with pytest.raises(ValueError, match=r"plan\(\): expected `model` to be recordable, got Inner"):
        bk.plan(SMALL["data_dependent"]().inner.eval(), torch.randn(1, 8, 5, 5))
    planned = bk.plan(model, x, "a")
    with pytest.raises(ValueError, match=r"PlannedNetwork\(\): expected an input of shape \(N, 3, H, W\), got \(2, 4"):
        planned(torch.randn(2, 4, 16, 16))
    with pytest.raises(ValueError, match=r"PlannedNetwork\(\): expected 1 input, as in the example, got 2"):
        planned(x, x)
    with pytest.raises(
        TypeError, match=r"PlannedNetwork\(\): expected an input of dtype torch.float32, .* torch.bfloat16"
    ):
        planned(x.bfloat16())
    with pytest.raises(ValueError, match=r"PlannedNetwork.train\(\): expected `mode` to be False"):
        planned.train()
    with pytest.raises(
        RuntimeError, match=r"plan\(\): expected the plan to equal the masked dense network to 0.0e\+00"
    ):
        bk.plan(model, x, "a", tolerance=0.0)
    assert bk.plan(model, x, "a", tolerance=0.0, check=False).max_error is None


@torch.no_grad()
def test_plans_of_further_domains_run_nothing_without_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 16, 16)
    for both in (False, True):
        model, masked = swapped(randomise(Residual()), 0.5, 0, both)
        planned = bk.plan(model, x, "b", check=False)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "conv2d", None)
            patch.setattr(nn.Conv2d, "_conv_forward", None)
            bk.set_domain(planned, "a")
        assert_equal(planned(x), masked(x))
        assert planned.max_error is None
    # Where widths depend on the domain, the recording of one does not serve another.
    narrow = bk.swap_(nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU()).eval())
    lists = {"a": {"0": bk.ChannelLists(None, [0, 4])}, "b": {"0": bk.ChannelLists(None, [1, 2, 5])}}
    planned = bk.plan(bk.attach_(narrow, lists), x, "a", check=False)
    bk.set_domain(planned, "b")
    bk.set_domain(narrow, "b")
    assert_equal(planned(x), narrow(x))
