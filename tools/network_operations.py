"""Every operation of the package on a network, compared with the masked dense network; for `tools.try_networks`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import bap_kernels as bk
from tools.networks import build, calibrate_, relative_error, zero_channels_

DOMAINS = ["a", "b"]
# Relative to the largest value. Rounding in float32 mostly stays below; otherwise float64 decides.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}


class WrongError(Exception):
    """A result differs."""


class Subject:
    """A network with its lists and expected results."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        self.dense = calibrate_(build(name), self.x.float()).to(dtype)
        self.table = bk.ChannelTable.random(bk.swap_(copy.deepcopy(self.dense)), DOMAINS, 0.5, seed=0)
        self._expected: dict[str | None, Any] = {}
        self.tolerance = TOLERANCE[dtype]

    def expected(self, domain: str | None) -> Any:
        """Return the result of the masked dense network."""
        if domain not in self._expected:
            model = copy.deepcopy(self.dense)
            for name, lists in self.table[domain].items() if domain is not None else ():
                if lists.in_index is not None:
                    conv = model.get_submodule(name)
                    assert isinstance(conv, nn.Conv2d)
                    mask = torch.zeros(1, conv.in_channels, 1, 1, dtype=self.x.dtype)
                    mask[0, lists.in_index.long()] = 1
                    conv.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask,))
            with torch.no_grad():
                self._expected[domain] = model(self.x)
        return self._expected[domain]

    def swapped(self, layer_type: Any = bk.nn.GatheredConv2d) -> nn.Module:
        """Return a swapped copy with lists."""
        return bk.attach_(bk.swap_(copy.deepcopy(self.dense), layer_type=layer_type), self.table)

    def compare(self, result: Any, expected: Any, name: str) -> None:
        """Raise `WrongError` if a result differs."""
        error = relative_error(result, expected)
        if not error <= self.tolerance:
            raise WrongError(f"{name}: error {error:.1e}")

    def compare_domains(self, model: nn.Module, name: str) -> None:
        """Compare the result of every domain."""
        for domain in DOMAINS:
            bk.set_domain(model, domain)
            with torch.no_grad():
                self.compare(model(self.x), self.expected(domain), f"{name}, domain {domain}")

    def called(self) -> list[str]:
        """Return the names of the convolutions that a call runs."""
        names: dict[str, None] = {}
        model = copy.deepcopy(self.dense)
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda *_, name=name: names.setdefault(name))
        with torch.no_grad():
            model(self.x)
        return list(names)


Outcome = dict[str, Any]


def swap(subject: Subject) -> Outcome:
    """Swapped layers."""
    model = subject.swapped()
    subject.compare_domains(model, "swap")
    bk.set_domain(model, None)
    with torch.no_grad():
        subject.compare(model(subject.x), subject.expected(None), "swap, all channels")
    return {}


def plan(subject: Subject) -> Outcome:
    """A plan, in both domains."""
    planned = bk.plan(subject.swapped(), subject.x, "a")
    subject.compare_domains(planned, "plan")
    called = subject.called()
    lowered = [name for name in called if name in planned.lowered]
    reasons = {name: planned.not_lowered.get(name, "unknown") for name in called if name not in planned.lowered}
    return {"convolutions": len(called), "lowered": len(lowered), "reasons": reasons}


def specialize(subject: Subject) -> Outcome:
    """A small network for each domain."""
    model = subject.swapped()
    for domain in DOMAINS:
        small = bk.specialize(model, domain, subject.x)
        with torch.no_grad():
            subject.compare(small(subject.x), subject.expected(domain), f"specialize, domain {domain}")
    return {"parameters": [sum(p.numel() for p in network.parameters()) for network in (model, small)]}


def prune(subject: Subject) -> Outcome:
    """Remove channels that no domain uses, then run layers and a plan."""
    model = subject.swapped(bk.nn.MaskedConv2d)
    report = bk.prune_unused_(model, subject.x)
    subject.compare_domains(model, "prune")
    subject.compare_domains(bk.plan(model, subject.x, "a", check=False), "plan of the pruned network")
    return {"parameters": list(report.parameters), "macs": list(report.macs)}


