"""SwitchedConv2d and its switches: dtypes, state, copies, new domains and conversions."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bap_kernels as bk
from bap_kernels import ChannelLists
from bap_kernels.nn import GatheredConv2d, MaskedConv2d, SwitchedConv2d

pytestmark = pytest.mark.usefixtures("aten")

ON = [0, 3, 4, 7, 11]
OFF = [1, 2, 5, 6, 8, 9, 10]


def _layer() -> SwitchedConv2d:
    """Domain "a" has the channels ON, domain "b" all."""
    layer = SwitchedConv2d(12, 12, 3, padding=1, domains=["a", "b"])
    with torch.no_grad():
        layer.domains["a"].score[OFF] = 5e-3
    layer.set_domain("a")
    return layer


def _close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_dtype_changes_turn_no_switch() -> None:
    layer = _layer()
    score = layer.domains["a"].score
    with torch.no_grad():
        score.copy_(torch.linspace(4.99e-3, 5.01e-3, 12))
    before, lists = score.detach().clone(), layer.channels("a")
    assert 0 < len(lists.in_index) < 12
    score.grad = torch.ones(12)
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        layer.to(dtype)
        score = layer.domains["a"].score
        assert layer.weight.dtype == dtype
        assert score.dtype == score.grad.dtype == torch.float32
        assert torch.equal(score, before)
        assert layer.channels("a") == lists
        assert layer(torch.randn(1, 12, 5, 5, dtype=dtype)).dtype == dtype
    assert torch.equal(layer.bfloat16().domains["b"].score, torch.full((12,), 1e-2))


def test_state_round_trip() -> None:
    layer = _layer()
    assert list(layer.state_dict()) == ["weight", "bias", "domains.a.score", "domains.b.score"]
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = SwitchedConv2d(12, 12, 3, padding=1, domains=["a", "b"])
    assert other.channels("a") == ChannelLists(range(12))
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert other.channels("a") == ChannelLists(ON)
    other.set_domain("a")
    x = torch.randn(2, 12, 5, 5)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("assign", [False, True])
def test_dense_checkpoint_loads_strictly_and_leaves_scores(assign: bool) -> None:
    layer, dense = _layer(), nn.Conv2d(12, 12, 3, padding=1)
    layer.load_state_dict(dense.state_dict(), strict=True, assign=assign)
    assert torch.equal(layer.weight, dense.weight)
    assert layer.channels("a") == ChannelLists(ON)
    x = torch.randn(2, 12, 5, 5)
    _close(layer(x), dense(x * layer.switch("a").detach()[:, None, None]))
    assert layer.active is layer.domains["a"]


def test_strict_loading_misses_what_is_missing() -> None:
    layer = _layer()
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        layer.load_state_dict({key: value for key, value in state.items() if key != "weight"})
    del state["domains.b.score"]
    with pytest.raises(RuntimeError, match=r"Missing key.*domains\.b\.score"):
        layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*domains\.c"):
        layer.load_state_dict({**layer.state_dict(), "domains.c.score": torch.zeros(12)})


def test_meta_device_and_dense_checkpoint() -> None:
    dense = nn.Conv2d(12, 12, 3, padding=1)
    layer = SwitchedConv2d(12, 12, 3, padding=1, domains=["a"], device="meta", initial=0.25)
    layer.set_domain("a")
    for training in (True, False):
        assert layer.train(training)(torch.empty(2, 12, 9, 7, device="meta")).shape == (2, 12, 9, 7)
    layer.load_state_dict(dense.state_dict(), assign=True)
    assert layer.domains["a"].score.tolist() == [0.25] * 12
    x = torch.randn(2, 12, 9, 7)
    _close(layer(x), dense(x))
    back = _layer().to("meta").to_empty(device="cpu")
    back.load_state_dict(_layer().state_dict())
    assert back.active is back.domains["a"]
    assert back.channels() == ChannelLists(ON)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_compute_the_same_and_are_independent(duplicate: Callable[[nn.Module], SwitchedConv2d]) -> None:
    layer = _layer().eval()
    x = torch.randn(2, 12, 9, 7)
    expected = layer(x)
    other = duplicate(layer)
    assert other.domain == "a"
    assert other.active is other.domains["a"]
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        other.domains["a"].score.fill_(1)
    assert other.channels("a") == ChannelLists(range(12))
    assert layer.channels("a") == ChannelLists(ON)
    other.set_domain("b")
    assert layer.domain == "a"
    assert torch.equal(layer(x), expected)


def test_adding_a_domain_leaves_the_others() -> None:
    layer = _layer().eval()
    x = torch.randn(2, 12, 9, 7)
    expected, before = layer(x), dict(layer.named_parameters())
    layer.domains["a"].since = 1
    layer.domains["a"].score.grad = torch.ones(12)
    layer.add_domain("c")
    layer.add_domain("d", like="a")
    after = dict(layer.named_parameters())
    assert all(after[name] is value for name, value in before.items())
    assert sorted(set(after) - set(before)) == ["domains.c.score", "domains.d.score"]
    assert layer.channels("c") == ChannelLists(range(12))
    assert layer.channels("d") == ChannelLists(ON)
    assert layer.domains["d"].since == 0
    assert layer.domains["d"].score.grad is None
    assert not layer.domains["d"].training
    assert torch.equal(layer(x), expected)
    layer.set_domain("d")
    assert torch.equal(layer(x), expected)


def test_from_conv2d_shares_parameters_and_hooks() -> None:
    conv = nn.Conv2d(12, 8, (3, 2), dtype=torch.float64).eval()
    seen = []
    handle = conv.register_forward_hook(lambda module, inputs, output: seen.append(type(module)))
    layer = SwitchedConv2d.from_conv2d(conv, ["a"], threshold=0.5, initial=0.75, ste_every=2)
    assert layer.weight is conv.weight
    assert not layer.training
    assert not hasattr(conv, "domains")
    x = torch.randn(1, 12, 5, 5, dtype=torch.float64)
    layer.set_domain("a")
    torch.testing.assert_close(layer(x), F.conv2d(x, conv.weight, conv.bias))
    assert seen == [SwitchedConv2d]
    handle.remove()
    switch = layer.domains["a"]
    assert (switch.threshold, switch.initial, switch.ste_every) == (0.5, 0.75, 2)
    gathered = GatheredConv2d.from_conv2d(nn.Conv2d(12, 8, 1), ChannelLists([1]))
    assert SwitchedConv2d.from_conv2d(gathered, ["a"]).channels("a") == ChannelLists(range(12))


@pytest.mark.parametrize("kind", [GatheredConv2d, MaskedConv2d])
def test_to_gathered_has_the_lists_of_all_domains(kind: type[GatheredConv2d]) -> None:
    layer = _layer().eval()
    gathered = layer.to_gathered(kind)
    assert type(gathered) is kind
    assert gathered.weight is layer.weight
    assert gathered.lists == {"a": ChannelLists(ON), "b": ChannelLists(range(12))}
    assert gathered.channels == ChannelLists(ON)
    assert list(gathered.state_dict()) == ["weight", "bias"]
    assert isinstance(layer.domains, nn.ModuleDict)
    x = torch.randn(2, 12, 9, 7)
    assert torch.equal(gathered(x), layer(x))


def _by_numpy(score: Tensor) -> None:
    score.detach().numpy()[OFF[0]] = 1


def _by_data(score: Tensor) -> None:
    score.data[OFF[0]] = 1


def _by_vector(score: Tensor) -> None:
    values = score.detach().clone()
    values[OFF[0]] = 1
    nn.utils.vector_to_parameters(values, [score])


def _by_fused_step(score: Tensor) -> None:
    score.grad = torch.zeros_like(score)
    score.grad[OFF[0]] = -1
    torch.optim.SGD([score], 1.0, fused=True).step()


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("write", [_by_numpy, _by_data, _by_vector, _by_fused_step])
def test_lists_follow_the_values_of_scores(write: Callable[[Tensor], None], inference: bool) -> None:
    with torch.inference_mode(inference):
        layer = _layer().eval()
        score, x = layer.domains["a"].score, torch.randn(2, 12, 5, 5)
        assert layer.channels() == ChannelLists(ON)
        assert layer.channels() is layer.channels()
        for _ in range(2):
            with torch.no_grad():
                write(score)
            more = ChannelLists(sorted([*ON, OFF[0]]))
            assert layer.channels() == more
            assert bk.ChannelTable.from_switches(layer)["a"][""] == more
            with torch.no_grad():
                on = layer.switch("a").view(-1, 1, 1)
                _close(layer(x), F.conv2d(x * on, layer.weight, layer.bias, padding=1))
                score[OFF[0]] = 0
            assert layer.channels() == ChannelLists(ON)
            layer.domains["a"].threshold = 2.0
            assert layer.channels() == ChannelLists([])
            layer.domains["a"].threshold = 5e-3
