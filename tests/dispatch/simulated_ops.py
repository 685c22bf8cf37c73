"""A call of each op for `auto` on a simulated GPU, where ATen computes in place of the opt-in backends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bap_kernels as bk
from bap_kernels import _C
from tests.simulated_gpu import devices, simulated_gpu

ops = torch.ops.bap_kernels
X, W, B = torch.randn(3, 12, 7, 6), torch.randn(10, 12, 3, 3), torch.randn(10)
DY = torch.randn(3, 10, 7, 6)
IN, OUT = torch.tensor([0, 3, 4, 9], dtype=torch.int32), torch.tensor([1, 2, 8], dtype=torch.int32)
SWITCH = torch.tensor([1.0, 0, 1, 1, 0, 0, 1, 0, 1, 1, 0, 1])
GEOMETRY = ([1, 1], [1, 1, 1, 1], [1, 1])
NO_FUSION = (None, None, False, None, None, None, False)


@dataclass(frozen=True)
class Op:
    """One call of an op, and ATen's candidates for it."""

    call: Callable[[], tuple[Tensor, ...]]
    aten: tuple[str, ...]


def single(y: Tensor) -> tuple[Tensor, ...]:
    return (y,)


OPS = {
    "forward": Op(lambda: single(ops.gathered_conv2d(X, W, B, IN, OUT, *GEOMETRY, 1)), ("gather", "masked")),
    "fused": Op(
        lambda: ops._gathered_conv2d_fused(
            *(X, W, B, IN, None, *GEOMETRY, 1, *NO_FUSION), False, None, torch.tensor([4, 0], dtype=torch.int32)
        ),
        ("gather", "masked"),
    ),
    "backward": Op(
        lambda: ops.gathered_conv2d_backward(DY[:, :3], X, W, IN, OUT, *GEOMETRY, 1, [True, True, True]), ("gather",)
    ),
    "switched": Op(lambda: single(ops.switched_conv2d(X, W, B, SWITCH, *GEOMETRY, 1)), ("masked",)),
    "switched backward": Op(
        lambda: ops.switched_conv2d_backward(DY, X, W, SWITCH, *GEOMETRY, 1, True, [True] * 4), ("masked",)
    ),
    "mixed": Op(lambda: single(ops._gathered_conv2d_mixed(X, W, B, [IN, None], [1, 2], *GEOMETRY)), ("gather",)),
}
FAMILIES = {"cuda": ["cuda/pack/tf32", "cuda/nhwc/tf32"], "triton": ["triton/forward/tf32"]}
ALL_OK = {name: ("ok", "") for names in FAMILIES.values() for name in names}
SLOW = {"gather": 3e-4, "masked": 3e-4, "cuda": 3e-4, "triton": 3e-4}


class Gpu:
    """A simulated GPU with verdicts and a clock of its own."""

    def __init__(self) -> None:
        self.number = next(devices)
        _C.set_verdicts(self.number, {})
        self.times = dict(SLOW)
        self.measured: list[str] = []
        self.fails: Callable[[str], None] = lambda name: None
        self.chosen_fails: Callable[[str], None] = lambda name: None

    def verdicts(self, **changes: str) -> None:
        """Everything `ok`, but for families that contain a name."""
        table = dict(ALL_OK)
        for part, verdict in changes.items():
            table |= {name: (verdict, "a reason") for name in table if part in name}
        _C.set_verdicts(self.number, table)

    def seconds(self, name: str) -> float:
        self.measured.append(name)
        self.fails(name)
        return self.times[name]

    def call(self, op: Op, **options: Any) -> list[str]:
        """Checks the results, and returns the names of the candidates that were tried, the last of which computed."""
        expected = aten_result(op)
        ran: list[str] = []

        def chosen(name: str) -> None:
            ran.append(name)
            self.chosen_fails(name)

        with simulated_gpu(
            **{"name": "H200", "seconds": self.seconds, "number": self.number, "families": FAMILIES, "ran": chosen}
            | options
        ):
            results = op.call()
        for got, wanted in zip(results, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        return ran

    def candidates(self) -> set[str]:
        (choice,) = _C.choices()
        return set(choice["candidates"])


def aten_result(op: Op) -> tuple[Tensor, ...]:
    with bk.use_backend("aten"):
        return op.call()


def reload(path: Path) -> None:
    """As in another process."""
    _C.clear_choices()
    _C.set_choice_file(str(path))
