"""Tensors of one cell: weight, lists, and a pool of inputs larger than the last-level cache."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from benches.cases import Cell

# Of a cache line: inputs start on one, as separate tensors would.
ALIGNMENT_BYTES = 64
# Larger pools cost too much memory; inputs are marked warm instead.
MAX_POOL_BYTES = 1 << 30
# Size of a pool relative to the cache.
POOL_FACTOR = 1.5

MEMORY_FORMATS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache: L3 of a CPU (32 MiB if unknown), L2 of a GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=32 << 20)


@contextmanager
def normal_tensors() -> Iterator[None]:
    """Create tensors with a version counter, also within inference mode: caches keyed by it need one."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class NumberStore:
    """A buffer of normal random numbers; the inputs of all cells are views of it.

    Args:
        dtype: Of the numbers.
        device: Of the buffer.
        seed: Of the numbers.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self._seed = seed
        self._numbers = torch.empty(0, dtype=dtype, device=device)
        self.cache_bytes = cache_bytes(device)

    def pool(self, shape: Sequence[int], layout: str) -> tuple[list[Tensor], bool]:
        """Return inputs of one shape.

        Args:
            shape: (N, C_in, H, W).
            layout: ``channels_last`` or ``nchw``.

        Returns:
            The inputs, at least three, and whether together they exceed the last-level cache.
        """
        size = self._numbers.element_size()
        step = math.ceil(math.prod(shape) * size / ALIGNMENT_BYTES) * ALIGNMENT_BYTES // size
        length = min(self.cache_bytes * POOL_FACTOR, MAX_POOL_BYTES) // (step * size) + 1
        count = max(3, int(length))
        self._grow(count * step)
        N, C, H, W = shape
        pool = []
        for i in range(count):
            flat = self._numbers[i * step : i * step + math.prod(shape)]
            pool.append(
                flat.view(N, H, W, C).permute(0, 3, 1, 2) if layout == "channels_last" else flat.view(N, C, H, W)
            )
        return pool, count * step * size > self.cache_bytes

    def _grow(self, numel: int) -> None:
        if numel > self._numbers.numel():
            generator = torch.Generator(self._numbers.device).manual_seed(self._seed)
            numbers = torch.randn(numel, generator=generator, device=self._numbers.device)
            self._numbers = numbers.to(self._numbers.dtype)


@dataclass
class Problem:
    """One cell with its tensors.

    Args:
        cell: Convolution, batch, lists and layout.
        inputs: Pool of inputs (N, C_in, H, W) in the cell's memory format.
        rotated: Whether the pool is larger than the last-level cache.
        weight: (C_out, C_in, kH, kW), in the cell's memory format.
        in_index: In-list, int32.
        out_index: Out-list, int32; None for all.
    """

    cell: Cell
    inputs: list[Tensor]
    rotated: bool
    weight: Tensor
    in_index: Tensor
    out_index: Tensor | None

    @classmethod
    @normal_tensors()
    def make(cls, cell: Cell, store: NumberStore, dtype: torch.dtype, device: torch.device) -> "Problem":
        """Draw weight and lists with the seed of the cell; the inputs come from the store."""
        case = cell.case
        inputs, rotated = store.pool((cell.batch, case.C_in, case.H, case.W), cell.layout)
        generator = torch.Generator().manual_seed(cell.seed)
        weight = torch.randn(case.C_out, case.C_in, case.kernel, case.kernel, generator=generator)
        # Gives the result unit variance, so that one tolerance fits all cases.
        weight = (weight * (case.C_in * case.kernel**2) ** -0.5).to(device, dtype)
        in_index, out_index = cell.channel_lists()
        return cls(
            cell,
            inputs,
            rotated,
            weight.to(memory_format=MEMORY_FORMATS[cell.layout]),
            in_index.to(device),
            None if out_index is None else out_index.to(device),
        )

    @property
    def conv_args(self) -> tuple[int, int]:
        """(stride, padding) of the convolution."""
        return self.cell.case.stride, self.cell.case.padding

    @cached_property
    def sliced_weight(self) -> Tensor:
        """Weight of the kept channels, (K_out, K_in, kH, kW), in the cell's memory format."""
        weight = self.weight if self.out_index is None else self.weight.index_select(0, self.out_index)
        return weight.index_select(1, self.in_index).contiguous(memory_format=MEMORY_FORMATS[self.cell.layout])

    def compact(self, x: Tensor) -> Tensor:
        """Return a compact copy of an input, in the cell's memory format."""
        return x.index_select(1, self.in_index).contiguous(memory_format=MEMORY_FORMATS[self.cell.layout])

    def work(self, dense: bool) -> tuple[float, int]:
        """(FLOP with 2 per multiply-add, bytes of input + weight + result) of the kept or of all channels."""
        case, N = self.cell.case, self.cell.batch
        C_in, C_out = (case.C_in, case.C_out) if dense else (self.cell.K_in, self.cell.K_out)
        oH, oW = case.output_size
        taps = case.kernel**2
        # A strided 1x1 convolution skips pixels.
        pixels = case.H * case.W if case.kernel >= case.stride else oH * oW
        numel = N * C_in * pixels + C_out * C_in * taps + N * C_out * oH * oW
        return 2.0 * N * oH * oW * C_out * C_in * taps, numel * self.weight.element_size()
