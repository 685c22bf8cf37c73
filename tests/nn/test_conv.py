"""GatheredConv2d and MaskedConv2d as torch.nn layers: values, state, copies, devices."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bap_kernels import ChannelLists
from bap_kernels.nn import GatheredConv2d, MaskedConv2d

LISTS = ChannelLists([0, 3, 4, 7, 11], [1, 2, 8])
DEPTHWISE = ChannelLists([1, 2, 8], [1, 2, 8])

# Arguments after (in_channels, out_channels), and the lists.
LAYERS = {
    "1x1": ({"kernel_size": 1}, LISTS),
    "3x3": ({"kernel_size": 3, "padding": 1}, LISTS),
    "3x2": ({"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)}, LISTS),
    "dilated": ({"kernel_size": 3, "dilation": (2, 1), "bias": False}, LISTS),
    "same": ({"kernel_size": (4, 3), "padding": "same"}, LISTS),
    "same dilated": ({"kernel_size": (2, 3), "padding": "same", "dilation": (1, 2)}, LISTS),
    "valid": ({"kernel_size": 3, "padding": "valid"}, LISTS),
    "reflect": ({"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"}, LISTS),
    "circular same": ({"kernel_size": (4, 3), "padding": "same", "padding_mode": "circular"}, LISTS),
    "depthwise": ({"kernel_size": 3, "padding": 1, "groups": 12}, DEPTHWISE),
    "in-list": ({"kernel_size": 3}, ChannelLists([0, 3, 4, 7, 11])),
    "out-list": ({"kernel_size": 3}, ChannelLists(None, [1, 2, 8])),
    "dense": ({"kernel_size": 3}, ChannelLists()),
    "reads nothing": ({"kernel_size": 3}, ChannelLists([], [1, 2, 8])),
    "writes nothing": ({"kernel_size": 3}, ChannelLists([0, 3], [])),
}


def _layer(name: str, kind: type[GatheredConv2d] = GatheredConv2d) -> tuple[GatheredConv2d, nn.Conv2d]:
    """The layer, and a dense one with the same weights."""
    arguments, lists = LAYERS[name]
    dense = nn.Conv2d(12, 12, **arguments)
    layer = kind(12, 12, **arguments, channels=lists)
    layer.load_state_dict(dense.state_dict())
    return layer, dense


def _oracle(dense: nn.Conv2d, x: Tensor, lists: ChannelLists) -> Tensor:
    """The dense layer on inputs that are zero in channels that are not read; then the channels written."""
    if lists.in_index is not None:
        on = torch.zeros(dense.in_channels, dtype=x.dtype)
        on[lists.in_index.long()] = 1
        x = x * on[:, None, None]
    y = dense(x)
    return y if lists.out_index is None else y[:, lists.out_index.long()]


def _close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients(name: str, training: bool) -> None:
    layer, dense = _layer(name)
    layer.train(training)
    x = torch.randn(2, 12, 9, 7, requires_grad=True)
    expected = _oracle(dense, x, layer.channels)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    wanted, x.grad = x.grad, None

    actual = layer(x)
    actual.backward(grad)
    _close(actual, expected)
    _close(x.grad, wanted)
    _close(layer.weight.grad, dense.weight.grad)
    if layer.bias is not None:
        _close(layer.bias.grad, dense.bias.grad)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", LAYERS)
def test_masked_layer_has_full_width_and_zeros(name: str, memory_format: torch.memory_format) -> None:
    layer, dense = _layer(name, MaskedConv2d)
    lists = layer.channels
    x = torch.randn(2, 12, 9, 7).to(memory_format=memory_format).requires_grad_()
    compact = _oracle(dense, x, lists)
    if lists.out_index is None:
        expected = compact
    else:
        expected = torch.zeros(2, 12, *compact.shape[2:]).index_add(1, lists.out_index, compact)
    grad = torch.randn_like(expected)
    wanted_x, wanted_w = torch.autograd.grad(expected, (x, dense.weight), grad)

    actual = layer(x)
    actual.backward(grad)
    _close(actual, expected)
    _close(x.grad, wanted_x)
    _close(layer.weight.grad, wanted_w)
    assert actual.is_contiguous(memory_format=memory_format)
    if lists.out_index is not None:
        off = torch.ones(12, dtype=torch.bool)
        off[lists.out_index.long()] = False
        assert actual[:, off].eq(0).all()


@pytest.mark.parametrize("kind", [GatheredConv2d, MaskedConv2d])
def test_input_without_a_batch_axis(kind: type[GatheredConv2d]) -> None:
    layer, _ = _layer("3x2", kind)
    x = torch.randn(12, 9, 7)
    assert torch.equal(layer(x), layer(x[None])[0])


def test_nan_in_unlisted_channels_changes_nothing() -> None:
    layer, _ = _layer("3x3")
    x = torch.randn(2, 12, 9, 7)
    expected = layer(x)
    x[:, [1, 2, 5, 6, 8, 9, 10]] = float("nan")
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize(("groups", "out"), [(2, 12), (12, 24), (3, 12)])
def test_unsupported_groups_raise(groups: int, out: int) -> None:
    with pytest.raises(NotImplementedError, match=rf"GatheredConv2d\(\): groups={groups} with 12 -> {out} channels"):
        GatheredConv2d(12, out, 3, groups=groups)


def test_lists_out_of_range_raise() -> None:
    with pytest.raises(IndexError, match="got 12"):
        GatheredConv2d(12, 4, 3, channels=ChannelLists([12]))
    with pytest.raises(ValueError, match="depthwise"):
        MaskedConv2d(12, 12, 3, groups=12, channels=ChannelLists([1]))


@pytest.mark.parametrize("kind", [GatheredConv2d, MaskedConv2d])
def test_from_conv2d_shares_parameters(kind: type[GatheredConv2d]) -> None:
    conv = nn.Conv2d(12, 12, (3, 2), stride=(2, 1), padding=(1, 0), dtype=torch.float64).eval()
    conv.weight.requires_grad_(False)
    layer = kind.from_conv2d(conv, LISTS)
    assert type(layer) is kind
    assert layer.weight is conv.weight
    assert layer.bias is conv.bias
    assert not layer.training
    assert layer.channels == LISTS
    x = torch.randn(2, 12, 9, 7, dtype=torch.float64)
    _close(kind.from_conv2d(conv)(x), conv(x))
    # The old layer keeps its own tables.
    conv.bias = None
    assert layer.bias is not None


def test_from_conv2d_of_a_gathered_layer_takes_its_lists() -> None:
    layer = GatheredConv2d(12, 12, 1)
    layer.attach({"a": LISTS, "b": ChannelLists([1])})
    layer.set_domain("a")
    masked = MaskedConv2d.from_conv2d(layer)
    assert masked.channels == LISTS
    masked.set_domain("b")
    assert masked.channels == ChannelLists([1])
    assert layer.channels == LISTS


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (lambda: nn.Conv2d(12, 12, 3, groups=3), "groups=3"),
        (lambda: nn.LazyConv2d(12, 3), "LazyConv2d is a subclass"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(12, 12, 3)), "parametrized"),
        (lambda: nn.utils.spectral_norm(nn.Conv2d(12, 12, 3)), "its weight is computed by a hook"),
        (lambda: nn.Linear(12, 12), r"Linear is no torch.nn.Conv2d"),
    ],
    ids=["groups", "lazy", "weight_norm", "spectral_norm", "linear"],
)
def test_from_conv2d_errors(conv: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(NotImplementedError, match=reason):
        GatheredConv2d.from_conv2d(conv())


def test_hooks_move_along_and_can_be_removed() -> None:
    conv = nn.Conv2d(12, 12, 1)
    seen = []
    handle = conv.register_forward_hook(lambda module, inputs, output: seen.append(type(module)))
    layer = GatheredConv2d.from_conv2d(conv)
    layer(torch.randn(1, 12, 2, 2))
    assert seen == [GatheredConv2d]
    handle.remove()
    layer(torch.randn(1, 12, 2, 2))
    assert seen == [GatheredConv2d]


def test_compiled_layers_are_swapped_too() -> None:
    conv = nn.Conv2d(12, 12, 1)
    conv.compile(backend="eager")
    layer = GatheredConv2d.from_conv2d(conv, ChannelLists(None, [1]))
    assert layer(torch.randn(1, 12, 2, 2)).shape == (1, 1, 2, 2)


def test_attach_and_set_domain() -> None:
    layer = GatheredConv2d(12, 12, 1)
    layer.attach({"a": LISTS, "b": ChannelLists([1])})
    assert layer.channels == ChannelLists()
    layer.set_domain("a")
    assert layer.channels is layer.lists["a"]
    layer.set_domain(None)
    assert layer.channels == ChannelLists()
    with pytest.raises(ValueError, match=r"`name` to be one of \['a', 'b'\], got 'c'"):
        layer.set_domain("c")
    with pytest.raises(IndexError, match="got 12"):
        layer.attach({"c": ChannelLists([12])})
    assert list(layer.lists) == ["a", "b"]


def test_state_has_the_keys_of_a_dense_layer() -> None:
    layer, dense = _layer("3x3")
    layer.attach({"a": LISTS})
    assert list(layer.state_dict()) == list(dense.state_dict()) == ["weight", "bias"]
    assert list(dict(layer.named_buffers())) == []


def test_state_through_a_file() -> None:
    layer, dense = _layer("3x3")
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = nn.Conv2d(12, 12, 3, padding=1)
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(fresh.weight, dense.weight)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_compute_the_same_and_are_independent(duplicate: Callable[[nn.Module], GatheredConv2d]) -> None:
    layer, _ = _layer("3x3")
    layer.attach({"a": LISTS, "b": ChannelLists([1])})
    layer.set_domain("a")
    other = duplicate(layer.eval())
    x = torch.randn(2, 12, 9, 7)
    assert torch.equal(other(x), layer(x))
    other.set_domain("b")
    assert layer.channels == LISTS
    assert other.lists == layer.lists
    before = layer(x)
    with torch.no_grad():
        other.weight.zero_()
    assert torch.equal(layer(x), before)


def test_dtype_changes_leave_the_lists_alone() -> None:
    layer, dense = _layer("3x3")
    x = torch.randn(2, 12, 9, 7)
    _close(layer.double()(x.double()), _oracle(dense.double(), x.double(), LISTS))
    assert layer.channels.in_index.dtype == torch.int32
    assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    assert layer.channels.in_index.dtype == torch.int32


def test_meta_device_gives_shapes_and_comes_back() -> None:
    layer, dense = _layer("3x2")
    layer.attach({"a": LISTS})
    layer.set_domain("a")
    state = copy.deepcopy(layer.state_dict())
    layer.to("meta")
    assert layer.channels.in_index.is_meta
    assert layer.channels is layer.lists["a"]
    y = layer(torch.empty(2, 12, 9, 7, device="meta"))
    assert y.is_meta
    assert y.shape == (2, 3, 5, 6)
    layer.to_empty(device="cpu").load_state_dict(state)
    assert layer.channels is layer.lists["a"]
    x = torch.randn(2, 12, 9, 7)
    _close(layer(x), _oracle(dense, x, LISTS))


def test_built_on_the_meta_device() -> None:
    layer = MaskedConv2d(12, 12, 3, device="meta", channels=LISTS)
    assert layer.channels.out_index.is_meta
    assert layer(torch.empty(2, 12, 9, 7, device="meta")).shape == (2, 12, 7, 5)


@pytest.mark.gpu
def test_lists_follow_to_the_gpu() -> None:
    layer, dense = _layer("3x3")
    x = torch.randn(2, 12, 9, 7)
    assert layer.cuda().channels.in_index.is_cuda
    _close(layer(x.cuda()).cpu(), _oracle(dense, x, LISTS))
    assert pickle.loads(pickle.dumps(layer)).channels.in_index.is_cuda


def test_repr() -> None:
    assert repr(GatheredConv2d(12, 4, 1, channels=ChannelLists([1], [0, 2]))) == (
        "GatheredConv2d(12, 4, kernel_size=(1, 1), stride=(1, 1), reads 1/12, writes 2/4)"
    )
    assert repr(MaskedConv2d(12, 4, 1)) == "MaskedConv2d(12, 4, kernel_size=(1, 1), stride=(1, 1))"


def test_padding_changed_afterwards_counts() -> None:
    layer, dense = _layer("3x3")
    layer.padding = dense.padding = (2, 2)
    x = torch.randn(2, 12, 9, 7)
    _close(layer(x), _oracle(dense, x, LISTS))


def test_modes_and_subclasses_see_the_operator() -> None:
    operator, seen = torch.ops.bap_kernels.gathered_conv2d.default, []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    class Images(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    layer, _ = _layer("3x3")
    x = torch.randn(2, 12, 6, 5)
    with torch.no_grad():
        expected = layer(x)
        with Mode():
            assert torch.equal(layer(x), expected)
        assert seen.count(operator) == 1
        result = layer(x.as_subclass(Images))
    assert seen.count(operator) == 2
    assert type(result) is Images
    assert torch.equal(result.as_subclass(Tensor), expected)


@pytest.mark.parametrize("padding", [1, "same", [1, 1], (1, 1)])
def test_padding_set_by_hand(padding: object) -> None:
    layer, _ = _layer("3x3")
    x = torch.randn(2, 12, 6, 5)
    expected = layer(x)
    layer.padding = padding
    assert torch.equal(layer(x), expected)
    layer.padding = (1, 1, 1)
    with pytest.raises(ValueError, match="padding"):
        layer(x)
