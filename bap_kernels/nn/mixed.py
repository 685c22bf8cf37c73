"""Batches whose samples belong to several domains.

Every layer that depends on the domain takes the batch in the caller's order and returns its result in that order;
samples change their order only inside a layer. So a model's code and its result are as for one domain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from bap_kernels._load import _C

__all__ = ["MixedBatch", "MixedStates", "mixed_numbers", "selected_samples"]

# An element that is copied is read, written, and soon read again; one of a weight is only read, for all samples of a
# list after one another. Images of planes are packed for each run, which wastes more where they are small.
_COPY_COST, _COPY_COST_NCHW = 20, 4


def mixed_numbers(numbers: Tensor, domains: Sequence[str]) -> list[int]:
    """The domain number of each sample as a list, checked.

    Args:
        numbers: (N,), int64: indices into ``domains``.
        domains: names, in the order of their numbers.

    Raises:
        TypeError: for other dtypes.
        ValueError: for other shapes, and if there is no domain.
        IndexError: for numbers that no domain has.
    """
    if numbers.dtype != torch.int64:
        raise TypeError(
            f"set_domain(): expected `name` to be int64 domain numbers, got {numbers.dtype}. Hint: .to(torch.int64)."
        )
    if numbers.dim() != 1:
        raise ValueError(
            f"set_domain(): expected `name` to be 1-D, one domain number per sample, got shape {tuple(numbers.shape)}."
        )
    if numbers.layout != torch.strided or numbers.is_meta:
        raise ValueError("set_domain(): expected `name` to be a dense tensor with values, got a sparse or meta tensor.")
    if not domains:
        raise ValueError(
            "set_domain(): expected layers that share a domain, got none that all of them know. "
            "Hint: a mixed batch needs a domain that every layer has."
        )
    listed = numbers.tolist()
    wrong = [number for number in listed if not 0 <= number < len(domains)]
    if wrong:
        raise IndexError(
            f"set_domain(): expected `name` to hold domain numbers from 0 to {len(domains) - 1}, in the order of "
            f"{list(domains)}, got {wrong[0]}."
        )
    return listed


class MixedBatch:
    """Which sample of a batch belongs to which domain.

    Attributes:
        size: N.
        numbers: the domains that occur, increasing; of an empty batch, the first domain, with no sample.
        counts: samples of each of them, in that order.
        runs: consecutive samples of one domain, as (index into ``numbers``, samples).
        domain_index: of each sample, the index into ``numbers`` of its domain, int64, (N,).
        order: the samples sorted by domain, int64, (N,); None where they are sorted already.
        inverse: of ``order``.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        self.size = len(numbers)
        self.numbers = sorted(set(numbers)) or [0]
        index_of = {number: index for index, number in enumerate(self.numbers)}
        indices = [index_of[number] for number in numbers]
        self.counts = [indices.count(index) for index in range(len(self.numbers))]
        self.runs = [(index, len(list(run))) for index, run in groupby(indices)] or [(0, 0)]
        self.domain_index = torch.tensor(indices, dtype=torch.int64)
        self.order: Tensor | None = None
        self.inverse: Tensor | None = None
        if indices != sorted(indices):
            self.order = torch.tensor(sorted(range(self.size), key=indices.__getitem__))
            self.inverse = torch.empty_like(self.order)
            self.inverse[self.order] = torch.arange(self.size)
        # On other devices.
        self._copies: dict[tuple[str, torch.device], Tensor] = {}

    def on(self, name: str, device: torch.device) -> Tensor:
        """``domain_index``, ``order`` or ``inverse`` on a device, copied once.

        Raises:
            RuntimeError: where a CUDA graph is captured that the copy would have to be part of.
        """
        index: Tensor = getattr(self, name)
        if index.device == device:
            return index
        key = (name, device)
        eager = not torch.compiler.is_compiling()
        if key not in self._copies:
            if eager and _C.capturing(device):
                raise RuntimeError(
                    "set_domain(): expected `name` to be a mixed batch that was computed before the capture of a CUDA "
                    f"graph, since its order is copied to {device}, got a new one of {self.size} samples. "
                    "Hint: call the model on the batch once before the capture."
                )
            self._copies[key] = index.to(device)
        copy = self._copies[key]
        if eager and device.type == "cuda":
            # The batch may be replaced while another stream than that of the copy reads it.
            copy.record_stream(torch.cuda.current_stream(device))
        return copy

    def check(self, layer: nn.Module, input: Tensor, dim: int | None = None) -> None:
        """Raises unless a layer's input is this batch."""
        right = input.dim() >= 2 if dim is None else input.dim() == dim
        if not right or input.shape[0] != self.size:
            raise ValueError(
                f"{type(layer).__name__}(): expected an input with the {self.size} samples of the mixed batch, got "
                f"shape {tuple(input.shape)}. Hint: set_domain(model, numbers) takes one number for each sample of the "
                "next batch; set_domain(model, name) ends it."
            )

    def sorted(self, input: Tensor) -> Tensor:
        """The samples of one domain after those of another."""
        return input if self.order is None else selected_samples(input, self.on("order", input.device))

    def restored(self, result: Tensor) -> Tensor:
        """Undoes :meth:`sorted`."""
        return result if self.inverse is None else selected_samples(result, self.on("inverse", result.device))


