"""Liveness by gradients, a second and independent way to find which filters and batch-norm channels a domain needs.

Found on a copy of the network in which every path carries a positive number: weights are positive means, batch norm
adds one, inputs are ones. ReLU, pooling, additions and concatenations then pass every gradient, none can cancel, and
the gradient of a layer's output is zero exactly where no path leads on: the next convolutions have that channel off, or
nothing reads theirs. No operation needs a rule. float64 holds the products of the deepest networks.
"""

from __future__ import annotations

import copy

import torch
from bap.prune.liveness import Liveness
from torch import Tensor, nn

import bap_kernels as bk
from bap_kernels.nn import DomainBatchNorm2d


def _make_positive(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            fan_in = module.weight[0].numel()
            module.weight.fill_(1.0 / fan_in)
            if module.bias is not None:
                module.bias.fill_(1.0)
        elif isinstance(module, nn.BatchNorm2d):
            if module.affine:
                module.weight.fill_(1.0)
                module.bias.fill_(1.0)
            module.reset_running_stats()


def find_live_by_gradients(model: nn.Module, example: Tensor, domain: str) -> Liveness:
    """What one domain of a model needs; what is no convolution or norm must keep positive numbers positive."""
    positive = copy.deepcopy(model).double().eval().cpu()
    for parameter in positive.parameters():
        parameter.requires_grad_(False)
    bk.set_domain(positive, domain)
    # Scores are parameters as well, and stay.
    with torch.no_grad():
        _make_positive(positive)
    outputs: dict[str, list[Tensor]] = {}

    def keep(name: str) -> object:
        def hook(module: nn.Module, _: object, output: Tensor) -> Tensor:
            # Later layers may write in place: what is kept is a leaf of its own.
            leaf = torch.zeros_like(output).requires_grad_(True)
            outputs.setdefault(name, []).append(leaf)
            return output + leaf

        return hook

    inside = {
        m for layer in positive.modules() if isinstance(layer, DomainBatchNorm2d) for m in layer.domains.modules()
    }
    convs, norms = [], []
    for name, module in positive.named_modules():
        if isinstance(module, nn.Conv2d):
            convs.append(name)
        elif isinstance(module, (DomainBatchNorm2d, nn.BatchNorm2d)) and module not in inside:
            norms.append(name)
        else:
            continue
        module.register_forward_hook(keep(name))
    with torch.enable_grad(), bk.use_backend("aten"):
        result = positive(torch.ones(1, *example.shape[1:], dtype=torch.float64))
        result.sum().backward()
    grads = {}
    for name, leaves in outputs.items():
        grad = torch.stack([leaf.grad.sum((0, 2, 3)) for leaf in leaves if leaf.grad is not None]).sum(0)
        assert torch.isfinite(grad).all(), name
        assert (grad >= 0).all(), name
        grads[name] = grad > 0
    return Liveness({n: grads[n] for n in convs if n in grads}, {n: grads[n] for n in norms if n in grads})
