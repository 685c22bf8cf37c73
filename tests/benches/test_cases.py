"""The cases of the speed-up study: layers of networks, and the lists that they are run with."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

from benches.cases import BATCHES, CASES, DENSITIES, LAYOUTS, LISTS, default_cells, full_cells
from benches.network_models import NETWORKS

SMALL = next(cell for cell in full_cells() if cell.case.shape == "8x8-256-256-k3s1")


@pytest.mark.parametrize("network", ["resnet50", "resnet26"])
def test_cases_are_the_convolutions_of_the_networks(network: str) -> None:
    build, size = NETWORKS[network]
    counts: Counter[tuple[int, ...]] = Counter()

    def hook(conv: nn.Conv2d, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        H, W = inputs[0].shape[2:]
        k = conv.kernel_size[0]
        assert conv.kernel_size == (k, k)
        assert conv.padding == (k // 2, k // 2)
        assert conv.dilation == (1, 1)
        assert conv.groups == 1
        assert conv.bias is None
        counts[(H, W, conv.in_channels, conv.out_channels, k, conv.stride[0], *output.shape[2:])] += 1

    with torch.device("meta"):
        model = build().eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(hook)
        model(torch.empty(1, 3, size, size))
    table = {
        (c.H, c.W, c.C_in, c.C_out, c.kernel, c.stride, *c.output_size): c.count for c in CASES if c.network == network
    }
    assert dict(counts) == table


def test_ragged_lists_are_drawn_channel_by_channel() -> None:
    cells = [cell for cell in full_cells(lists=("both_ragged",), batches=(1,)) if cell.case.C_in >= 64]
    shares = []
    for cell in cells:
        read, written = cell.channel_lists()
        assert (cell.K_in, cell.K_out) == (len(read), len(written))
        assert read.dtype == torch.int32
        assert torch.equal(read, read.unique())
        assert torch.equal(read, cell.channel_lists()[0])
        shares.append(len(read) / cell.case.C_in - cell.density)
    # Several hundred channels in each of a hundred draws.
    assert abs(sum(shares) / len(shares)) < 0.03
    assert len({round(share, 4) for share in shares}) > len(shares) // 4
    in_only = next(iter(full_cells(lists=("in_ragged",))))
    assert in_only.channel_lists()[1] is None
    assert in_only.K_out == in_only.case.C_out
    assert "in_ragged" in in_only.id


def test_full_cells_cover_every_setting_once() -> None:
    cells = full_cells()
    assert len(cells) == len(CASES) * len(BATCHES) * len(DENSITIES) * len(LISTS) * len(LAYOUTS)
    assert len({cell.id for cell in cells}) == len(cells)
    assert set(default_cells()) <= set(cells)
    assert "resnet50-b1-56x56-64-64-k3s1-d50-in-nchw" in {cell.id for cell in cells}


def test_lists_are_sorted_unique_and_depend_on_the_case_alone() -> None:
    cell = replace(SMALL, lists="both", density=0.25)
    in_index, out_index = cell.channel_lists()
    assert in_index.dtype == torch.int32
    assert in_index.tolist() == sorted(set(in_index.tolist()))
    assert len(in_index) == cell.K_in == 64
    assert out_index is not None
    assert len(out_index) == cell.K_out == 64
    assert torch.equal(in_index, replace(cell, lists="in", layout="nchw", batch=8).channel_lists()[0])
    assert not torch.equal(in_index, out_index)
