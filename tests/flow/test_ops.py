"""Every row of the table holds for every spelling in it, and calls are looked up as they are written."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bap_kernels.flow import ops
from bap_kernels.flow.ops import (
    Call,
    Rule,
    asks_size,
    binary_rule,
    call_rule,
    is_spatial_slice,
    layer_rule,
    out_of_place,
    passes_input,
    rule_of,
    writes_to_input,
)

# What follows the tensor where a spelling needs more, by its name.
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("MaxPool2d", "max_pool2d", "boolean_dispatch", "AvgPool2d", "avg_pool2d", "pow"), (2,)),
    **dict.fromkeys(("AvgPool2dSame", "MaxPool2dSame"), (2, 2)),
    **dict.fromkeys(("AdaptiveAvgPool2d", "adaptive_avg_pool2d", "AdaptiveMaxPool2d", "adaptive_max_pool2d"), (3,)),
    **dict.fromkeys(("LPPool2d", "lp_pool2d"), (2, 2)),
    **dict.fromkeys(("ZeroPad2d", "ReflectionPad2d", "ReplicationPad2d", "CircularPad2d"), (1,)),
    **dict.fromkeys(("Upsample", "interpolate"), (None, 2)),
    **dict.fromkeys(("UpsamplingNearest2d", "UpsamplingBilinear2d"), (12,)),
    "clamp": (0.6, 1.1),
    **dict.fromkeys(("clamp_min", "clamp_max", "rsub"), (0.9,)),
}
POOLINGS = {F.max_pool2d: "max_pool2d", F.adaptive_max_pool2d: "adaptive_max_pool2d"}


def name_of(spelling: Any) -> str:
    return spelling if isinstance(spelling, str) else POOLINGS.get(spelling) or spelling.__name__


def function_of(spelling: Any) -> Callable[[Tensor], Tensor] | None:
    arguments = ARGUMENTS.get(name_of(spelling).rpartition(".")[2], ())
    if isinstance(spelling, type):
        return spelling(*arguments).eval()
    if isinstance(spelling, str) and "." in spelling:
        module, _, name = spelling.rpartition(".")
        return getattr(pytest.importorskip(module), name)(*arguments)
    return Call(spelling, arguments)


def spellings(*kinds: str) -> list[Any]:
    rows = [(rule, spelling) for rule, row in ops._TABLE.items() if rule.kind in kinds for spelling in row]
    return [pytest.param(*row, id=f"{name_of(row[1])}-{type(row[1]).__name__}") for row in rows]


@pytest.mark.parametrize(("rule", "spelling"), spellings("elementwise", "spatial"))
def test_every_spelling_does_what_its_rule_says(rule: Rule, spelling: Any) -> None:
    function = function_of(spelling)
    x = torch.rand(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) + 0.5
    y = function(x.clone())
    changed = x.clone()
    changed[1, 2, 3, 4] += 1.5
    differs = (function(changed.clone()) != y).nonzero()
    assert len(differs) or name_of(spelling) in ("clamp", "clamp_min", "clamp_max", "Hardtanh", "hardtanh")
    channels = {(n, c) for n, c, _, _ in differs.tolist()}
    assert channels <= {(1, 2)}
    if rule.kind == "elementwise":
        assert differs.tolist() in ([], [[1, 2, 3, 4]])
    else:
        assert not function(torch.zeros_like(x)).any()


@pytest.mark.parametrize(("rule", "spelling"), spellings("elementwise", "spatial"))
def test_steady_rules_pass_gradients_of_zeros_as_zeros(rule: Rule, spelling: Any) -> None:
    function = function_of(spelling)
    # Zeros, ones and numbers between and beyond, of both signs.
    x = torch.linspace(-4, 4, 2 * 4 * 8 * 8).reshape(2, 4, 8, 8)
    x[0, 0] = 0
    x[0, 1, ::2] = -1
    x = x.requires_grad_()
    y = function(x)
    if rule.steady and y.requires_grad:
        (gradient,) = torch.autograd.grad(y, x, torch.zeros_like(y))
        assert torch.equal(gradient, torch.zeros_like(x))


def test_a_square_root_is_not_steady() -> None:
    x = torch.zeros(1, requires_grad=True)
    (gradient,) = torch.autograd.grad(x.sqrt(), x, torch.zeros(1))
    assert gradient.isnan()
    assert not rule_of("sqrt").steady


@pytest.mark.parametrize(
    ("target", "args", "kwargs", "kind"),
    [
        (F.relu, (), {}, "elementwise"),
        (F.relu, (True,), {}, None),
        ("mean", ((2, 3), True), {}, "reduction"),
        ("mean", ((2, 3),), {}, None),
        ("mean", ((1, 2), True), {}, None),
        (torch.sum, (), {"dim": -1, "keepdim": True}, "reduction"),
        (F.max_pool2d, (2,), {"return_indices": True}, None),
        (F.max_pool2d, (2,), {}, "spatial"),
        (torch.cat, (1,), {}, None),
        (nn.ReLU(), (), {}, None),
        ([], (), {}, None),
    ],
)
def test_calls_that_keep_channels_apart(target: Any, args: Any, kwargs: Any, kind: str | None) -> None:
    rule = call_rule(target, args, kwargs)
    assert (None if rule is None else rule.kind) == kind


def test_layers_that_keep_channels_apart() -> None:
    inplace = nn.ReLU(inplace=True)
    layer, rule = layer_rule(inplace)
    assert (layer.inplace, inplace.inplace, rule.act) == (False, True, "relu")
    pool = nn.MaxPool2d(2)
    assert layer_rule(pool) == (pool, Rule("spatial"))
    assert layer_rule(nn.MaxPool2d(2, return_indices=True)) is None
    assert layer_rule(nn.PReLU(4)) is None
    assert layer_rule(nn.PReLU())[1] == Rule("spatial")
    assert layer_rule(type("Other", (nn.ReLU,), {})()) is None


def test_binary_calls_take_two_tensors_and_nothing_else() -> None:
    assert binary_rule(operator.add, (), {}).act == "add"
    assert binary_rule("mul", (), {}).kind == "binary"
    assert binary_rule(torch.add, (), {"alpha": 2}) is None
    assert binary_rule(F.relu, (), {}) is None


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        (operator.iadd, operator.add),
        (operator.ifloordiv, operator.floordiv),
        (torch.relu_, torch.relu),
        (F.leaky_relu_, F.leaky_relu),
        (torch.clamp_, torch.clamp),
        ("add_", "add"),
    ],
)
def test_what_writes_to_its_input_is_looked_up_without_writing(written: Any, plain: Any) -> None:
    assert writes_to_input(written, {})
    assert not writes_to_input(plain, {})
    assert out_of_place(written, {})[0] == plain
    assert out_of_place(plain, {"inplace": True}) == (plain, {} if callable(plain) else {"inplace": True})


def test_special_methods_do_not_write() -> None:
    assert not writes_to_input("__add__", {})
    assert out_of_place("__add__", {})[0] == "__add__"
    assert writes_to_input(F.relu, {"inplace": True})
    assert writes_to_input(nn.ReLU(inplace=True), {})


def test_dropout_passes_its_input_in_eval_mode() -> None:
    assert passes_input(nn.Dropout(0.5), (), {})
    assert passes_input(F.dropout, (0.5, False), {})
    assert passes_input(F.dropout, (), {"training": False})
    assert not passes_input(F.dropout, (0.5,), {})
    assert not passes_input(nn.ReLU(), (), {})


def test_sizes_and_slices() -> None:
    assert asks_size("size", (1,))
    assert asks_size(getattr, ("shape",))
    assert not asks_size(getattr, ("grad",))
    assert not asks_size("size", (1, 2))
    whole = slice(None)
    assert is_spatial_slice(operator.getitem, ((whole, whole, slice(None, None, 2)),))
    assert not is_spatial_slice(operator.getitem, ((whole, slice(0, 2)),))
