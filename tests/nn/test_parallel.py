"""DomainParallel on two processes against one process on the joined batch."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import bap_kernels as bk
from bap_kernels.nn import DomainParallel

NAMES = ["a", "b", "c"]
HEADS = {"a": 3, "b": 4, "c": 5}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(torch.relu(self.norm(self.stem(x))))).mean((2, 3)))


def _model(seed: int, frozen: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    model = bk.nn.switch_(Net(), NAMES, lambda module, name: name != "stem", heads=HEADS)
    with torch.no_grad():
        for switch in model.conv.domains.values():
            switch.score.copy_(torch.randn(8) * 0.01 + 5e-3)
        for norm in model.norm.domains.values():
            norm.running_mean.normal_()
    if frozen:
        for module in (model.stem, model.conv):
            module.weight.requires_grad_(False)
            module.bias.requires_grad_(False)
    return model


def _batch(step: int) -> Tensor:
    return torch.randn(4, 3, 7, 7, generator=torch.Generator().manual_seed(step))


STEPS = ["a", "b", "a", "a"]


def _train(model: nn.Module, rows: Callable[[Tensor], list[Tensor]], accumulate: bool, run: nn.Module) -> None:
    """Steps of Adam, whose moments would move parameters with gradients of zero; domain "c" is never used."""
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    no_sync = getattr(run, "no_sync", contextlib.nullcontext)
    for step, name in enumerate(STEPS):
        bk.set_domain(run, name)
        if not (accumulate and step % 2):
            optimiser.zero_grad()
        parts = rows(_batch(step))
        with no_sync() if accumulate and step % 2 == 0 else contextlib.nullcontext():
            for part in parts:
                (run(part).square().mean() / len(parts)).backward()
        used = set(STEPS[max(0, step - 1) : step + 1]) if accumulate and step % 2 else {name}
        for key, parameter in bk.nn.domain_parameters(model):
            domain = next(one for one in NAMES if f"domains.{one}." in key)
            assert (parameter.grad is None) == (domain not in used), (key, name)
        if not accumulate or step % 2:
            optimiser.step()


def _train_two(rank: int, frozen: bool, norm_mode: bool, accumulate: bool) -> dict[str, Tensor]:
    # Each process starts from other values: those of rank 0 must reach it.
    model = _model(seed=rank, frozen=frozen)
    parallel = DomainParallel(model)
    parallel.train()
    model.norm.train(norm_mode)
    _train(model, lambda x: [x[2 * rank : 2 * rank + 2]], accumulate, parallel)
    assert next(iter(parallel.state_dict())).startswith("module.")
    return model.state_dict()


def _joined(frozen: bool, norm_mode: bool, accumulate: bool) -> dict[str, Tensor]:
    """One process; where batch norm uses statistics of the batch, each half has its own, as on two processes."""
    model = _model(seed=0, frozen=frozen)
    model.norm.train(norm_mode)
    if not norm_mode:
        _train(model, lambda x: [x], accumulate, model)
        return model.state_dict()

    class Halves(nn.Module):
        """Both halves from the same running statistics, whose mean over them stays."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            buffers = model.norm.active._buffers
            before, results, after = dict(buffers), [], []
            for half in (x[:2], x[2:]):
                # New tensors: the backward reads the old ones.
                buffers.update({key: value.clone() for key, value in before.items()})
                results.append(model(half))
                after.append(dict(buffers))
            for key in ("running_mean", "running_var"):
                buffers[key] = (after[0][key] + after[1][key]) / 2
            return torch.cat(results)

    _train(model, lambda x: [x], accumulate, Halves())
    return model.state_dict()


def _other_domains(rank: int) -> str:
    # Frozen: DistributedDataParallel itself does not go on after a backward that raised.
    model = _model(seed=0, frozen=True)
    parallel = DomainParallel(model)
    bk.set_domain(parallel, NAMES[rank])
    with pytest.raises(RuntimeError) as caught:
        parallel(_batch(rank)).sum().backward()
    # It goes on afterwards.
    bk.set_domain(parallel, "c")
    model.zero_grad()
    parallel(_batch(rank)).sum().backward()
    return f"{caught.value} {model.conv.domains['c'].score.grad.tolist()}"


