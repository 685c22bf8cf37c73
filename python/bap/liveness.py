"""Which filters and batch-norm channels a domain needs: those that something reads.

Found on a copy of the network in which every path carries a positive number: weights are positive means, batch norm
adds one, inputs are ones. ReLU, pooling, additions and concatenations then pass every gradient, none can cancel, and
the gradient of a layer's output is zero exactly where no path leads on: the next convolutions have that channel off, or
nothing reads theirs. So residual additions and concatenations need no rules of their own. float64 holds the products
of the deepest networks.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import bap_kernels as bk
from bap_kernels.nn import DomainBatchNorm2d

__all__ = ["Liveness", "find_live"]


@dataclass(frozen=True)
class Liveness:
    """What one domain needs.

    Args:
        filters: {convolution: (K,) bool}, its outputs that something reads.
        norms: {batch norm: (C,) bool}, the same.
    """

    filters: dict[str, Tensor]
    norms: dict[str, Tensor]


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


def find_live(model: nn.Module, example: Tensor, domain: str) -> Liveness:
    """What one domain of a model needs, with its switches as they are; the model is not changed.

    Args:
        model: a model that went through :func:`bap_kernels.nn.switch_`, whose other layers are linear, ReLU, pooling,
            additions and concatenations.
        example: (N, 3, H, W); its values are not used.
        domain: the domain.

    Raises:
        ValueError: if the model has no such domain, or a layer of the kind changes the sign of what it is given, so
            that the gradient cannot be trusted.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import bap_kernels as bk
        >>> from bap.liveness import find_live
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
        >>> net = bk.nn.switch_(net, ["a"], lambda module, name: name == "2")
        >>> with torch.no_grad():
        ...     net[2].domains["a"].score[1] = 0
        >>> find_live(net, torch.zeros(1, 3, 8, 8), "a").filters["0"].tolist()
        [True, False, True, True]
    """
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
        if not (torch.isfinite(grad).all() and (grad >= 0).all()):
            raise ValueError(
                f"find_live(): expected `model` to pass positive numbers on, got gradients of another sign at {name!r}."
            )
        grads[name] = grad > 0
    return Liveness({n: grads[n] for n in convs if n in grads}, {n: grads[n] for n in norms if n in grads})
