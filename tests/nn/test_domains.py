"""domain_names: what the numbers of domains mean, and that nothing changes it."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import bap_kernels as bk
from bap_kernels import ChannelLists, ChannelTable

NAMES = ["z", "a", "m"]
X = torch.randn(3, 3, 6, 5)


def _switched(names: list[str] = NAMES) -> nn.Module:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    model = bk.nn.switch_(plain, names, heads=dict.fromkeys(names, 2)).eval()
    # Values that depend on the name alone.
    with torch.no_grad():
        for number, name in enumerate(sorted(names)):
            model[0].domains[name].score[number] = 0
            model[1].domains[name].bias += number
            model[4].domains[name].bias += 10 * number
    return model


def _attached(names: list[str] = NAMES) -> nn.Module:
    torch.manual_seed(0)
    model = bk.swap_(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)).eval())
    lists = {name: ChannelLists([number]) for number, name in enumerate(sorted(names))}
    return bk.attach_(model, {name: {"0": lists[name], "1": lists[name]} for name in names})


def _by_number(model: nn.Module) -> list[torch.Tensor]:
    """The results of each sample in the domain of each number, by way of mixed batches."""
    results = []
    with torch.no_grad():
        for numbers in itertools.permutations(range(3)):
            bk.set_domain(model, torch.tensor(numbers))
            results.append(model(X))
    bk.set_domain(model, "a")
    return results


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _state(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for value in other.parameters():
            value.zero_()
    other.load_state_dict(model.state_dict())
    return other


def _planned(model: nn.Module) -> nn.Module:
    return bk.plan(model, X, "a")


def _moved(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double().float().train().eval()


def _wrapped(model: nn.Module) -> nn.Module:
    return nn.Sequential(model)


@pytest.mark.parametrize("travel", [copy.deepcopy, _pickled, _saved, _state, _planned, _moved, _wrapped])
@pytest.mark.parametrize("make", [_switched, _attached])
def test_domain_numbers_survive_copies_and_moves(
    make: Callable[[], nn.Module], travel: Callable[[nn.Module], nn.Module]
) -> None:
    model = make()
    assert bk.domain_names(model) == NAMES
    expected = []
    with torch.no_grad():
        for numbers in itertools.permutations(range(3)):
            rows = []
            for sample, number in zip(X.split(1), numbers, strict=True):
                bk.set_domain(model, NAMES[number])
                rows.append(model(sample))
            expected.append(torch.cat(rows))
    bk.set_domain(model, "a")
    for duplicate in (model, travel(model)):
        assert bk.domain_names(duplicate) == NAMES
        for result, wanted in zip(_by_number(duplicate), expected, strict=True):
            torch.testing.assert_close(result, wanted)


def test_domain_order_survives_swap_and_a_file(tmp_path: Path) -> None:
    model = _switched()
    table = ChannelTable.from_switches(model)
    assert list(table) == NAMES
    table.save(tmp_path / "table.safetensors")
    loaded = ChannelTable.load(tmp_path / "table.safetensors")
    assert list(loaded) == NAMES
    assert list(loaded.density(model)) == NAMES
    expected = _by_number(model)
    bk.swap_(model)
    assert bk.domain_names(model) == NAMES
    # Another order in the table: the layers' own decides.
    bk.attach_(model, {name: loaded[name] for name in sorted(NAMES)})
    assert bk.domain_names(model) == NAMES
    assert list(model[0].lists) == NAMES
    for result, wanted in zip(_by_number(model), expected, strict=True):
        torch.testing.assert_close(result, wanted)


def test_checkpoints_load_by_name_and_keep_the_models_numbers() -> None:
    model, other = _switched(), _switched(sorted(NAMES))
    with torch.no_grad():
        for value in model.parameters():
            value += 0.1 * torch.randn_like(value) * (value.dim() > 1)
    other.load_state_dict(model.state_dict(), strict=True)
    assert bk.domain_names(other) == sorted(NAMES)
    for name in NAMES:
        bk.set_domain(model, name)
        bk.set_domain(other, name)
        assert torch.equal(model(X), other(X))


def test_added_domains_have_the_last_number() -> None:
    model = bk.nn.add_domain_(_switched(), "b", like="a", classes=2)
    assert bk.domain_names(model) == [*NAMES, "b"]
    assert bk.domain_names(copy.deepcopy(model)) == [*NAMES, "b"]


def test_domains_of_only_some_layers_have_no_number() -> None:
    model = _switched()
    model[1].add_domain("only here")
    assert bk.domain_names(model) == NAMES


def test_different_orders_raise_for_numbers_and_work_for_names() -> None:
    model = nn.Sequential(_switched()[:2], _switched(sorted(NAMES))[1])
    message = r"one order.*got \['.*'\] and \['.*'\]. Hint: attach_ one table"
    with pytest.raises(ValueError, match=message):
        bk.domain_names(model)
    with pytest.raises(ValueError, match=message):
        bk.set_domain(model, torch.tensor([0, 1, 2]))
    bk.set_domain(model, "z")
    assert model(X).shape == (3, 4, 6, 5)


def test_a_model_without_domains_has_no_names() -> None:
    assert bk.domain_names(nn.Sequential(nn.Conv2d(3, 4, 1))) == []
    assert bk.domain_names(bk.swap_(nn.Sequential(nn.Conv2d(3, 4, 1)))) == []
