"""Plans under autocast give what the model gives there: the same dtypes, and the same numbers up to rounding."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bap_kernels as bk
from bap_kernels.plan.compare import largest_error
from tests.networks import SMALL, randomise


def prepared(model: nn.Module) -> nn.Module:
    model = bk.swap_(randomise(model))
    return bk.attach_(model, bk.ChannelTable.random(model, ["a", "b"], 0.5, 1))


def cast(dtype: torch.dtype = torch.bfloat16) -> Any:
    return torch.autocast("cpu", dtype)


def image() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("network", SMALL)
@torch.no_grad()
def test_small_networks(network: str) -> None:
    model, x = prepared(SMALL[network]()), image()
    bk.set_domain(model, "a")
    plain = model(x)
    planned = bk.plan(model, x, "a")
    with cast():
        want, got = model(x), planned(x)
    assert got.dtype == want.dtype
    # bfloat16 has 8 bits; one batch norm is folded where the model rounds twice.
    assert largest_error(got, want)[0] < 0.05
    assert largest_error(planned(x), plain)[0] < 1e-4
    with cast():
        inside = bk.plan(model, x, "a")
        assert largest_error(inside(x), want)[0] < 0.05
    assert largest_error(inside(x), plain)[0] < 1e-4


class Mixed(nn.Module):
    """Steps of several dtypes: functions that autocast runs in float32, depthwise, sums and concatenations of both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4, padding=1)
        self.c, self.d = nn.Conv2d(11, 6, 1), nn.Conv2d(17, 3, 1)
        self.n = nn.GroupNorm(2, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.b(self.a(x))
        first = torch.cat([x, y], 1)
        second = torch.cat([x, y, torch.softmax(y, 1)], 1)
        z = self.n(self.c(second))
        last = torch.cat([second, z], 1)
        return self.d(last) + x, y + x[:, :1], first, z, last.to(y.dtype)


@torch.no_grad()
def test_each_result_has_the_models_dtype() -> None:
    model, x = prepared(Mixed()), image()
    for domain in ("a", "b"):
        bk.set_domain(model, domain)
        planned, small = bk.plan(model, x, domain), bk.specialize(model, domain, x)
        with cast():
            want = model(x)
            # The last one asks a tensor for its dtype: a small network keeps that of the example.
            for one, count in ((planned, 5), (small, 4)):
                got = one(x)
                assert [y.dtype for y in got[:count]] == [y.dtype for y in want[:count]]
                assert largest_error(list(got[:4]), list(want[:4]))[0] < 0.05


@torch.no_grad()
def test_domains_and_mixed_batches() -> None:
    model, x = prepared(SMALL["residual"]()), image()
    planned = bk.plan(model, x, "a", check=False)
    wanted = []
    for domain in ("a", "b"):
        bk.set_domain(model, domain)
        with cast():
            wanted.append(model(x))
            bk.set_domain(planned, domain)
            assert largest_error(planned(x), wanted[-1])[0] < 0.05
    bk.set_domain(planned, torch.tensor([1, 0]))
    for _ in range(2):
        with cast():
            got = planned(x)
        assert largest_error(got, torch.cat([wanted[1][:1], wanted[0][1:]]))[0] < 0.05
    assert planned(x).dtype == torch.float32


@torch.no_grad()
def test_weights_are_read_at_every_call() -> None:
    model, x = prepared(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))), image()
    bk.set_domain(model, "a")
    planned = bk.plan(model, x, "a")
    with cast():
        planned(x)
    model[1].weight.mul_(3)
    # Inside one autocast region the model's own layers would go on with the weights that it cast before.
    with cast():
        assert largest_error(planned(x), model(x))[0] < 0.05


def test_autocast_is_a_matter_of_one_thread() -> None:
    model, x = prepared(SMALL["residual"]()), image()
    planned = bk.plan(model, x, "a")
    found: list[torch.dtype] = []

    def other() -> None:
        with torch.no_grad():
            found.extend(planned(x).dtype for _ in range(5))

    with torch.no_grad(), cast():
        planned(x)
        thread = threading.Thread(target=other)
        thread.start()
        kinds = {planned(x).dtype for _ in range(5)}
        thread.join()
    assert kinds == {torch.bfloat16}
    assert set(found) == {torch.float32}
