"""The gathered convolution of a mixed batch: one launch for the runs of all domains, the heaviest tiles first.

Each run keeps its list and its packed weight in memory of its own; a table on the device says where they lie, as
offsets from those of one run, and which run each tile belongs to. The table comes from the host and is kept, so that a
batch of the same make-up copies nothing, and a CUDA graph can capture it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bap_kernels._load import _C
from bap_kernels.triton import launch, ops
from bap_kernels.triton.arguments import Mixed
from bap_kernels.triton.launch import Epilogue
from bap_kernels.triton.launch_spec import ALIGNMENT, target_of
from bap_kernels.triton.lists import ChannelList, channel_list
from bap_kernels.triton.ops import Pair

__all__ = ["gathered_conv2d_mixed"]


class _Run(NamedTuple):
    """One run as the table has it: images, channels, and offsets in elements of its list and weight."""

    first: int
    images: int
    kept: int
    list_offset: int
    weight_offset: int

    @property
    def row(self) -> int:
        """Length of a row of the packed weight."""
        return -(-self.kept // ALIGNMENT) * ALIGNMENT


def _tiles(runs: Sequence[_Run], pixels: int, step: int) -> Iterator[tuple[int, int]]:
    """Where each tile begins, and its run, those of the longest lists first; ``step`` 0: the tiles are images."""
    for number in sorted(range(len(runs)), key=lambda r: -runs[r].kept):
        run = runs[number]
        if step == 0:
            yield from ((image, number) for image in range(run.first, run.first + run.images))
        else:
            end = (run.first + run.images) * pixels
            yield from ((start, number) for start in range(run.first * pixels, end, step))


@functools.lru_cache(maxsize=1024)
def _kept_table(runs: tuple[_Run, ...], pixels: int, step: int, device: torch.device) -> _C.SharedTensor:
    if _C.capturing(device):
        images = [run.images for run in runs]
        raise RuntimeError(
            "gathered_conv2d_mixed(): expected a mixed batch of a make-up that was computed before the capture of a "
            f"CUDA graph, since its table comes from the host, got runs of {images} images for the first time. "
            "Hint: call the model once on such a batch before the capture, in eval mode, which keeps packed weights."
        )
    specs = [((r.first + r.images) * pixels, r.kept, r.list_offset, r.weight_offset, r.row) for r in runs]
    tiles = list(_tiles(runs, pixels, step))
    return _C.SharedTensor(torch.tensor([n for row in (*specs, *tiles) for n in row]).to(device))


def _table(runs: tuple[_Run, ...], weight: Tensor, pixels: int, step: int) -> Mixed:
    numbers = _kept_table(runs, pixels, step, weight.device).use()
    _C.pin_for_graph(weight, numbers)
    return Mixed(numbers[: 5 * len(runs)].view(-1, 5), numbers[5 * len(runs) :].view(-1, 2))


def _offset(tensor: Tensor, first: Tensor) -> int:
    """From one tensor's memory to another's, in elements; an empty one has no memory."""
    if tensor.numel() == 0:
        return 0
    distance = tensor.data_ptr() - first.data_ptr()
    assert distance % tensor.element_size() == 0
    return distance // tensor.element_size()


def _common_lists(indices: Sequence[Tensor], channels: int) -> list[ChannelList]:
    """The lists as blocks of one length, the longest that all consist of."""
    lists = [channel_list(index, channels) for index in indices]
    kind = min((each.kind for each in lists if each.length > 0), default=1)
    lists = [channel_list(index, channels, most=kind) for index in indices]
    if any(each.kind != kind for each in lists if each.length > 0):
        # Lists first met while a graph is captured are not read.
        lists = [channel_list(index, channels, blocks=False) for index in indices]
    return lists


def gathered_conv2d_mixed(
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_indices: Sequence[Tensor | None],
    counts: Sequence[int],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    packed: Sequence[Tensor] | None = None,
    route: str | None = None,
) -> None:
    """Computes the gathered convolution of every run into ``out``.

    Args:
        out: (N, C_out, oH, oW).
        in_indices: int32, (K_in,), one for each run, or None for all channels.
        counts: images of each run.
        packed: the packed weight of each run; None: they are packed for this call.
        route: as for :func:`bap_kernels.triton.ops.gathered_conv2d`.
    """
    if packed is None:
        packed = [_C.pack_weight(weight, None, index, by_input=False) for index in in_indices]
    kept = [run for run in zip(in_indices, counts, packed, strict=True) if run[1] > 0]
    if all(index is None for index, _, _ in kept):
        ops.gathered_conv2d(
            *(out, input, weight, None, None, stride, padding, dilation),
            epilogue=Epilogue(bias),
            packed=kept[0][2] if kept else None,
            route=route,
        )
        return
    target = target_of(input.device)
    x, geometry = ops.geometry_of(input, weight, out.shape[2:], stride, padding, dilation)
    with ops.on_device(input):
        channels = input.shape[1]
        indices = [_C.all_channels(channels, input.device) if index is None else index for index, _, _ in kept]
        weights = [weight_of_run for _, _, weight_of_run in kept]
        lists = _common_lists(indices, channels)
        if not any(each.length for each in lists):
            out.copy_(out.new_zeros(()) if bias is None else bias[:, None, None])
            return
        # Offsets count from tensors that have memory.
        lead = max(range(len(kept)), key=lambda r: lists[r].length)
        entries, lead_weight = lists[lead].entries, weights[lead]
        assert entries is not None
        runs, first = [], 0
        for (_, number, w), each in zip(kept, lists, strict=True):
            assert each.entries is not None
            runs.append(_Run(first, number, each.length, _offset(each.entries, entries), _offset(w, lead_weight)))
            first += number
        longest = ChannelList(entries, lists[lead].kind, lists[lead].length)
        route = route or ops.route_of(x, out, geometry, longest)
        every_filter = ChannelList(None, 0, weight.shape[0])
        table = functools.partial(_table, tuple(runs), weight)
        if route == "planar":
            step = launch.planar(
                *(out, x, lead_weight, longest, every_filter, target),
                epilogue=Epilogue(bias),
                mixed=table(math.prod(geometry.size), 0),
            )
        else:
            if route == "packed":
                x, longest = _compact(x, longest, table(math.prod(geometry.size), 0))
            config = launch.config_of(launch.forward_problem(geometry, longest, weight.shape[0]), x.dtype, target)
            step = launch.forward(
                *(out, x, lead_weight, geometry, longest, every_filter, target),
                epilogue=Epilogue(bias),
                mixed=table(math.prod(geometry.out_size), config.BM),
            )
        step.run()


def _compact(input: Tensor, longest: ChannelList, images: Mixed) -> tuple[Tensor, ChannelList]:
    """As :func:`bap_kernels.triton.ops.compact`, as wide as the longest list; shorter ones leave channels unwritten."""
    batch, _, height, width = input.shape
    padded = -(-longest.length // ALIGNMENT) * ALIGNMENT
    copy = input.new_empty((batch, height, width, padded))
    launch.pack(copy, input, longest, mixed=images).run()
    return copy.permute(0, 3, 1, 2), ChannelList(None, 0, padded)
