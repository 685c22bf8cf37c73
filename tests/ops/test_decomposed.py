"""Higher derivatives and torch.func transforms, against ``F.conv2d`` on the listed channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import bap_kernels as bk
from bap_kernels import ChannelLists
from bap_kernels.nn import GatheredConv2d, MaskedConv2d, SwitchedConv2d

DOUBLE = torch.float64
READ, KEPT = [1, 4, 2], [3, 0]
SWITCH = torch.tensor([1, 0, 1, 1, 0, 1], dtype=DOUBLE)
Function = Callable[..., Tensor]


def tensors(depthwise: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 6, 5, 4), (6, 1, 3, 2) if depthwise else (4, 6, 3, 2), (6 if depthwise else 4,)]
    x, w, b = (torch.randn(shape, dtype=DOUBLE, generator=generator) for shape in shapes)
    return x, w, b


def listed(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    lists = [torch.tensor(i, dtype=torch.int32) for i in (READ, KEPT)]
    return torch.ops.bap_kernels.gathered_conv2d(x, w, b, *lists, (2, 1), (1, 0, 2, 1), (1, 2), 1)


def listed_by_torch(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.conv2d(F.pad(x[:, READ], (2, 1, 1, 0)), w[KEPT][:, READ], b[KEPT], (2, 1), 0, (1, 2))


def depthwise(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    kept = torch.tensor(READ, dtype=torch.int32)
    return bk.gathered_conv2d(x, w, b, kept, kept, padding=1, groups=6)


def depthwise_by_torch(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.conv2d(x[:, READ], w[READ], b[READ], padding=1, groups=len(READ))


def nothing_read(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return bk.gathered_conv2d(x, w, b, torch.tensor([], dtype=torch.int32), padding=1)


def nothing_read_by_torch(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.conv2d(x * 0, w, b, padding=1)


def switched(x: Tensor, w: Tensor, b: Tensor, s: Tensor) -> Tensor:
    return bk.switched_conv2d(x, w, b, s, padding=1)


def switched_by_torch(x: Tensor, w: Tensor, b: Tensor, s: Tensor) -> Tensor:
    return F.conv2d(x * s.view(1, -1, 1, 1), w, b, padding=1)


def cases() -> dict[str, tuple[Function, Function, tuple[Tensor, ...]]]:
    return {
        "listed": (listed, listed_by_torch, tensors()),
        "depthwise": (depthwise, depthwise_by_torch, tensors(depthwise=True)),
        "nothing_read": (nothing_read, nothing_read_by_torch, tensors()),
        "switched": (switched, switched_by_torch, (*tensors(), SWITCH)),
        "switched_depthwise": (
            lambda x, w, b, s: bk.switched_conv2d(x, w, b, s, padding=1, groups=6),
            lambda x, w, b, s: F.conv2d(x * s.view(1, -1, 1, 1), w, b, padding=1, groups=6),
            (*tensors(depthwise=True), SWITCH),
        ),
    }


def directions(args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(t.shape, dtype=t.dtype, generator=generator) for t in args)


def by_duals(f: Function, args: tuple[Tensor, ...]) -> Tensor:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, d) for t, d in zip(args, directions(args), strict=True)]
        return forward_ad.unpack_dual(f(*duals)).tangent


def by_sample(f: Function, args: tuple[Tensor, ...]) -> Any:
    def loss(x: Tensor, *rest: Tensor) -> Tensor:
        return f(x[None], *rest).square().sum()

    every = tuple(range(len(args)))
    return vmap(grad(loss, every), (0, *[None] * (len(args) - 1)))(*args)


TRANSFORMS: dict[str, Callable[[Function, tuple[Tensor, ...]], Any]] = {
    "jvp": lambda f, args: jvp(f, args, directions(args)),
    "duals": by_duals,
    "linearize": lambda f, args: linearize(f, *args)[1](*directions(args)),
    "grad": lambda f, args: grad(lambda *a: f(*a).square().sum(), tuple(range(len(args))))(*args),
    "vjp": lambda f, args: vjp(f, *args)[1](torch.ones_like(f(*args))),
    "jacrev": lambda f, args: jacrev(f, tuple(range(len(args))))(*args),
    "jacfwd": lambda f, args: jacfwd(f, tuple(range(len(args))))(*args),
    "hessian": lambda f, args: hessian(lambda w: f(args[0], w, *args[2:]).pow(3).sum())(args[1]),
    "vmap": lambda f, args: vmap(lambda x: f(x[None], *args[1:]))(args[0]),
    "vmap_of_weights": lambda f, args: vmap(lambda w: f(args[0], w, *args[2:]))(torch.stack([args[1], -2 * args[1]])),
    "gradients_by_sample": by_sample,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("case", cases())
def test_func_transforms_equal_pytorch(case: str, transform: str) -> None:
    ours, pytorch, args = cases()[case]
    torch.testing.assert_close(TRANSFORMS[transform](ours, args), TRANSFORMS[transform](pytorch, args))


@pytest.mark.parametrize("case", cases())
def test_second_derivatives_equal_pytorch(case: str) -> None:
    ours, pytorch, args = cases()[case]

    def second(f: Function) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in args]
        first = torch.autograd.grad(f(*leaves).pow(3).sum(), leaves, create_graph=True, materialize_grads=True)
        return torch.autograd.grad(sum((g * g).sum() for g in first), leaves, materialize_grads=True)

    torch.testing.assert_close(second(ours), second(pytorch))


@pytest.mark.parametrize("case", ["listed", "switched"])
def test_gradgradcheck(case: str) -> None:
    ours, _, args = cases()[case]
    fixed = args[3:]
    leaves = [t[:1, :, :3] if t.dim() == 4 and t.shape[0] == 2 else t for t in args[:3]]
    leaves = [t.clone().requires_grad_() for t in leaves]
    assert torch.autograd.gradgradcheck(lambda *a: ours(*a, *fixed), leaves)
    assert torch.autograd.gradcheck(lambda *a: ours(*a, *fixed), leaves, check_forward_ad=True)


@pytest.mark.parametrize("off_gradient", [True, False])
def test_off_gradient_option_holds_in_transforms(off_gradient: bool) -> None:
    x, w, b = tensors()

    def loss(s: Tensor) -> Tensor:
        return bk.switched_conv2d(x, w, b, s, padding=1, off_gradient=off_gradient).square().sum()

    s = SWITCH.clone().requires_grad_()
    loss(s).backward()
    torch.testing.assert_close(grad(loss)(SWITCH), s.grad)


@pytest.mark.parametrize("case", ["listed", "depthwise", "switched"])
def test_nan_in_unlisted_channels_is_ignored(case: str) -> None:
    ours, _, args = cases()[case]
    spoiled = args[0].clone()
    off = [c for c in range(6) if c not in READ] if case != "switched" else [1, 4]
    spoiled[:, off] = float("nan")
    tangents = (*directions(args)[:3], *(torch.zeros_like(t) for t in args[3:]))
    for clean, result in zip(jvp(ours, args, tangents), jvp(ours, (spoiled, *args[1:]), tangents), strict=True):
        torch.testing.assert_close(result, clean)
    weights = grad(lambda *a: ours(*a).square().sum(), (0, 1, 2))
    for clean, result in zip(weights(*args), weights(spoiled, *args[1:]), strict=True):
        torch.testing.assert_close(result, clean)


@pytest.mark.parametrize("layer", ["gathered", "masked", "switched"])
def test_per_sample_gradients_of_layers_equal_pytorch(layer: str) -> None:
    x = tensors()[0].float()
    torch.manual_seed(0)
    module: nn.Conv2d
    if layer == "switched":
        module = SwitchedConv2d(6, 4, 3, padding=1, domains=["a"])
        module.set_domain("a")
        with torch.no_grad():
            module.domains["a"].score[[0, 3]] = 0
        off, kept = [0, 3], list(range(4))
    else:
        kind = GatheredConv2d if layer == "gathered" else MaskedConv2d
        module = kind(6, 4, 3, padding=1, channels=ChannelLists(sorted(READ), sorted(KEPT)))
        off, kept = [c for c in range(6) if c not in READ], sorted(KEPT)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def ours(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, parameters, (x[None],)).square().sum()

    def theirs(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        mask = torch.ones(6).index_fill(0, torch.tensor(off), 0)
        y = F.conv2d(x[None] * mask.view(1, -1, 1, 1), parameters["weight"], parameters["bias"], padding=1)
        return y[:, kept].square().sum()

    result = vmap(grad(ours), (None, 0))(parameters, x)
    expected = vmap(grad(theirs), (None, 0))(parameters, x)
    for name in ("weight", "bias"):
        torch.testing.assert_close(result[name], expected[name], rtol=1e-4, atol=1e-4)
    direction = {name: torch.ones_like(p) for name, p in parameters.items() if name in ("weight", "bias")}

    def only(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda part: f({**parameters, **part}, x[0])

    point = {name: parameters[name] for name in direction}
    for a, b in zip(jvp(only(ours), (point,), (direction,)), jvp(only(theirs), (point,), (direction,)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_invalid_lists_raise_in_transforms() -> None:
    x, w, b = tensors()
    for bad, error in (([0, 6], IndexError), ([2, 2], ValueError)):
        index = torch.tensor(bad, dtype=torch.int32)
        with pytest.raises(error, match=r"gathered_conv2d\(\): expected `in_index`"):
            grad(lambda x: bk.gathered_conv2d(x, w, b, index).sum())(x)  # noqa: B023
    with pytest.raises(ValueError, match=r"switched_conv2d\(\): expected `switch` to hold zeros and ones"):
        grad(lambda x: bk.switched_conv2d(x, w, b, SWITCH / 2).sum())(x)
    with pytest.raises(TypeError, match="int32"):
        grad(lambda x: bk.gathered_conv2d(x, w, b, torch.tensor([0])).sum())(x)


def test_vmap_over_lists_raises() -> None:
    x, w, b = tensors()
    lists = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match=r"gathered_conv2d\(\): expected `in_index` to be one list.*Hint"):
        vmap(lambda x, i: bk.gathered_conv2d(x[None], w, b, i))(x, lists)


def test_inference_ops_raise_in_transforms() -> None:
    x, w, b = tensors()
    fused = torch.ops.bap_kernels._gathered_conv2d_fused
    nothing = (None, None, False, None, None, None, False)
    mixed = torch.ops.bap_kernels._gathered_conv2d_mixed
    for name, call in {
        "_gathered_conv2d_fused": lambda x: fused(x, w, b, None, None, (1, 1), (0,) * 4, (1, 1), 1, *nothing),
        "_gathered_conv2d_mixed": lambda x: mixed(x, w, b, [None], [2], (1, 1), (0,) * 4, (1, 1)),
    }.items():
        for transform in (lambda f: grad(lambda x: f(x).sum())(x), lambda f: jvp(f, (x,), (x,))):
            with pytest.raises(NotImplementedError, match=rf"{name}\(\): expected a call outside torch.func.*Hint"):
                transform(call)
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=rf"{name}\(\)"):
            call(forward_ad.make_dual(x, x))


def test_narrow_bfloat16_convolution_is_right_in_transforms() -> None:
    # PyTorch's own kernels return uninitialised values for it: see csrc/backends/aten/convolution.h.
    torch.manual_seed(0)
    x = torch.randint(-2, 3, (2, 4, 5, 3)).bfloat16()
    w = torch.randint(-2, 3, (3, 4, 2, 2)).bfloat16()
    result = grad(lambda w: bk.gathered_conv2d(x, w, stride=(1, 2)).float().sum())(w)
    expected = grad(lambda w: F.conv2d(x.double(), w.double(), stride=(1, 2)).sum())(w)
    torch.testing.assert_close(result.double(), expected.double())
