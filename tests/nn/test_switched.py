"""SwitchedConv2d and its switches: values, gradients, lists and errors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bap_kernels as bk
from bap_kernels import ChannelLists
from bap_kernels.nn import ChannelSwitch, GatheredConv2d, SwitchedConv2d

pytestmark = pytest.mark.usefixtures("aten")

ON = [0, 3, 4, 7, 11]
OFF = [1, 2, 5, 6, 8, 9, 10]
LAYERS = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "3x2": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "bias": False},
    "dilated": {"kernel_size": 3, "dilation": (2, 1)},
    "same": {"kernel_size": (4, 3), "padding": "same"},
    "reflect": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 12},
}


def _layer(name: str = "3x3", **options) -> SwitchedConv2d:
    """Domain "a" has the channels ON, domain "b" all."""
    layer = SwitchedConv2d(12, 12, **LAYERS[name], domains=["a", "b"], **options)
    with torch.no_grad():
        layer.domains["a"].score[OFF] = 5e-3
    layer.set_domain("a")
    return layer


def _dense(layer: SwitchedConv2d, name: str = "3x3") -> nn.Conv2d:
    dense = nn.Conv2d(12, 12, **LAYERS[name])
    dense.load_state_dict({key: value for key, value in layer.state_dict().items() if "domains" not in key})
    return dense


def _close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients(name: str, memory_format: torch.memory_format, backend: str) -> None:
    if (backend, name) == ("native", "depthwise"):
        pytest.skip("no native kernel for gradients of depthwise convolutions")
    with bk.use_backend(backend):
        _check_values_and_gradients(name, memory_format)


def _check_values_and_gradients(name: str, memory_format: torch.memory_format) -> None:
    layer = _layer(name)
    dense = _dense(layer, name)
    x = torch.randn(2, 12, 9, 7).to(memory_format=memory_format).requires_grad_()
    switch = torch.zeros(12).index_fill_(0, torch.tensor(ON), 1).requires_grad_()
    expected = dense(x * switch[:, None, None])
    grad = torch.randn_like(expected)
    expected.backward(grad)
    wanted, x.grad = x.grad, None

    actual = layer(x)
    actual.backward(grad)
    _close(actual, expected)
    _close(x.grad, wanted)
    _close(layer.weight.grad, dense.weight.grad)
    # Straight through: the score's gradient is the switch's, of channels that are off too.
    torch.testing.assert_close(layer.domains["a"].score.grad, switch.grad, rtol=1e-4, atol=1e-4)
    assert switch.grad[OFF].ne(0).all()
    assert layer.domains["b"].score.grad is None


@pytest.mark.parametrize("name", LAYERS)
def test_eval_computes_the_same(name: str, backend: str) -> None:
    if (backend, name) == ("native", "depthwise"):
        pytest.skip("no native kernel for switched depthwise convolutions in every layout")
    with bk.use_backend(backend):
        _check_eval(name)


def _check_eval(name: str) -> None:
    layer = _layer(name)
    x = torch.randn(2, 12, 9, 7)
    expected = layer(x).detach()
    layer.eval()
    _close(layer(x).detach(), expected)
    with torch.inference_mode():
        _close(layer(x).clone(), expected)
    x[:, OFF] = float("nan")
    if name != "depthwise":
        _close(layer(x).detach(), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_eval_reads_the_listed_channels_and_packs_once(mode: Callable[[], AbstractContextManager]) -> None:
    if bk.info().backends["native"] is not None:
        pytest.skip("no native backend here, nothing is packed")
    layer = _layer().eval()
    x = torch.randn(2, 12, 9, 7)
    bk.clear_packed_cache()
    with bk.use_backend("native"), mode():
        layer(x)
        first = bk.packed_cache_info()
        layer(x)
        again = bk.packed_cache_info()
    assert first["entries"] == again["entries"] == 1
    assert again["hits"] == first["hits"] + 1


def test_lists_are_made_again_only_after_the_scores_change(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _layer().eval()
    switch = layer.domains["a"]
    before = layer.channels("a")
    assert before == ChannelLists(ON)
    assert layer.channels() is layer.channels("a") is before
    layer(torch.randn(1, 12, 5, 5))
    assert switch.channels() is before
    with torch.no_grad():
        switch.score[1] = 1
    assert layer.channels("a") == ChannelLists([0, 1, 3, 4, 7, 11])
    x = torch.randn(2, 12, 9, 7)
    y = layer(x)
    _close(y, _dense(layer)(x * switch().detach()[:, None, None]))
    switch.threshold = 0.5
    assert layer.channels("a") == ChannelLists([1])
    torch.optim.SGD([switch.score], lr=1.0)
    switch.score.grad = torch.full((12,), -1.0)
    torch.optim.Adam([switch.score], lr=1.0).step()
    assert layer.channels("a") == ChannelLists(range(12))
    assert layer.channels("b") == ChannelLists(range(12))


def test_no_domain_keeps_all_channels() -> None:
    layer = _layer()
    layer.set_domain(None)
    assert layer.domain is None
    assert layer.active is None
    assert layer.channels() == ChannelLists()
    x = torch.randn(2, 12, 9, 7)
    assert torch.equal(layer(x), _dense(layer)(x))


def test_input_without_a_batch_axis() -> None:
    layer = _layer("3x2")
    x = torch.randn(12, 9, 7)
    for training in (True, False):
        assert torch.equal(layer.train(training)(x), layer(x[None])[0])


def test_switch_is_exactly_binary_and_strict() -> None:
    switch = ChannelSwitch(4, threshold=0.3, initial=-2.0)
    assert switch.score.tolist() == [-2.0] * 4
    with torch.no_grad():
        switch.score.copy_(torch.tensor([0.3, 0.30001, 1e6, -1e-6]))
    assert switch().tolist() == [0, 1, 1, 0]
    assert switch.channels() == ChannelLists([1, 2])
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    (switch() * weights).sum().backward()
    assert torch.equal(switch.score.grad, weights)
    switch.reset_parameters()
    assert switch.score.tolist() == [-2.0] * 4


def test_defaults() -> None:
    switch = SwitchedConv2d(3, 4, 1, domains=["a"]).domains["a"]
    assert (switch.threshold, switch.ste_every) == (5e-3, 1)
    torch.testing.assert_close(switch.score.detach(), torch.full((3,), 1e-2))
    assert SwitchedConv2d(3, 4, 1, domains=["a"], threshold=0.0, initial=-1.0).channels("a") == ChannelLists([])


def test_off_channels_take_turns_in_each_domain() -> None:
    layer = _layer(ste_every=3)
    x = torch.randn(2, 12, 5, 5)
    with torch.no_grad():
        layer.domains["b"].score[:2] = 0
    got = []
    for domain in ("a", "b") * 7:
        layer.set_domain(domain)
        layer.zero_grad()
        layer(x).square().sum().backward()
        grad = layer.domains[domain].score.grad
        off = OFF if domain == "a" else [0, 1]
        assert grad[[c for c in range(12) if c not in off]].ne(0).all()
        got.append(bool(grad[off].ne(0).all()))
        assert got[-1] or grad[off].eq(0).all()
        # Only training counts, and only where something can be differentiated.
        layer.eval()(x)
        with torch.no_grad():
            layer.train()(x)
    assert got == [True, True, False, False, False, False] * 2 + [True, True]


def test_needed_channels_come_back_and_others_go() -> None:
    conv = nn.Conv2d(6, 4, 1, bias=False)
    layer = SwitchedConv2d.from_conv2d(conv, ["a", "b"])
    layer.weight.requires_grad_(False)
    with torch.no_grad():
        # "a" lacks a channel that its target needs.
        layer.domains["a"].score[2] = 0
    wanted = {"a": [1, 2], "b": [0, 4, 5]}
    optimiser = torch.optim.Adam(layer.parameters(), lr=1e-3)
    for step in range(120):
        name = "ab"[step % 2]
        layer.set_domain(name)
        x = torch.randn(8, 6, 3, 3)
        target = F.conv2d(x[:, wanted[name]], conv.weight[:, wanted[name]])
        loss = (layer(x) - target).square().mean() + 1e-3 * layer.switch().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert {name: layer.channels(name) for name in "ab"} == {name: ChannelLists(kept) for name, kept in wanted.items()}


def test_frozen_weight_gets_no_gradient_and_none_is_computed() -> None:
    layer = _layer()
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_(False)
    y = layer(torch.randn(2, 12, 5, 5))
    seen = []
    operator = torch.ops.bap_kernels.switched_conv2d_backward.default

    class Masks(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is operator:
                seen.append(list(args[-1]))
            return function(*args, **(kwargs or {}))

    with Masks():
        y.sum().backward()
    assert seen == [[False, False, False, True]]
    assert layer.weight.grad is None
    assert layer.domains["a"].score.grad.ne(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_autocast_obeys_the_dtype(dtype: torch.dtype, training: bool) -> None:
    layer = _layer().train(training)
    x = torch.randn(2, 12, 9, 7)
    with torch.autocast("cpu", dtype):
        y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), layer(x), rtol=2e-2, atol=2e-2)
    if training:
        y.float().square().sum().backward()
        score = layer.domains["a"].score
        assert score.grad.dtype == layer.weight.grad.dtype == torch.float32
        wanted = torch.autograd.grad(layer(x).square().sum(), score)[0]
        torch.testing.assert_close(score.grad, wanted, rtol=5e-2, atol=0.05 * wanted.abs().max().item())


def test_repr() -> None:
    assert repr(SwitchedConv2d(4, 8, 1, domains=["a"])) == (
        "SwitchedConv2d(\n  4, 8, kernel_size=(1, 1), stride=(1, 1), domains=['a']\n"
        "  (domains): ModuleDict(\n    (a): ChannelSwitch(4, threshold=0.005)\n  )\n)"
    )


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SwitchedConv2d(4, 4, 1, domains=["a.b"]), ValueError, r"SwitchedConv2d\(\): .*got 'a\.b': .*no dot"),
        (lambda: SwitchedConv2d(4, 4, 1, domains=[""]), ValueError, "got '': .*not empty"),
        (lambda: SwitchedConv2d(4, 4, 1, domains=["train"]), ValueError, "got 'train': .*attribute"),
        (lambda: SwitchedConv2d(4, 4, 1, domains=[3]), ValueError, "got 3: a name is text"),
        (lambda: SwitchedConv2d(4, 4, 1, domains=["a", "a"]), ValueError, "got 'a': it was given twice"),
        (lambda: SwitchedConv2d(4, 4, 1, domains=[]), ValueError, "at least one name, got none"),
        (lambda: SwitchedConv2d(4, 4, 1, domains="birds"), ValueError, r"got 'birds'. Hint: pass \['birds'\]"),
        (lambda: SwitchedConv2d(4, 4, 1, domains=["a"], ste_every=0), ValueError, "`ste_every` to be .* got 0"),
        (lambda: SwitchedConv2d(4, 4, 1, groups=2, domains=["a"]), NotImplementedError, r"groups=2 with 4 -> 4"),
        (lambda: _layer().set_domain("c"), ValueError, r"`name` to be one of \['a', 'b'\], got 'c'"),
        (lambda: _layer().channels("c"), ValueError, r"`domain` to be one of \['a', 'b'\], got 'c'"),
        (lambda: _layer().add_domain("a"), ValueError, "add_domain.*got 'a': it was given twice"),
        (lambda: _layer().add_domain("c", like="d"), ValueError, r"one of \['a', 'b'\], got 'd'"),
        (lambda: _layer("depthwise").to_gathered(), NotImplementedError, r"depthwise layer with switches"),
        (lambda: SwitchedConv2d.from_conv2d(nn.Linear(4, 4), ["a"]), NotImplementedError, "Linear is no"),
        (lambda: GatheredConv2d.from_conv2d(_layer()), NotImplementedError, "SwitchedConv2d is a subclass"),
    ],
)
def test_refuses(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_switch_without_a_domain_is_refused() -> None:
    layer = SwitchedConv2d(4, 4, 1, domains=["a"])
    with pytest.raises(RuntimeError, match=r"a domain to be active, got none. Hint: call set_domain\(model, name\)"):
        layer.switch()


def test_inference_scores_have_no_version() -> None:
    with torch.inference_mode():
        layer = _layer().eval()
        assert layer.channels("a") == ChannelLists(ON)
        layer.domains["a"].score[0] = 0
        assert layer.channels("a") == ChannelLists(ON[1:])


@pytest.mark.gpu
def test_on_the_gpu() -> None:
    layer = _layer()
    x = torch.randn(2, 12, 9, 7)
    expected = layer(x)
    expected.sum().backward()
    wanted = layer.domains["a"].score.grad
    layer.zero_grad()
    layer.cuda()
    torch.testing.assert_close(layer(x.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)
    layer(x.cuda()).sum().backward()
    torch.testing.assert_close(layer.domains["a"].score.grad.cpu(), wanted, rtol=1e-3, atol=1e-2)
    assert layer.channels("a").in_index.is_cuda
    torch.testing.assert_close(layer.eval()(x.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)
