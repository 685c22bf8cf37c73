"""Prepared launches: what they hand to the driver, with a stand-in in its place that compiles and drops them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from bap_kernels import _C
from bap_kernels.triton import launch, ops
from bap_kernels.triton.launch_spec import Launch
from tools.launch_overhead import StandIn, calls, stand_in

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled there")


@pytest.fixture
def driver() -> Iterator[StandIn]:
    with stand_in() as made:
        made.keep = True
        yield made


def seen(driver: StandIn) -> list[list[object]]:
    """Grid, stream, function and arguments that the driver was handed; tensors by their memory."""
    launched = [
        [(a.data_ptr(), a.shape) if isinstance(a, torch.Tensor) else a for a in (*each[:6], *each[9:])]
        for each in driver.launched
    ]
    driver.launched.clear()
    return launched


@pytest.mark.parametrize("route", ["NCHW 1x1", "3x3 over blocks", "3x3 with a copy"])
def test_a_prepared_launch_is_what_triton_launches(
    route: str, driver: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = calls()[route]
    # Copies get the same memory, so that addresses can be compared.
    copies: dict[tuple[int, ...], torch.Tensor] = {}
    real = torch.Tensor.new_empty

    def remembered(tensor: torch.Tensor, shape: tuple[int, ...], **options: object) -> torch.Tensor:
        return copies.setdefault(tuple(shape), real(tensor, shape, **options))

    monkeypatch.setattr(torch.Tensor, "new_empty", remembered)
    call()
    first = seen(driver)
    asked = []
    by_triton = Launch.run_by_triton
    monkeypatch.setattr(Launch, "run_by_triton", lambda step: asked.append(step) or by_triton(step))
    call()
    assert asked == []
    assert seen(driver) == first
    assert len(first) == (2 if "with a copy" in route else 1)


def test_pointers_and_types_are_told_apart(driver: StandIn) -> None:
    x = torch.randn(1, 16, 4, 4).half()
    weight, everything = torch.randn(16, 16, 1, 1).half(), launch.ChannelList(None, 0, 16)
    packed = _C.pack_weight(weight, None, None, by_input=False)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)

    def made(y: torch.Tensor, bias: torch.Tensor) -> Launch:
        target = ops.target_of(x.device)
        return launch.planar(y, x, packed, everything, everything, target, epilogue=launch.Epilogue(bias))

    steps = [
        made(torch.empty_like(x), torch.randn(16)),
        made(shifted, torch.randn(16)),
        made(torch.empty_like(x), torch.randn(16).half()),
        made(torch.empty_like(x), torch.randn(16)),
    ]
    assert len({id(step.spec) for step in steps}) == 1
    for step in steps:
        step.run()
    functions = [len(set(map(id, step.spec.compiled.values()))) for step in steps[:1]]
    assert functions == [3]
    assert len(steps[0].spec.compiled) == 3


def test_the_tool_prints_its_figures() -> None:
    command = [sys.executable, "-m", "tools.launch_overhead", "--rounds", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])["host_microseconds_up_to_the_driver"]
    assert set(figures) == {"NCHW 1x1", "3x3 over blocks", "3x3 with a copy"}
    assert all(0 < each["prepared_us"] < 1e5 for each in figures.values())