def selected_samples(tensor: Tensor, index: Tensor) -> Tensor:
    """The listed samples, in the tensor's memory format, which index_select does not keep."""
    if tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return tensor.index_select(0, index)


class MixedStates:
    """What one layer uses in a mixed batch.

    Attributes:
        batch: the batch, shared by all layers.
        states: the layer's state in each of the batch's domains: lists, or a module.
    """

    def __init__(self, batch: MixedBatch, states: Sequence[Any]) -> None:
        self.batch = batch
        self.states = list(states)

    def apply(
        self, layer: nn.Module, input: Tensor, compute: Callable[[Tensor, Any], Tensor], dim: int | None = None
    ) -> Tensor:
        """The results of all samples; ``compute(samples, state)`` gives those of a domain."""
        batch = self.batch
        batch.check(layer, input, dim)
        samples = batch.sorted(input).split(batch.counts)
        parts = [compute(part, state) for part, state in zip(samples, self.states, strict=True)]
        widths = {part.shape[1] for part in parts}
        if len(widths) > 1:
            raise ValueError(
                f"{type(layer).__name__}(): expected all domains of a mixed batch to give as many channels, got "
                f"{sorted(widths)}. Hint: swap_(model, layer_type=MaskedConv2d) keeps the full width."
            )
        return batch.restored(torch.cat(parts))

    def fits_one_call(self, layer: nn.Conv2d, input: Tensor) -> bool:
        """Whether :meth:`gathered` serves a call; it has no gradient and ignores autocast."""
        used = (input, layer.weight, layer.bias)
        tracked = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in used)
        return not (tracked or layer.groups != 1 or torch.is_autocast_enabled(input.device.type))

    def gathered(
        self,
        layer: nn.Conv2d,
        input: Tensor,
        in_indices: Sequence[Tensor | None],
        sides: tuple[int, int, int, int],
        cache_packed: bool,
    ) -> Tensor:
        """The convolution of all samples in one call, each on its domain's input channels; for inference.

        Args:
            layer: gives weight, bias, stride and dilation.
            in_indices: one list for each of ``states``.
            sides: padding, on four sides.
            cache_packed: as for the operator.
        """
        batch = self.batch
        alike = all(index is in_indices[0] for index in in_indices)
        moves = not alike and batch.order is not None and _better_sorted(batch, layer, input)
        if alike:
            runs = [(0, batch.size)]
        else:
            runs = list(enumerate(batch.counts)) if moves or batch.order is None else batch.runs
        result = torch.ops.bap_kernels._gathered_conv2d_mixed.default(
            batch.sorted(input) if moves else input,
            layer.weight,
            layer.bias,
            [in_indices[index] for index, _ in runs],
            [count for _, count in runs],
            layer.stride,
            sides,
            layer.dilation,
            cache_packed,
        )
        return batch.restored(result) if moves else result


def _better_sorted(batch: MixedBatch, layer: nn.Conv2d, input: Tensor) -> bool:
    """Whether copying the samples moves fewer bytes than reading weights again for every run."""
    if input.device.type != "cpu":
        # Launches and tables grow with the runs, and bandwidth is plenty.
        return True
    if (layer.kernel_size, layer.stride, layer.dilation, input.dtype) == ((3, 3), (1, 1), (1, 1), torch.float32):
        # Winograd kernels compute all samples of a list together, wherever they are.
        return False
    last = input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
    _, _, H, W = input.shape
    pixels = H * W // (layer.stride[0] * layer.stride[1])
    copied = batch.size * (input.shape[1] * H * W + layer.out_channels * pixels)
    read = (len(batch.runs) - len(batch.counts)) * layer.weight.numel()
    return read > (_COPY_COST if last else _COPY_COST_NCHW) * copied