def order(subject: Subject) -> Outcome:
    """Reorder channels, then run layers and a plan."""
    model = subject.swapped(bk.nn.MaskedConv2d)
    report = bk.order_channels_(model, subject.x)
    subject.compare_domains(model, "order")
    subject.compare_domains(bk.plan(model, subject.x, "a", check=False), "plan of the ordered network")
    return {"moved": report.moved}


def mixed(subject: Subject) -> Outcome:
    """A batch of both domains, through layers and through a plan."""
    numbers = torch.tensor([1, 0, *[0] * (len(subject.x) - 2)])
    model = subject.swapped()
    results = [subject.expected(bk.domain_names(model)[int(number)]) for number in numbers]
    expected = tree_map(lambda *tensors: torch.stack([t[i] for i, t in enumerate(tensors)]), *results)
    bk.set_domain(model, numbers)
    with torch.no_grad():
        subject.compare(model(subject.x), expected, "mixed batch")
    planned = bk.plan(subject.swapped(), subject.x, "a", check=False)
    bk.set_domain(planned, numbers)
    with torch.no_grad():
        subject.compare(planned(subject.x), expected, "mixed batch of a plan")
    return {}


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    torch.stack([t.float().square().mean() for t in tree_leaves(model(x))]).sum().backward()
    optimizer.step()


def _untrainable_reason(subject: Subject) -> str:
    """Why a step of the dense network says nothing about ours; empty if it does."""
    model = copy.deepcopy(subject.dense).train()
    try:
        _train(model, torch.optim.SGD(model.parameters(), lr=1e-3), subject.x)
    except Exception as error:
        return f"the dense network raises in training mode: {error}"
    with torch.no_grad():
        finite = all(t.isfinite().all() for t in tree_leaves(model.eval()(subject.x)))
    return "" if finite else "the dense network's result is not finite after a training step"


def switch(subject: Subject) -> Outcome:
    """Switches, one training step per domain, then fixed layers with the trained lists."""
    model = bk.nn.switch_(copy.deepcopy(subject.dense), DOMAINS)
    for domain in DOMAINS:
        bk.set_domain(model, domain)
        with torch.no_grad():
            subject.compare(model(subject.x), subject.expected(None), f"switch_, domain {domain}, all on")
    if reason := _untrainable_reason(subject):
        return {"status": "no training", "detail": reason}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model.train()
    for domain in DOMAINS:
        bk.set_domain(model, domain)
        _train(model, optimizer, subject.x)
    model.eval()
    layers = [module for module in model.modules() if isinstance(module, bk.nn.SwitchedConv2d)]
    with torch.no_grad():
        for number, layer in enumerate(layers):
            for offset, domain_state in enumerate(layer.domains.values()):
                score: Any = domain_state.score
                score[(number + offset) % len(score)] = 0
    results = {}
    for domain in DOMAINS:
        bk.set_domain(model, domain)
        with torch.no_grad():
            results[domain] = model(subject.x)
    fixed = bk.swap_(model)
    for domain in DOMAINS:
        bk.set_domain(fixed, domain)
        with torch.no_grad():
            subject.compare(fixed(subject.x), results[domain], f"fixed lists after a step, domain {domain}")
    return {"switched": len(layers)}


def zeros(subject: Subject) -> Outcome:
    """Lists from a network's own zeros: layers and a plan return what the network with zeros returns."""
    pruned = copy.deepcopy(subject.dense)
    zero_channels_(pruned)
    with torch.no_grad():
        expected = pruned(subject.x)
    table = bk.ChannelTable.from_weights(pruned, "zeros", subject.x)
    model = bk.attach_(bk.swap_(copy.deepcopy(pruned)), table)
    bk.set_domain(model, "zeros")
    with torch.no_grad():
        subject.compare(model(subject.x), expected, "layers")
        subject.compare(bk.plan(model, subject.x, "zeros", check=False)(subject.x), expected, "plan")
    return {"read": table.density(model)["zeros"][0]}


OPERATIONS: dict[str, Callable[[Subject], Outcome]] = {
    operation.__name__: operation for operation in (swap, plan, specialize, prune, order, mixed, switch, zeros)
}
