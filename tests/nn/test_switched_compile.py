"""torch.compile of training steps with switches, batch norm and classifiers per domain: no breaks, few graphs."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import bap_kernels as bk

DOMAINS = [f"domain{number}" for number in range(12)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.norm = nn.BatchNorm2d(16)
        self.conv = nn.Conv2d(16, 24, (3, 2), stride=(2, 1), padding=(1, 0))
        self.norm2 = nn.BatchNorm2d(24)
        self.last = nn.Conv2d(24, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = self.last(torch.relu(self.norm2(self.conv(x))))
        return self.head(x.mean((2, 3)))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    # Graphs do not depend on the backend, and `auto` would measure every shape of these tests.
    with bk.use_backend("aten"):
        yield
    torch._dynamo.reset()


def _model(classes: int = 0, ste_every: int = 1) -> nn.Module:
    """Domain i has 5 + classes * i classes."""
    heads = {name: 5 + classes * number for number, name in enumerate(DOMAINS)}
    model = bk.nn.switch_(Net(), DOMAINS, heads=heads, ste_every=ste_every)
    with torch.no_grad():
        for _, layer in bk.nn.domain_layers(model):
            # The stem keeps its three channels: without any, all gradients before the next layer are zero.
            if isinstance(layer, bk.nn.SwitchedConv2d) and layer.in_channels > 3:
                for switch in layer.domains.values():
                    switch.score.copy_(torch.randn(layer.in_channels) * 0.01 + 5e-3)
    return model


def _steps(model: nn.Module, step, domains: list[str]) -> None:
    """Compares steps of ``model`` with those of a copy that is not compiled; ``step(model, x, y)`` is the loss."""
    other = copy.deepcopy(model)
    x, y = torch.randn(4, 3, 12, 11), torch.randint(0, 5, (4,))
    for name in domains:
        losses = []
        for one, run in ((model, step), (other, lambda m, x, y: F.cross_entropy(m(x), y))):
            bk.set_domain(one, name)
            one.zero_grad()
            losses.append(run(one, x, y))
            losses[-1].backward()
        torch.testing.assert_close(*losses)
        for (key, value), its in zip(model.named_parameters(), other.parameters(), strict=True):
            assert (value.grad is None) == (its.grad is None), key
            if value.grad is not None:
                torch.testing.assert_close(value.grad, its.grad, rtol=1e-4, atol=1e-5, msg=key)
        assert model.conv.domains[name].score.grad.count_nonzero() == 16
    for key, value in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, msg=key)


def test_training_steps_of_twelve_domains_are_one_graph() -> None:
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def step(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    _steps(_model(), step, [*DOMAINS, DOMAINS[0]])
    assert counter.frame_count == 1


@pytest.mark.skipif(not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="no such option in this torch")
def test_forward_loss_and_backward_are_one_graph() -> None:
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def step(model: nn.Module, x: Tensor, y: Tensor) -> None:
        F.cross_entropy(model(x), y).backward()

    model = _model()
    other = copy.deepcopy(model)
    x, y = torch.randn(4, 3, 12, 11), torch.randint(0, 5, (4,))
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        for name in DOMAINS[:4]:
            for one in (model, other):
                bk.set_domain(one, name)
                one.zero_grad()
            step(model, x, y)
            F.cross_entropy(other(x), y).backward()
            for (key, value), its in zip(model.named_parameters(), other.parameters(), strict=True):
                assert (value.grad is None) == (its.grad is None), key
                if value.grad is not None:
                    torch.testing.assert_close(value.grad, its.grad, rtol=1e-4, atol=1e-5, msg=key)
    assert counter.frame_count <= 2


def test_frozen_backbone_is_one_graph() -> None:
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def step(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    model = _model()
    own = dict(bk.nn.domain_parameters(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in own)
    _steps(model, step, DOMAINS)
    assert counter.frame_count == 1


def test_different_numbers_of_classes_share_a_graph_where_sizes_of_parameters_may_vary() -> None:
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def step(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    # Without these options there is one graph for each number of classes.
    vary = {"force_parameter_static_shapes": False, "force_nn_module_property_static_shapes": False}
    with torch._dynamo.config.patch(vary):
        _steps(_model(classes=1), step, DOMAINS)
    assert counter.frame_count <= 2


def test_compiled_features_with_classifiers_outside_are_one_graph() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    model = _model(classes=1)
    head, model.head = model.head, nn.Identity()
    features = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(4, 3, 12, 11)
    for number, name in enumerate(DOMAINS):
        bk.set_domain(features, name)
        bk.set_domain(head, name)
        assert head(features(x)).shape == (4, 5 + number)
    assert counter.frame_count == 1


def test_turns_of_off_channels_make_a_graph_each() -> None:
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def step(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    model = _model(ste_every=3)
    bk.set_domain(model, DOMAINS[0])
    x, y = torch.randn(4, 3, 12, 11), torch.randint(0, 5, (4,))
    off = model.conv.domains[DOMAINS[0]].score.detach() <= 5e-3
    got = []
    for _ in range(7):
        model.zero_grad()
        step(model, x, y).backward()
        got.append(bool(model.conv.domains[DOMAINS[0]].score.grad[off].ne(0).all()))
    assert off.any()
    assert got == [True, False, False] * 2 + [True]
    assert counter.frame_count == 3


def test_eval_is_one_graph_and_sees_new_scores() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    model = _model().eval()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(4, 3, 12, 11)
    results = []
    with torch.no_grad():
        for name in DOMAINS:
            bk.set_domain(model, name)
            results.append(compiled(x))
            torch.testing.assert_close(results[-1], model(x))
        model.conv.domains[DOMAINS[-1]].score.fill_(1)
        torch.testing.assert_close(compiled(x), model(x))
    assert not torch.allclose(results[0], results[1])
    assert counter.frame_count == 1


def test_autocast_step() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    model = _model()
    bk.set_domain(model, DOMAINS[3])

    @torch.compile(backend=counter, fullgraph=True)
    def step(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x)
        return F.cross_entropy(logits.float(), y)

    x, y = torch.randn(4, 3, 12, 11), torch.randint(0, 5, (4,))
    step(x, y).backward()
    got = model.conv.domains[DOMAINS[3]].score.grad.clone()
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    wanted = model.conv.domains[DOMAINS[3]].score.grad
    torch.testing.assert_close(got, wanted, rtol=0.1, atol=0.1 * wanted.abs().max().item())


@pytest.mark.slow
def test_inductor_agrees() -> None:
    @torch.compile(fullgraph=True)
    def step(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    _steps(_model(), step, DOMAINS[:3])


def test_export_keeps_the_domain() -> None:
    model = _model().eval()
    bk.set_domain(model, DOMAINS[2])
    x = torch.randn(4, 3, 12, 11)
    exported = torch.export.export(model, (x,)).module()
    expected = model(x)
    bk.set_domain(model, DOMAINS[7])
    torch.testing.assert_close(exported(x), expected)
