"""The switched convolution under autograd, opcheck, autocast, torch.compile and flop counting."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import bap_kernels as bk
from bap_kernels import reference
from bap_kernels.testing import LAYOUTS, Case, assert_close
from bap_kernels.testing_switched import (
    SwitchedSample,
    assert_gradients,
    expected_gradients,
    make_switched,
    poison_switched,
    run_switched,
)

op = torch.ops.bap_kernels.switched_conv2d
backward_op = torch.ops.bap_kernels.switched_conv2d_backward
BASE = Case(in_channels=9, out_channels=7, size=(8, 9))
SMALL = Case(in_channels=5, out_channels=4, size=(5, 6))
SAMPLES = {
    "some_on": SMALL,
    "all_on": SMALL.but(in_list="null", bias=False),
    "none_on": SMALL.but(in_list="zero"),
    "strided": SMALL.but(kernel=(3, 2), stride=(2, 1), layout="channels_last"),
    "uneven": SMALL.but(padding=(2, 0, 1, 3), dilation=(1, 2)),
    "depthwise": SMALL.but(depthwise=True),
    "bfloat16": SMALL.but(dtype=torch.bfloat16),
    "batch_0": SMALL.but(batch=0),
}
MASKS = list(itertools.product([False, True], repeat=4))


def leaves_of(sample: SwitchedSample, needed: tuple[bool, ...] = (True,) * 4) -> list[torch.Tensor]:
    return [t.requires_grad_(n) for t, n in zip(sample.tensors, needed, strict=True)]


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck_forward(name: str) -> None:
    sample = make_switched(SAMPLES[name])
    torch.library.opcheck(op.default, sample.args)
    for tensor in sample.tensors:
        tensor.requires_grad_()
    torch.library.opcheck(op.default, (*sample.args, False))
    torch.library.opcheck(op.default, sample.args)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("mask", [(True,) * 4, (False, True, False, True), (True, False, True, False)])
def test_opcheck_backward(name: str, mask: tuple[bool, ...]) -> None:
    sample = make_switched(SAMPLES[name])
    grad = torch.randn(sample.output_shape).to(sample.input.dtype)
    for off_gradient in (True, False):
        torch.library.opcheck(backward_op.default, (grad, *sample.backward_args, off_gradient, list(mask)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SAMPLES)
def test_meta_has_metadata_of_real_gradients(name: str, layout: str) -> None:
    sample = make_switched(SAMPLES[name].but(layout=layout, weight_layout=layout))
    grad = torch.randn(sample.output_shape).to(sample.input.dtype)
    for mask in MASKS:
        real = backward_op(grad, *sample.backward_args, True, list(mask))
        meta = backward_op(grad.to("meta"), *sample.to("meta").backward_args, True, list(mask))
        for there, here in zip(meta, real, strict=True):
            assert (there.shape, there.dtype) == (here.shape, here.dtype)
            reaching = [dim for dim, size in enumerate(here.shape) if size > 1 and here.numel() > 0]
            assert [there.stride(dim) for dim in reaching] == [here.stride(dim) for dim in reaching], mask


@pytest.mark.parametrize("name", ["some_on", "none_on", "strided", "uneven", "depthwise"])
def test_gradcheck(name: str) -> None:
    # The switch must be 0 or 1, so its gradient is compared with autograd of a product.
    sample = make_switched(SAMPLES[name].but(batch=1, dtype=torch.float64))
    inputs = [t.contiguous().requires_grad_() for t in sample.tensors[:3]]
    assert torch.autograd.gradcheck(lambda *tensors: op(*tensors, *sample.args[3:]), inputs)
    for k in range(3):
        only = [t.detach().requires_grad_(i == k) for i, t in enumerate(inputs)]
        assert torch.autograd.gradcheck(lambda *tensors: op(*tensors, *sample.args[3:]), only)


@pytest.mark.parametrize("name", ["some_on", "uneven", "strided", "depthwise"])
def test_switch_gradient_equals_derivative_of_real_valued_switch(name: str) -> None:
    # The convolution is linear in each switch: finite differences are exact up to rounding.
    sample = make_switched(SAMPLES[name].but(dtype=torch.float64), torch.float64)
    grad = torch.randn(sample.output_shape, dtype=torch.float64)
    for c in range(len(sample.switch)):
        values = []
        for value in (0.0, 1.0):
            switch = sample.switch.clone()
            switch[c] = value
            values.append((op(*sample.args[:3], switch, *sample.args[4:]) * grad).sum())
        ds = backward_op(grad, *sample.backward_args, True, [False, False, False, True])[3]
        torch.testing.assert_close(ds[c], values[1] - values[0])


@pytest.mark.parametrize("off_gradient", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_backward_computes_requested_gradients_only(mask: tuple[bool, ...], off_gradient: bool) -> None:
    for case in (BASE, BASE.but(depthwise=True), BASE.but(in_list="zero"), BASE.but(in_list="null"), BASE.but(batch=0)):
        sample = make_switched(case)
        leaves = leaves_of(sample, mask)
        y = op(*sample.args, off_gradient)
        assert y.requires_grad == any(mask)
        grad = torch.randn_like(y)
        expected = expected_gradients(sample, grad, off_gradient)
        if any(mask):
            y.backward(grad)
        detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in sample.backward_args]
        direct = backward_op(grad, *detached, off_gradient, list(mask))
        for leaf, exact, result, needed in zip(leaves, expected, direct, mask, strict=True):
            assert (leaf.grad is not None) == needed
            if needed:
                assert_close(leaf.grad, exact, case.dtype, 9 * 9 * 7 * 150)
                assert torch.equal(result, leaf.grad)
            else:
                assert result.shape == (0,)


def test_missing_bias_does_not_shift_gradients() -> None:
    sample = make_switched(BASE.but(bias=False))
    sample.switch.requires_grad_()
    y = op(*sample.args)
    grad = torch.randn_like(y)
    (result,) = torch.autograd.grad(y, sample.switch, grad)
    assert_close(result, expected_gradients(sample, grad)[-1], torch.float32, 9 * 9 * 7 * 144)


def test_frozen_weight_gets_no_gradient() -> None:
    sample = make_switched(SMALL.but(in_list="odd"))
    leaves_of(sample, (True, False, False, True))
    y = op(*sample.args)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    # Input gradients of channels that are on, switch gradients of channels that are off.
    assert counter.get_total_flops() == 2 * y.numel() * 9 * 5


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "stepped"])
@pytest.mark.parametrize("name", ["some_on", "1x1", "strided", "depthwise", "bfloat16", "none_on", "float64"])
def test_nan_in_off_channels_is_ignored(
    name: str, layout: str, value: float, backend: str, nan_filled_empty: None
) -> None:
    cases = SAMPLES | {"1x1": SMALL.but(kernel=(1, 1), padding=(0,) * 4), "float64": SMALL.but(dtype=torch.float64)}
    case = cases[name].but(layout=layout, in_channels=21)
    clean, sample = make_switched(case), poison_switched(make_switched(case), value)
    leaves = leaves_of(sample)
    for off_gradient in (True, False):
        try:
            y = run_switched(sample, backend, off_gradient)
            assert_close(y, reference.switched_conv2d(*clean.args), case.dtype, sample.depth)
            grad = torch.randn(y.shape).to(y.dtype)
            result = list(torch.autograd.grad(y, leaves, grad))
        except NotImplementedError as error:
            if backend != "native":
                raise
            pytest.skip(str(error))
        expected = list(expected_gradients(clean, grad, off_gradient))
        if off_gradient:
            # An off channel affects only the gradient of its switch.
            assert not result[-1][sample.off].isfinite().any()
            result[-1] = result[-1].masked_fill(sample.off, 0)
            expected[-1] = expected[-1].masked_fill(sample.off, 0)
        assert_gradients(sample, tuple(result), tuple(expected))


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_in_one_channel_does_not_affect_other_switches(layout: str, depthwise: bool) -> None:
    sample = make_switched(SMALL.but(in_channels=21, layout=layout, depthwise=depthwise))
    bad = int(sample.off.nonzero()[0])
    sample.input[:, bad] = torch.nan
    grad = torch.randn(sample.output_shape)
    ds = backward_op(grad, *sample.backward_args, True, [False, False, False, True])[3]
    assert ds.isnan().nonzero().flatten().tolist() == [bad]


@pytest.mark.parametrize("kind", ["odd", "all"])
def test_nan_in_on_channels_reaches_output(kind: str) -> None:
    sample = make_switched(SMALL.but(in_list=kind))
    sample.input[0, int((~sample.off).nonzero()[0]), 2, 3] = torch.nan
    y, expected = op(*sample.args), reference.switched_conv2d(*sample.args)
    assert y.isnan().any()
    assert torch.equal(y.isnan(), expected.isnan())


def test_inference_has_no_graph() -> None:
    sample = make_switched(BASE)
    sample.switch.requires_grad_()
    with torch.no_grad():
        assert op(*sample.args).grad_fn is None
    with torch.inference_mode():
        y = op(*sample.args)
    assert y.is_inference()
    assert_close(y.clone(), reference.switched_conv2d(*sample.args), torch.float32, sample.depth)


@pytest.mark.parametrize("changed", ["input", "weight", "switch"])
def test_backward_after_in_place_change_raises(changed: str) -> None:
    sample = make_switched(BASE)
    sample.bias.requires_grad_()
    y = op(*sample.args)
    with torch.no_grad():
        getattr(sample, changed).mul_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_straight_through_scores_turn_on_again() -> None:
    # Straight-through estimator: threshold forward, identity backward. The brackets keep zeros and ones exact.
    torch.manual_seed(0)
    x, w = torch.randn(8, 4, 6, 6), torch.randn(3, 4, 3, 3)
    target = F.conv2d(x[:, :2], w[:, :2])
    scores = torch.tensor([-0.1, 0.2, 0.3, -0.2], requires_grad=True)
    for _ in range(60):
        switch = (scores.detach() > 0).float() + (scores - scores.detach())
        loss = (bk.switched_conv2d(x, w, None, switch) - target).square().mean()
        (grad,) = torch.autograd.grad(loss, scores)
        scores = (scores - 0.005 * grad).detach().requires_grad_()
    assert (scores > 0).tolist() == [True, True, False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_autocast_casts_all_but_the_switch(dtype: torch.dtype, bias: bool) -> None:
    sample = make_switched(BASE.but(bias=bias))
    leaves = [t.requires_grad_() for t in sample.tensors]
    with torch.autocast("cpu", dtype):
        y = op(*sample.args)
        assert bk.switched_conv2d(*sample.args[:4]).dtype == dtype
    assert y.dtype == dtype
    cast = [None if t is None else t.to(dtype) for t in sample.args[:3]]
    assert torch.equal(y, op(*cast, *sample.args[3:]))
    grad = torch.randn_like(y)
    result = torch.autograd.grad(y, leaves, grad)
    assert [g.dtype for g in result] == [torch.float32] * len(leaves)
    inner = [t.requires_grad_() for t in (*[t.detach() for t in cast if t is not None], sample.switch)]
    again = op(*inner[:2], inner[2] if bias else None, *sample.args[3:])
    for one, its in zip(result, torch.autograd.grad(again, inner, grad), strict=True):
        assert torch.equal(one, its.float())


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    # Graphs do not depend on the backend, and `auto` would measure every shape of these tests.
    with bk.use_backend("aten"):
        yield
    torch._dynamo.reset()


def conv_of(sample: SwitchedSample, off_gradient: bool = True):
    def conv(*tensors: torch.Tensor) -> torch.Tensor:
        x, w, b, s = tensors if len(tensors) == 4 else (*tensors[:2], None, tensors[2])
        return op(x * 1.5, w, b, s, *sample.args[4:], off_gradient).relu()

    return conv


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("name", ["some_on", "all_on", "strided", "depthwise"])
def test_forward_and_backward_compile_into_one_graph(name: str) -> None:
    sample = make_switched(SAMPLES[name])
    leaves, conv = leaves_of(sample, (True,) * len(sample.tensors)), conv_of(sample)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(conv, backend=counter, fullgraph=True)
    # Switches are data: other values do not recompile.
    for number in range(3):
        with torch.no_grad():
            sample.switch.copy_((torch.arange(5) % (number + 1) == 0).float())
        actual, expected = compiled(*leaves), conv(*leaves)
        torch.testing.assert_close(actual, expected)
        grad = torch.randn_like(expected)
        expected_grads = torch.autograd.grad(expected, leaves, grad)
        for one, its in zip(torch.autograd.grad(actual, leaves, grad), expected_grads, strict=True):
            torch.testing.assert_close(one, its)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(("depthwise", "layout"), [(False, "channels_last"), (True, "contiguous")])
def test_inductor_accepts_strides_of_meta_kernels(depthwise: bool, layout: str) -> None:
    # Only Inductor asserts the strides of the Meta kernels, of results and gradients.
    sample = make_switched(SMALL.but(layout=layout, depthwise=depthwise))
    leaves, conv = leaves_of(sample), conv_of(sample)
    actual, expected = torch.compile(conv, fullgraph=True)(*leaves), conv(*leaves)
    torch.testing.assert_close(actual, expected)
    grad = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, leaves, grad)
    for one, its in zip(torch.autograd.grad(actual, leaves, grad), expected_grads, strict=True):
        torch.testing.assert_close(one, its)


def test_export_supports_symbolic_sizes() -> None:
    sample = make_switched(SMALL)

    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor, switch: torch.Tensor) -> torch.Tensor:
            return bk.switched_conv2d(x, sample.weight, None, switch, padding=1)

    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        Module(), (sample.input, sample.switch), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic}, None)
    )
    x, switch = torch.randn(3, 5, 9, 7), torch.tensor([0.0, 1, 1, 0, 1])
    assert torch.equal(program.module()(x, switch), Module()(x, switch))


def test_flops_count_channels_that_are_on() -> None:
    x, w = torch.randn(2, 8, 6, 5), torch.randn(4, 8, 3, 2)
    switch = torch.tensor([1.0, 0, 0, 1, 1, 0, 0, 0])
    each = 2 * (2 * 4 * 4 * 4) * (3 * 2)

    def counted(needed: tuple[bool, bool, bool], off_gradient: bool) -> tuple[int, int]:
        leaves = [t.detach().requires_grad_(n) for t, n in zip((x, w, switch), needed, strict=True)]
        with FlopCounterMode(display=False) as forward:
            y = bk.switched_conv2d(leaves[0], leaves[1], None, leaves[2], off_gradient=off_gradient)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        return forward.get_total_flops(), backward.get_total_flops()

    assert counted((True, True, True), True) == (3 * each, (3 + 3 + 5) * each)
    assert counted((True, True, True), False) == (3 * each, (3 + 3) * each)
    assert counted((True, False, True), True) == (3 * each, (3 + 5) * each)
    assert counted((False, False, True), True) == (3 * each, (3 + 5) * each)
    assert counted((False, False, True), False) == (3 * each, 3 * each)
    assert counted((False, True, False), True) == (3 * each, 3 * each)
    with FlopCounterMode(display=False) as counter:
        bk.switched_conv2d(x, torch.randn(8, 1, 3, 3), None, switch, groups=8)
    assert counter.get_total_flops() == 2 * (2 * 3 * 4 * 3) * 9
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        bk.switched_conv2d(torch.empty(2, 8, 6, 5), torch.empty(4, 8, 3, 2), None, torch.empty(8))
    assert counter.get_total_flops() == 8 * each
    with FlopCounterMode(display=False) as counter:
        bk.switched_conv2d(x.to("meta"), w.to("meta"), None, switch.to("meta"))
    assert counter.get_total_flops() == 8 * each
