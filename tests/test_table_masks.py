"""Tables from the masks of other tools; those of zeros in weights are in plan/test_zeroed.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import bap_kernels as bk
from bap_kernels import ChannelLists, ChannelTable

IN = [True, False, True, True, False, True]


@pytest.mark.parametrize(
    "mask", [IN, [1, 0, 1, 1, 0, 1], np.array(IN), torch.tensor(IN), torch.tensor(IN).float()], ids=str
)
def test_masks_of_input_channels(mask: object) -> None:
    table = ChannelTable.from_masks({"birds": {"conv": mask}, "cars": {"conv": [1] * 6}})
    assert table["birds"] == {"conv": ChannelLists([0, 2, 3, 5])}
    assert table["cars"] == {"conv": ChannelLists()}
    assert table.notes == {"birds": {"conv": "reads 4 of 6"}, "cars": {"conv": "reads 6 of 6"}}


@pytest.mark.parametrize("both", [False, True])
def test_masks_of_weights(both: bool) -> None:
    mask = torch.zeros(4, 6, 3, 3, dtype=torch.bool)
    mask[0, 2, 1, 1] = mask[3, 5, 0, 2] = mask[3, 2, 0, 0] = True
    with pytest.warns(UserWarning, match="masks of 1 layers also zero"):
        table = ChannelTable.from_masks({"birds": {"conv.weight": mask}}, both)
    assert table["birds"] == {"conv": ChannelLists([2, 5], [0, 3] if both else None)}
    note = "reads 2 of 6; 2 of 4 filters are masked" + ("" if both else ", which has no effect without `both`")
    # Of the two filters and two channels that are left, all but three.
    assert table.notes["birds"]["conv"] == f"{note}; 33 single weights are masked, which has no effect"


@torch.no_grad()
def test_masked_network_equals_network_with_the_masks_lists() -> None:
    """Several tasks' masks over one set of weights: each task's results are those of its masked weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3)).double().eval()
    masks, x = {}, torch.randn(2, 3, 9, 9).double()
    expected = {}
    for task in ("birds", "cars"):
        kept = torch.rand(8) < 0.5
        masks[task] = {"2.weight_mask": kept.view(1, -1, 1, 1).expand(5, -1, 3, 3)}
        masked = model[2].weight * kept.view(1, -1, 1, 1)
        expected[task] = torch.conv2d(model[1](model[0](x)), masked, model[2].bias)
    swapped = bk.attach_(bk.swap_(model), ChannelTable.from_masks(masks, model=model))
    for task, y in expected.items():
        bk.set_domain(swapped, task)
        torch.testing.assert_close(swapped(x), y)


def test_tables_are_saved_without_their_notes(tmp_path) -> None:
    table = ChannelTable.from_masks({"birds": {"conv": IN}})
    table.save(tmp_path / "table")
    loaded = ChannelTable.load(tmp_path / "table")
    assert loaded == table
    assert loaded.notes == {}


@pytest.mark.parametrize(
    ("masks", "kind", "message"),
    [
        ([IN], TypeError, r"to be a mapping \{domain: \{layer: mask\}\}, got list"),
        ({"birds": IN}, TypeError, "to be a mapping"),
        (
            {"birds": {"conv": "110"}},
            TypeError,
            "sequences of numbers, got str for layer 'conv' in",
        ),
        (
            {"birds": {"conv": torch.ones(2, 3)}},
            ValueError,
            r"the shape \(C_in,\) or .*, got \(2, 3\) for layer",
        ),
        ({"birds": {"conv": []}}, ValueError, r"got \(0,\) for layer 'conv' in domain 'birds'"),
        ({"birds": {"conv": [0.5, 1]}}, ValueError, "to hold 0 and 1 only, got 0.5 for layer .* Hint: compare scores"),
        ({"birds": {"conv": [float("nan"), 1]}}, ValueError, "to hold 0 and 1 only, got nan"),
        (
            {"birds": {"conv": IN, "conv.weight": IN}},
            ValueError,
            "one mask for layer 'conv' in .*, got two",
        ),
    ],
)
def test_what_is_no_mask_is_refused(masks: object, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=rf"ChannelTable\.from_masks\(\): .*{message}"):
        ChannelTable.from_masks(masks)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layer", "mask", "message"),
    [
        ("conv3", IN, "to name convolutions of `model`, got no such layer for layer 'conv3' in domain 'birds'"),
        ("1", IN, "to name convolutions of `model`, got a ReLU for layer '1'"),
        ("0", IN[:5], r"to have the shape \(6,\) or \(4, 6, 3, 3\) for layer '0' in domain 'birds', got \(5,\)\.$"),
        ("0", IN[:4], r"got \(4,\)\. Hint: a mask of filters needs the weight's shape\."),
        ("0", torch.ones(4, 6, 2, 1), r"got \(4, 6, 2, 1\)"),
    ],
)
def test_masks_that_do_not_fit_the_model_are_refused(layer: str, mask: object, message: str) -> None:
    model = nn.Sequential(nn.Conv2d(6, 4, 3), nn.ReLU())
    with pytest.raises(ValueError, match=message):
        ChannelTable.from_masks({"birds": {layer: mask}}, model=model)
