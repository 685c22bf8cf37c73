"""Training of models with domains on several processes."""

from __future__ import annotations

import contextlib
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bap_kernels.nn.per_domain import domain_layers, domain_parameters

__all__ = ["DomainParallel"]


def _flat_groups(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors that one collective can carry together, in an order that all processes share."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.dtype, tensor.device].append(tensor)
    return list(groups.values())


class DomainParallel(nn.Module):
    """:class:`torch.nn.parallel.DistributedDataParallel` for models of which a step uses one domain only.

    Shared parameters go through DistributedDataParallel, without ``find_unused_parameters``. Parameters of domains stay
    out of it: gradients that a backward gave them are averaged over the processes at its end, in one collective for
    each dtype, and so are the running statistics of those layers, if in training mode. Parameters of other domains keep
    ``grad`` None, so that no optimiser moves them. A model whose shared parameters are all frozen, for which
    DistributedDataParallel raises, works too.

    All processes must use the same domain in a step; that is checked, but a process that uses none at all leaves the
    others waiting. Call :func:`bap_kernels.set_domain` with this
    module or the model inside. Freeze what is to be frozen before making it.

    Args:
        module: the model, on its device; parameters and buffers of rank 0 are sent to all processes.
        process_group: as in DistributedDataParallel; None is the default group.
        check: compares, at the end of each backward, what the processes have got gradients for. It reads a result on
            the host, which waits for the GPU.
        **options: for DistributedDataParallel, such as ``device_ids``.

    Raises:
        RuntimeError: in a backward, on all processes, if they have not used the same parameters.

    Examples:
        >>> import torch, torch.distributed as dist
        >>> from torch import nn
        >>> import bap_kernels as bk
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> model = bk.nn.switch_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), ["birds", "cars"])
        >>> parallel = bk.nn.DomainParallel(model)
        >>> bk.set_domain(parallel, "birds")
        >>> parallel(torch.randn(2, 3, 5, 5)).sum().backward()
        >>> model[0].domains["cars"].score.grad is None
        True
        >>> dist.destroy_process_group()
    """

    _group: dist.ProcessGroup
    _ddp: DistributedDataParallel | None

    def __init__(
        self,
        module: nn.Module,
        process_group: dist.ProcessGroup | None = None,
        check: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        self.module = module
        self.check = check
        own = dict(domain_parameters(module))
        buffers = {
            f"{path}.domains.{name}" if path else f"domains.{name}": buffer
            for path, layer in domain_layers(module)
            for name, buffer in layer.domains.named_buffers()
        }
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, [*own, *buffers])
        shared = [p for name, p in module.named_parameters() if name not in own]
        # Past nn.Module.__setattr__: the model must stand in the tree once. Collectives of its own keep the order of
        # those of DistributedDataParallel out of it.
        self.__dict__["_group"] = dist.new_group(
            None if process_group is None else dist.get_process_group_ranks(process_group)
        )
        ddp = None
        if any(p.requires_grad for p in shared):
            ddp = DistributedDataParallel(module, process_group=process_group, **options)
            self._broadcast([*own.values(), *buffers.values()])
        else:
            self._broadcast([*module.parameters(), *module.buffers()])
        self.__dict__["_ddp"] = ddp
        self._number = {p: number for number, p in enumerate(own.values())}
        self._names = list(own)
        self._layer_of = {
            p: inner
            for _, layer in domain_layers(module)
            for inner in layer.domains.modules()
            for p in inner.parameters(recurse=False)
        }
        self._synchronising = self._synchronise_next = True
        self._waiting: set[nn.Parameter] = set()
        self._queued = False
        for p in own.values():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(self._got_gradient)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model."""
        # Decided here and not in the backward, as DistributedDataParallel does.
        self._synchronise_next = self._synchronising
        # A backward that raised may have left it.
        self._queued = False
        return (self.module if self._ddp is None else self._ddp)(*args, **kwargs)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Leaves gradients of forwards within as each process has them; the next backward outside averages the sums."""
        before, self._synchronising = self._synchronising, False
        try:
            with contextlib.nullcontext() if self._ddp is None else self._ddp.no_sync():
                yield
        finally:
            self._synchronising = before

    def average_statistics(self, domain: str) -> None:
        """Averages the running statistics of a domain, as after :func:`recalibrate_bn` on each process's own data.

        Raises:
            ValueError: if a layer does not have that domain.
        """
        modules = [layer._module_of(domain) for _, layer in domain_layers(self.module)]
        self._average([value for module in modules for value in module.buffers() if value.is_floating_point()])

    def _broadcast(self, tensors: list[Any]) -> None:
        source = dist.get_global_rank(self._group, 0)
        with torch.no_grad():
            for group in _flat_groups(tensors):
                flat = torch.cat([tensor.reshape(-1) for tensor in group])
                dist.broadcast(flat, source, group=self._group)
                for tensor, value in zip(group, flat.split([t.numel() for t in group]), strict=True):
                    tensor.copy_(value.view(tensor.shape))

    def _got_gradient(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        # Without synchronisation it waits: the next one may be in a backward of another domain.
        self._waiting.add(parameter)
        if self._synchronise_next and not self._queued:
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)

    def _finish(self) -> None:
        # Hooks may fire in another order on another process.
        used = sorted((p for p in self._waiting if p.grad is not None), key=self._number.__getitem__)
        self._waiting.clear()
        self._queued = False
        if self.check:
            self._compare(used)
        layers = dict.fromkeys(self._layer_of[p] for p in used)
        statistics = [
            value
            for module in layers
            if module.training
            for value in module.buffers(recurse=False)
            if value.is_floating_point()
        ]
        self._average([p.grad for p in used if p.grad is not None] + statistics)

    def _compare(self, used: list[nn.Parameter]) -> None:
        names = [self._names[self._number[p]] for p in used]
        code = zlib.crc32("\n".join(names).encode())
        extremes = torch.tensor([code, -code], dtype=torch.int64, device=used[0].device)
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self._group)
        highest, lowest = extremes.tolist()
        if highest != -lowest:
            raise RuntimeError(
                "DomainParallel(): expected all processes to use the same domain in a step, got gradients of different "
                f"parameters; here {len(names)} of them, the first {names[0]!r}. Hint: choose the domain from the "
                "step's number, and set ste_every and frozen layers alike."
            )

    @torch.no_grad()
    def _average(self, tensors: list[Tensor]) -> None:
        share = 1.0 / dist.get_world_size(self._group)
        for group in _flat_groups(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            dist.all_reduce(flat, group=self._group)
            flat.mul_(share)
            for tensor, value in zip(group, flat.split([t.numel() for t in group]), strict=True):
                tensor.copy_(value.view(tensor.shape))
