"""Families ``x/<behaviour>/float32`` that misbehave on purpose, as the cases of a verifier's child."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bap_kernels.verify.exercise import Step, exercise

INPUT = torch.arange(24, dtype=torch.float32).view(2, 3, 4)
BEHAVIOURS: dict[str, Callable[[Tensor], Tensor]] = {}
_calls = 0
_noted = False


class Check:
    def __init__(self, behaviour: str) -> None:
        self.text, self.run_op = behaviour, BEHAVIOURS[behaviour]

    def run(self, device, step: Step) -> None:
        def call(x: Tensor) -> Sequence[Tensor]:
            global _calls
            _calls += 1
            return [self.run_op(x)]

        def compare(results: Sequence[Tensor]) -> None:
            torch.testing.assert_close(results[0], INPUT * 2)

        exercise(call, (INPUT,), compare, device, step)


def checks(family: str, device: object) -> Iterator[Check]:
    behaviours = json.loads(os.environ.get("TEST_VERIFY_BEHAVIOURS", "{}"))
    behaviour = behaviours.get(family) or family.split("/")[1]
    # A right case first: where a family fails later, the place is named.
    yield Check("right")
    if behaviour == "caseless":
        raise RuntimeError("the cases cannot be made")
    yield Check(behaviour)


def no_checks(family: str, device: object) -> list[Check]:
    return []


def behaviour(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    BEHAVIOURS[run.__name__] = run
    return run


@behaviour
def right(x: Tensor) -> Tensor:
    return torch.empty_like(x).copy_(x * 2)


@behaviour
def wrong(x: Tensor) -> Tensor:
    y = right(x)
    y[1, 2, 3] += 1
    return y


@behaviour
def unwritten(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y[:, :2] = x[:, :2] * 2
    return y


@behaviour
def outside(x: Tensor) -> Tensor:
    # A result that is right, and an element behind its memory.
    y = right(x)
    torch.as_strided(y, (1,), (1,), y.storage_offset() + y.numel())[0] = 3.0
    return y


@behaviour
def into_input(x: Tensor) -> Tensor:
    y = right(x)
    x[0, 0, 0] += 1
    return y


@behaviour
def reads_outside(x: Tensor) -> Tensor:
    y = right(x)
    y[0, 0, 0] += 0 * torch.as_strided(x, (1,), (1,), x.storage_offset() - 1)[0]
    return y


@behaviour
def varying(x: Tensor) -> Tensor:
    # Within every tolerance, from its third call on.
    return right(x) * (1 + 2.0**-22 * (_calls > 6))


@behaviour
def crash(x: Tensor) -> Tensor:
    ctypes.string_at(8)
    return x


@behaviour
def abort(x: Tensor) -> Tensor:
    print("an assertion of the driver failed", flush=True)
    os.abort()


@behaviour
def exits(x: Tensor) -> Tensor:
    os._exit(3)


@behaviour
def killed(x: Tensor) -> Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    return x


@behaviour
def hang(x: Tensor) -> Tensor:
    # With a process of its own, as a compiler would be.
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(10**6)"])
    if folder := os.environ.get("TEST_VERIFY_FOLDER"):
        # As a whole: a test waits for it.
        Path(folder, "grandchild.new").write_text(str(child.pid))
        Path(folder, "grandchild.new").rename(Path(folder, "grandchild"))
    while True:
        time.sleep(1000)


@behaviour
def no_memory(x: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")


@behaviour
def no_host_memory(x: Tensor) -> Tensor:
    raise MemoryError


@behaviour
def raising(x: Tensor) -> Tensor:
    raise RuntimeError("out of resource: shared memory, Required: 300000, Hardware limit: 232448")


@behaviour
def declining(x: Tensor) -> Tensor:
    raise NotImplementedError("gathered_conv2d(): expected a call that backend `triton` can run")


@behaviour
def counted(x: Tensor) -> Tensor:
    global _noted
    if not _noted:
        _noted = True
        with Path(os.environ["TEST_VERIFY_FOLDER"], "counted").open("a") as stream:
            stream.write(f"{os.getpid()}\n")
    return right(x)


@behaviour
def sticky(x: Tensor) -> Tensor:
    return right(x)
