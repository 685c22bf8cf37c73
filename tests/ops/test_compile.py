"""torch.compile without graph breaks and with few graphs, and torch.export."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import bap_kernels as bk
from bap_kernels import ChannelLists
from bap_kernels.nn import GatheredConv2d, MaskedConv2d

DOMAINS = [f"domain{number}" for number in range(12)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.norm = nn.BatchNorm2d(16)
        self.conv = nn.Conv2d(16, 24, (3, 2), stride=(2, 1), padding=(1, 0))
        self.depthwise = nn.Conv2d(24, 24, 3, padding="same", groups=24)
        self.last = nn.Conv2d(24, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.last(torch.relu(self.depthwise(self.conv(x))))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    # Graphs do not depend on the backend, and `auto` would measure every shape of these tests.
    with bk.use_backend("aten"):
        yield
    torch._dynamo.reset()


def _lists(domain: int) -> dict[str, ChannelLists]:
    """Draw lists of different lengths, some of them equal between domains."""
    return {
        "conv": ChannelLists(range(2 + domain), range(3, 8 + domain // 3)),
        "depthwise": ChannelLists(range(2, 14 - domain // 2), range(2, 14 - domain // 2)),
        "last": ChannelLists(range(24 - 2 * domain // 3), range(domain % 2, 10)),
    }


def _model(layer_type: type[GatheredConv2d] = MaskedConv2d) -> nn.Module:
    model = bk.swap_(Net(), layer_type=layer_type)
    table = {name: _lists(number) for number, name in enumerate(DOMAINS)}
    if layer_type is GatheredConv2d:
        table = {
            name: {layer: ChannelLists(lists.in_index) for layer, lists in layers.items() if layer != "depthwise"}
            for name, layers in table.items()
        }
    return bk.attach_(model, table)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("layer_type", [GatheredConv2d, MaskedConv2d])
def test_twelve_domains_compile_into_two_graphs(layer_type: type[GatheredConv2d], training: bool) -> None:
    model = _model(layer_type)
    # In training mode the running statistics would differ between the two runs.
    model.train(training).norm.eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(2, 3, 12, 11)
    results = []
    for domain in (*DOMAINS, DOMAINS[0]):
        bk.set_domain(model, domain)
        actual, expected = compiled(x), model(x)
        torch.testing.assert_close(actual, expected)
        if training:
            expected_grads = torch.autograd.grad(expected.sum(), list(model.parameters()))
            for one, its in zip(
                torch.autograd.grad(actual.sum(), list(model.parameters())), expected_grads, strict=True
            ):
                torch.testing.assert_close(one, its)
        results.append(actual)
    assert counter.frame_count <= 2
    assert not torch.allclose(results[0], results[1])
    assert torch.equal(results[0], results[-1])


def test_lists_created_before_compiler_import_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as without:
        # Lists are marked for the compiler only after it is imported.
        without.delitem(sys.modules, "torch._dynamo")
        model = _model()
        bk.set_domain(model, DOMAINS[0])
    assert not hasattr(model.conv.channels.in_index, "_dynamo_weak_dynamic_indices")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.eval(), backend=counter, fullgraph=True)
    x = torch.randn(2, 3, 12, 11)
    compiled(x)
    for domain in DOMAINS:
        bk.set_domain(model, domain)
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count <= 2


def test_compiled_module_follows_set_domain() -> None:
    model = _model().eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(2, 3, 12, 11)
    bk.set_domain(compiled, DOMAINS[3])
    assert model.conv.channels == _lists(3)["conv"]
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("memory_format", "lists"),
    [
        (torch.channels_last, ChannelLists()),
        (torch.contiguous_format, ChannelLists([0, 2, 5], [1, 2, 3, 6])),
        (torch.channels_last, ChannelLists([0, 2, 5], [1, 2, 3, 6])),
    ],
    ids=["nhwc-dense", "nchw-lists", "nhwc-lists"],
)
def test_inductor_accepts_strides_of_meta_kernels(memory_format: torch.memory_format, lists: ChannelLists) -> None:
    # Only Inductor asserts the strides of the Meta kernels, of results and gradients.
    conv = MaskedConv2d(6, 8, 3, padding=1, channels=lists)
    compiled = torch.compile(conv, fullgraph=True)
    x = torch.randn(2, 6, 7, 5).to(memory_format=memory_format).requires_grad_()
    actual, expected = compiled(x), conv(x)
    torch.testing.assert_close(actual, expected)
    grad = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, (x, *conv.parameters()), grad)
    for one, its in zip(torch.autograd.grad(actual, (x, *conv.parameters()), grad), expected_grads, strict=True):
        torch.testing.assert_close(one, its)


def test_compiled_eval_uses_updated_weights() -> None:
    model = _model().eval()
    bk.set_domain(model, DOMAINS[1])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 12, 11)
    with torch.no_grad():
        before = compiled(x)
        model.last.weight.mul_(-2)
        after = compiled(x)
        torch.testing.assert_close(after, model(x))
    assert not torch.allclose(after, before)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("batch", ["static", "dynamic"])
def test_export_equals_eager(batch: str, strict: bool) -> None:
    model = _model().eval()
    bk.set_domain(model, DOMAINS[2])
    x = torch.randn(4, 3, 12, 11)
    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=64)}} if batch == "dynamic" else None
    exported = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=strict)
    assert sorted(exported.state_dict) == sorted(model.state_dict())
    run = exported.module()
    torch.testing.assert_close(run(x), model(x))
    if batch == "dynamic":
        torch.testing.assert_close(run(x[:3]), model(x[:3]))
    # The program keeps the domain of the export.
    expected = model(x)
    bk.set_domain(model, DOMAINS[7])
    torch.testing.assert_close(run(x), expected)


def test_copy_of_compiled_model_has_its_own_domain() -> None:
    model = _model().eval()
    bk.set_domain(model, DOMAINS[0])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 12, 11)
    expected = compiled(x)
    other = copy.deepcopy(model)
    bk.set_domain(other, DOMAINS[5])
    torch.testing.assert_close(compiled(x), expected)
