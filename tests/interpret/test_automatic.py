"""`auto` on a simulated GPU with the Triton kernels themselves, in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bap_kernels as bk
from bap_kernels import _C
from bap_kernels.testing import Case, make_tensors
from tests.simulated_gpu import devices, simulated_gpu

pytestmark = pytest.mark.usefixtures("own_choice_table", "no_verifier")

ops = torch.ops.bap_kernels
SAMPLE = make_tensors(Case(in_channels=20, out_channels=18, size=(4, 5), batch=3))
X, W, B, IN, OUT, *GEOMETRY = SAMPLE.args
DY = torch.ones(SAMPLE.output_shape)
SWITCH = (torch.arange(20) % 3 > 0).float()
CALLS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "forward": ("gathered_conv2d", SAMPLE.args),
    "backward": ("gathered_conv2d_backward", (DY, X, W, IN, OUT, *GEOMETRY, [True] * 3)),
    "switched": ("switched_conv2d", (X, W, B, SWITCH, *GEOMETRY)),
    "switched backward": (
        "switched_conv2d_backward",
        (torch.ones(3, 18, *DY.shape[2:]), X, W, SWITCH, *GEOMETRY, True, [True] * 4),
    ),
    "mixed": ("_gathered_conv2d_mixed", (X, W, B, [IN, None], [1, 2], *GEOMETRY[:3])),
}


def seconds(name: str) -> float:
    return 1e-4 if name == "triton" else 3e-4


def tensors(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


@pytest.mark.parametrize("name", CALLS)
def test_auto_runs_verified_kernels(name: str) -> None:
    op, args = CALLS[name]
    device = next(devices)
    table = {family: ("ok", "") for family in _C.call_families(op, args) if family.startswith("triton/")}
    assert table
    with bk.use_backend("aten"):
        wanted = getattr(ops, op)(*args)
    for missing in table:
        _C.set_verdicts(device, {family: verdict for family, verdict in table.items() if family != missing})
        with simulated_gpu(seconds=seconds, number=device) as ran:
            getattr(ops, op)(*args)
        assert ran[-1] != "triton"
    _C.set_verdicts(device, table)
    with simulated_gpu(seconds=seconds, number=device) as ran:
        got = getattr(ops, op)(*args)
    assert ran == ["triton"]
    for one, other in zip(tensors(got), tensors(wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_error_of_a_python_kernel_does_not_reach_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    from bap_kernels.triton import private_ops

    def fail(*args: Any) -> None:
        raise RuntimeError("out of resources: shared memory")

    op, args = CALLS["forward"]
    device = next(devices)
    _C.set_verdicts(device, dict.fromkeys(_C.call_families(op, args), ("ok", "")))
    with simulated_gpu(seconds=seconds, number=device) as ran:
        getattr(ops, op)(*args)
        assert ran == ["triton"]
        monkeypatch.setattr(private_ops, "gathered_conv2d", fail)
        y = getattr(ops, op)(*args)
        assert ran == ["triton", "triton", "gather"]
        _C.clear_choices()
        getattr(ops, op)(*args)
        assert ran[3:] == ["gather"]
    with bk.use_backend("aten"):
        torch.testing.assert_close(y, getattr(ops, op)(*args), rtol=1e-3, atol=1e-3)