def _recalibrated(rank: int) -> Tensor:
    model = _model(seed=0)
    parallel = DomainParallel(model)
    bk.nn.recalibrate_bn(model, [_batch(rank)], "b")
    mine = model.norm.domains["b"].running_mean.clone()
    parallel.average_statistics("b")
    with pytest.raises(ValueError, match=r"one of \['a', 'b', 'c'\], got 'd'"):
        parallel.average_statistics("d")
    return torch.stack([mine, model.norm.domains["b"].running_mean])


CASES = [
    (frozen, norm_mode, accumulate)
    for frozen, norm_mode, accumulate in ((False, False, False), (False, True, False), (True, True, False))
] + [(False, False, True), (True, False, True)]


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    with bk.use_backend("aten"):
        results = {"cases": [_train_two(rank, *case) for case in CASES]}
        results["other"] = _other_domains(rank)
        results["recalibrated"] = _recalibrated(rank)
    torch.save(results, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results() -> Iterator[list[dict]]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, (folder,), nprocs=2)
        yield [torch.load(Path(folder, f"{rank}.pt")) for rank in range(2)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(int(one)) for one in case))
def test_equals_one_process_on_the_joined_batch(results: list[dict], case: tuple[bool, bool, bool]) -> None:
    first, second = (result["cases"][CASES.index(case)] for result in results)
    with bk.use_backend("aten"):
        expected = _joined(*case)
    start = _model(seed=0).state_dict()
    assert list(first) == list(expected)
    for key, value in expected.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-5, msg=key)
        if "domains.c." in key or (case[0] and "domains" not in key):
            assert torch.equal(first[key], start[key]), key
        elif "domains.a." in key and (case[1] or not re.search("running|tracked", key)):
            assert not torch.equal(first[key], start[key]), key


def test_different_domains_raise_on_every_process(results: list[dict]) -> None:
    message, other = (result["other"] for result in results)
    assert "expected all processes to use the same domain in a step" in message
    assert "the first 'norm.domains.a.weight'" in message
    assert "the first 'norm.domains.b.weight'" in other
    # The gradients of the step after are the same.
    assert message.split("[")[-1] == other.split("[")[-1]


def test_statistics_are_averaged_after_recalibration(results: list[dict]) -> None:
    (mine, mean), (its, same) = (result["recalibrated"] for result in results)
    assert not torch.equal(mine, its)
    torch.testing.assert_close(mean, (mine + its) / 2)
    assert torch.equal(mean, same)


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_shared_parameters_go_through_ddp_and_those_of_domains_do_not(alone: None) -> None:
    model = _model(seed=0)
    parallel = DomainParallel(model, bucket_cap_mb=1)
    assert type(parallel._ddp) is DistributedDataParallel
    own = {name for name, _ in bk.nn.domain_parameters(model)}
    assert own < parallel._ddp.parameters_to_ignore
    assert "norm.domains.a.running_mean" in parallel._ddp.parameters_to_ignore
    assert not {"stem.weight", "conv.weight"} & parallel._ddp.parameters_to_ignore
    # The model stands in the tree once.
    assert [name for name, module in parallel.named_modules() if module is model.conv] == ["module.conv"]
    assert DomainParallel(_model(seed=0, frozen=True))._ddp is None


def test_a_backward_that_failed_leaves_nothing_behind(alone: None) -> None:
    model = _model(seed=0, frozen=True)
    parallel = DomainParallel(model, check=False)
    bk.set_domain(parallel, "a")

    def fail(grad: Tensor) -> Tensor:
        raise OSError("disk")

    y = parallel(_batch(0))
    handle = model.norm.domains["a"].weight.register_hook(fail)
    with pytest.raises(OSError, match="disk"):
        y.sum().backward()
    handle.remove()
    finished = []
    parallel._average = lambda tensors: finished.append(len(tensors))
    parallel(_batch(0)).sum().backward()
    # Scores, weight and bias of the batch norm and of the classifier; two running statistics.
    assert finished == [5 + 2]
