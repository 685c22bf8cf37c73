"""Learnt lists of read channels: links between layers, exact gradients with and without, and what they miss."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import bap_kernels as bk

DOMAINS = ("birds", "cars")
WARNING = "expected the output gradient to be zero in channels that `read` leaves out"


class Block(nn.Module):
    """Two convolutions around a sum, and a stem; the stream is read by the next block alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Residual."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(F.dropout(y, 0.0)))
        y += x
        return F.relu(y)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        Block(16),
        nn.Conv2d(16, 24, 1),
        nn.ReLU6(),
        nn.Conv2d(24, 8, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def switched(model: nn.Module | None = None, linked: bool = True) -> nn.Module:
    made = bk.nn.switch_(model or network(), DOMAINS)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith(".score"):
                parameter.copy_(torch.where(torch.rand(parameter.shape, generator=generator) < 0.5, 1.0, -1.0))
    if not linked:
        for module in made.modules():
            if isinstance(module, bk.nn.SwitchedConv2d):
                module.consumers = None
    bk.set_domain(made, "birds")
    return made


def layer_of(model: nn.Module, name: str) -> bk.nn.SwitchedConv2d:
    found = model.get_submodule(name)
    assert isinstance(found, bk.nn.SwitchedConv2d)
    return found


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    """A list that is wrong where none is meant to be is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{WARNING}")
        yield


def test_links_pass_through_channelwise_layers() -> None:
    model = switched()
    block, reads = model[4], {name: layer_of(model, name).consumers for name in ("0", "4.conv1", "4.conv2", "5", "7")}
    assert reads["0"] == (block.conv1, model[5])
    assert reads["4.conv1"] == (block.conv2,)
    assert reads["4.conv2"] == (model[5],)
    assert reads["5"] == (model[7],)
    # The classifier reads all of it.
    assert reads["7"] is None


def test_readers_is_a_deprecated_name_of_consumers() -> None:
    layer = layer_of(switched(), "5")
    with pytest.warns(DeprecationWarning, match=r"SwitchedConv2d\.readers is deprecated; use `consumers`"):
        assert layer.readers is layer.consumers


class Reader(nn.Module):
    def __init__(self, read: Callable[[Tensor, nn.Module], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.read = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.first(x), self.second)


@pytest.mark.parametrize(
    ("read", "linked"),
    [
        (lambda y, second: second(y), True),
        (lambda y, second: second(y.relu_() + 1), True),
        (lambda y, second: second(F.max_pool2d(y, 2)), True),
        (lambda y, second: second(second(y)), True),
        (lambda y, second: second(F.interpolate(y.sigmoid(), scale_factor=2)), True),
        (lambda y, second: second(y - y.mean((2, 3), keepdim=True)), True),
        (lambda y, second: second(y.sqrt()), False),
        (lambda y, second: second(y * y), False),
        (lambda y, second: second(y) + y, False),
        (lambda y, second: second(y.flip(1)), False),
        (lambda y, second: second(torch.cat([y, y], 1)[:, :8]), False),
        (lambda y, second: second(y) * y.mean((2, 3), keepdim=True), False),
        (lambda y, second: second(y) if y.sum() > 0 else y, False),
    ],
)
def test_links_need_consumers_that_keep_channels_apart(
    read: Callable[[Tensor, nn.Module], Tensor], linked: bool
) -> None:
    model = bk.nn.switch_(Reader(read), DOMAINS)
    assert layer_of(model, "first").consumers == ((model.second,) if linked else None)


def test_a_hook_leaves_no_link() -> None:
    plain = network()
    plain[2].register_forward_hook(lambda module, given, result: None)
    assert layer_of(switched(plain), "0").consumers is None


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("trained", [False, True])
def test_gradients_are_the_same_bits(layout: torch.memory_format, trained: bool) -> None:
    models = [switched(linked=linked).to(memory_format=layout) for linked in (True, False)]
    x = torch.randn(4, 3, 12, 12).contiguous(memory_format=layout)
    for model in models:
        for module in model.modules():
            if isinstance(module, bk.nn.SwitchedConv2d):
                module.weight.requires_grad_(trained)
    # More steps than pass between two searches, in turns of two domains whose lists differ.
    for step in range(36):
        for model in models:
            bk.set_domain(model, DOMAINS[step % 2])
        assert_equal(*(gradients(model, x) for model in models))


def test_changed_switches_are_followed() -> None:
    models = [switched(linked=linked) for linked in (True, False)]
    x = torch.randn(4, 3, 12, 12)
    for channel in range(8):
        assert_equal(*(gradients(model, x) for model in models))
        with torch.no_grad():
            for model in models:
                score = layer_of(model, "4.conv2").domains["birds"].score
                score[channel] = -score[channel]


def test_a_hook_that_reads_an_off_channel_gets_its_gradient_and_one_warning() -> None:
    models = [switched(linked=linked) for linked in (True, False)]
    x = torch.randn(4, 3, 12, 12)
    kept: list[Tensor] = []
    off = int((layer_of(models[0], "4.conv2").switch() == 0).nonzero()[0])
    for model in models:
        model.get_submodule("4.bn1").register_forward_hook(lambda module, given, result: kept.append(result))

    def step(model: nn.Module) -> dict[str, Tensor]:
        kept.clear()
        model.zero_grad()
        loss = model(x).square().sum() + kept[0][:, off].square().sum()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert_equal(*(step(model) for model in models))
    assert [WARNING in str(one.message) for one in caught] == [True]


def test_a_hook_that_comes_later_is_noticed() -> None:
    model, x = switched(), torch.randn(4, 3, 12, 12)
    gradients(model, x)
    kept: list[Tensor] = []
    model.get_submodule("4.bn1").register_forward_hook(lambda module, given, result: kept.append(result))

    def steps() -> None:
        for _ in range(16):
            kept.clear()
            (model(x).sum() + kept[0].square().sum()).backward()

    with pytest.warns(UserWarning, match=WARNING):
        steps()


def test_copies_work_and_are_linked_anew() -> None:
    model, x = switched(), torch.randn(4, 3, 12, 12)
    wanted = gradients(model, x)
    keys = list(model.state_dict())
    assert not any("reader" in key or "number" in key for key in keys)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert layer_of(made, "4.conv1").consumers is None
        assert list(made.state_dict()) == keys
        bk.set_domain(made, "birds")
        assert_equal(gradients(made, x), wanted)
        assert layer_of(bk.nn.link_readers_(made), "4.conv1").consumers == (made.get_submodule("4.conv2"),)
        assert_equal(gradients(made, x), wanted)
        first, second = (layer_of(one, "4.conv1").domains["birds"] for one in (model, made))
        assert first.number != second.number
    alone = copy.deepcopy(layer_of(model, "4.conv1"))
    assert sum(p.numel() for p in alone.parameters()) == sum(p.numel() for p in model[4].conv1.parameters())
    assert model[4].conv1.consumers == (model[4].conv2,)
    other = switched()
    other.load_state_dict(model.state_dict())
    assert_equal(gradients(other, x), wanted)


def test_gathered_layers_leave_links_behind() -> None:
    model = bk.swap_(switched().eval())
    assert all("readers" not in module.__dict__ for module in model.modules())


def test_no_read_list_without_a_domain_or_in_a_mixed_batch() -> None:
    model, x = switched(), torch.randn(4, 3, 12, 12)
    layer = layer_of(model, "4.conv1")
    seen = layer._read_by_consumers(x)
    assert seen is not None
    assert torch.equal(seen, layer_of(model, "4.conv2").switch() == 1)
    layer_of(model, "4.conv2").set_domain(None)
    assert layer._read_by_consumers(x) is None
    bk.set_domain(model, torch.tensor([0, 1, 0, 1]))
    assert layer._read_by_consumers(x) is None
    bk.set_domain(model, "cars")
    assert torch.equal(layer._read_by_consumers(x), layer_of(model, "4.conv2").switch() == 1)
    assert layer._read_by_consumers(x.to("meta")) is None


def test_flops_are_the_same_with_and_without_links() -> None:
    x, counts = torch.randn(4, 3, 12, 12), []
    for linked in (True, False):
        model = switched(linked=linked)
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_compiled_steps_ignore_links() -> None:
    """One graph serves all domains; a number of the reader in it would not."""
    torch._dynamo.reset()
    model, x = switched(), torch.randn(4, 3, 12, 12)
    graphs = 0

    def count_graphs(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., object]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=count_graphs)
    for domain in DOMAINS:
        bk.set_domain(model, domain)
        wanted = gradients(model, x)
        model.zero_grad()
        compiled(x).square().sum().backward()
        assert_equal({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, wanted)
    assert graphs == 1


def test_consumers_in_resnets() -> None:
    model = bk.nn.switch_(torchvision.models.resnet18(), ["birds"])
    block = model.layer1[0]
    assert block.conv1.consumers == (block.conv2,)
    # The stream of the stage: the next block, and both branches of the next stage.
    assert block.conv2.consumers == (
        model.layer1[1].conv1,
        model.layer2[0].conv1,
        model.layer2[0].downsample[0],
    )
    assert model.layer4[1].conv2.consumers is None
    dense = bk.nn.switch_(torchvision.models.densenet121(), ["birds"])
    layer = dense.features.denseblock1.denselayer1
    assert layer.conv1.consumers == (layer.conv2,)
    assert layer.conv2.consumers is None


class MixingNorm(nn.BatchNorm2d):
    """A subclass whose result mixes channels."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flip(1)


def test_links_end_at_norms_that_are_not_known() -> None:
    def link(norm: nn.Module) -> object:
        model = nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.Conv2d(4, 2, 1))
        return bk.nn.switch_(model, ["a"])[0].consumers

    assert link(nn.BatchNorm2d(4)) is not None
    assert link(nn.SyncBatchNorm(4)) is not None
    assert link(MixingNorm(4)) is None
    norm_act = pytest.importorskip("timm.layers.norm_act", reason="timm is not installed")
    assert link(norm_act.BatchNormAct2d(4)) is not None
    assert link(norm_act.BatchNormAct2d(4, act_layer=nn.Softmax, act_kwargs={"dim": 1}, inplace=None)) is None
