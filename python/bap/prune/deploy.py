"""The network for deployment: physically narrower layers, and the milliseconds and MiB that they save.

Training keeps every layer at full width. Here the switches become fixed lists, what no domain uses leaves the tensors,
and each domain gets a plan on the weights that are left, which all domains share.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import bap_kernels as bk
from bap.models import evaluating
from bap.prune.layers import SwitchBank, switched_layers
from bap.prune.prune import PruneError, check_inputs, relative_change

__all__ = ["Deployed", "compare_times", "deploy", "speed_report", "tensor_bytes"]


@dataclass(frozen=True)
class Deployed:
    """The result of :func:`deploy`.

    Args:
        model: the network of narrower layers with fixed lists, in eval mode; :func:`bap_kernels.set_domain` chooses.
        planned: the same for inference, lowered for each domain; shares the weights of ``model``.
        report: widths and parameters before and after.
        largest_change: of any output of any domain, relative to its largest output.
    """

    model: nn.Module
    planned: nn.Module
    report: bk.PruneReport = field(repr=False)
    largest_change: float

    @property
    def bytes(self) -> int:
        """Bytes of all parameters and buffers, of all domains."""
        return tensor_bytes(self.model)


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, each counted once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@torch.no_grad()
def deploy(
    model: nn.Module, example: Tensor, inputs: Mapping[str, Tensor] | None = None, tolerance: float = 1e-4
) -> Deployed:
    """Builds the narrow network of a trained one, which is not changed.

    Args:
        model: a model with switches, as training left it.
        example: (N, 3, H, W): the input size.
        inputs: {domain: images (N, 3, H, W)} to compare outputs on; None draws random ones.
        tolerance: largest change that rounding explains, relative to the domain's largest output.

    Raises:
        PruneError: if an output of a domain changes by more.

    Examples:
        >>> import torch
        >>> from bap.config import Config
        >>> from bap.prune.deploy import deploy, tensor_bytes
        >>> from bap.prune.layers import SwitchBank
        >>> from bap.train.network import switched_network
        >>> config = Config(model_options={"widths": [4, 8, 8], "blocks": [1, 1, 1]})
        >>> model = switched_network(config, {"a": 3, "b": 2}).eval()
        >>> bank = SwitchBank(model)
        >>> for name in bank.domains:
        ...     bank.write(name, torch.full((sum(bank.sizes),), 1e-2).index_fill(0, torch.arange(0, 34, 3), 0.0))
        >>> deployed = deploy(model, torch.zeros(1, 3, 32, 32))
        >>> deployed.bytes < tensor_bytes(model), deployed.largest_change < 1e-4
        (True, True)
    """
    domains = SwitchBank(model).domains
    device = next(model.parameters()).device
    inputs = check_inputs(domains, example, inputs, device)
    narrow = bk.swap_(copy.deepcopy(model).eval())
    report = bk.prune_unused_(narrow, example.to(device))
    bk.set_domain(narrow, domains[0])
    planned = bk.plan(narrow, example.to(device), domains[0])
    worst = 0.0
    with evaluating(model):
        for name, x in inputs.items():
            bk.set_domain(model, name)
            bk.set_domain(planned, name)
            change = relative_change(planned(x), model(x).float())
            worst = max(worst, change)
            if not change <= tolerance:
                raise PruneError(
                    f"deploy(): expected the outputs of every domain to stay within {tolerance:g}, got {change:.3g} "
                    f"for {name!r}."
                )
    return Deployed(narrow, planned, report, worst)


def _interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of each call; calls are interleaved, so that noise on the machine affects all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 2):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number >= 2:
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


class _Masked(nn.Module):
    """PyTorch's convolution behind a multiplication by the switches."""

    switch: Tensor

    def __init__(self, conv: nn.Conv2d, switch: Tensor) -> None:
        super().__init__()
        self.conv = conv
        self.register_buffer("switch", switch.detach().clone().view(1, -1, 1, 1))

    def forward(self, input: Tensor) -> Tensor:
        return self.conv(input * self.switch)


def _stock(model: nn.Module, domain: str, masked: bool) -> nn.Module:
    """A copy with PyTorch's dense convolutions, in eval mode and in one domain."""
    stock = copy.deepcopy(model).eval()
    bk.set_domain(stock, domain)
    for name, layer in list(switched_layers(stock)):
        conv = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            layer.groups,
            layer.bias is not None,
            device="meta",
        )
        conv.weight, conv.bias = layer.weight, layer.bias
        stock.set_submodule(name, _Masked(conv, layer.switch(domain)) if masked else conv)
    return stock


def compare_times(model: nn.Module, deployed: Deployed, example: Tensor, rounds: int = 15) -> list[dict[str, Any]]:
    """Milliseconds of one forward of every domain: all channels, the switches multiplied in, and the narrow network.

    Args:
        model: the trained model.
        deployed: the result of :func:`deploy`.
        example: (N, 3, H, W), as it will be called.
        rounds: calls of which the median is taken.

    Returns:
        [{"domain": ..., "dense ms": ..., "masked ms": ..., "planned ms": ..., "over dense": ..., "over masked": ...}]
    """
    device = next(model.parameters()).device
    x = torch.randn(example.shape, generator=torch.Generator().manual_seed(0)).to(device)
    rows = []
    for domain in SwitchBank(model).domains:
        dense, masked = _stock(model, domain, masked=False), _stock(model, domain, masked=True)
        bk.set_domain(deployed.planned, domain)
        calls = {
            "dense ms": partial(dense, x),
            "masked ms": partial(masked, x),
            "planned ms": partial(deployed.planned, x),
        }
        with torch.inference_mode():
            row: dict[str, Any] = {"domain": domain, **_interleaved(calls, rounds, device)}
        row["over dense"] = row["dense ms"] / row["planned ms"]
        row["over masked"] = row["masked ms"] / row["planned ms"]
        rows.append(row)
    return rows


def speed_report(model: nn.Module, deployed: Deployed, example: Tensor, rounds: int = 15) -> dict[str, Any]:
    """Cost of a network as it is served, for JSON: parameters, bytes, and the rows of :func:`compare_times`."""
    before, after = deployed.report.parameters
    return {
        "batch": example.shape[0],
        "threads": torch.get_num_threads(),
        "parameters": {"before": before, "after": after},
        "bytes": {"before": tensor_bytes(model), "after": deployed.bytes},
        "largest_change": deployed.largest_change,
        "domains": compare_times(model, deployed, example, rounds),
    }
