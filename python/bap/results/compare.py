r"""Baselines of a study, at the cost of the runs they are compared with, and differences paired by seed.

    dense          all domains in one network with every channel on
    narrow         the same, uniformly narrow, pre-trained at its width
    narrow-taught  the narrow network, which learns from the dense one as the method does
    shared-mask    one mask for all domains, chosen at once: |gradient × activation| of the dense network
    domain-masks   the same with a mask for each domain
    magnitude      one mask for all domains, by the magnitude of the pre-trained weights
    alone          a whole network for each domain

Each but `dense` and `alone` is matched: its FLOP ×, or its exact FLOP ×, is as near as can be to that of the run it
stands beside, and not above it. Masks are fixed from the start, and the network is trained from the pre-trained weights
for as many epochs as the others.
"""

from __future__ import annotations

import copy
import csv
import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bap_kernels as bk
from bap.config import Config, Distill
from bap.data import Domain
from bap.models import MODELS
from bap.prune.counting import Cost, count
from bap.prune.layers import SwitchBank, conv_specs
from bap.prune.masks import magnitude_scores, saliency_scores, write_masks
from bap.results.report import markdown_table
from bap.train.budget import project, switch_costs
from bap.train.checkpoint import load_checkpoint
from bap.train.distill import dense_settings
from bap.train.network import switched_network
from bap.train.processes import device_of
from bap.train.trainer import backend_of

__all__ = [
    "BASELINES",
    "MATCHES",
    "Comparison",
    "comparison_cells",
    "comparison_csv",
    "comparison_table",
    "matched_masks",
    "narrow_options",
    "paired_difference",
]

BASELINES = ("dense", "narrow", "narrow-taught", "shared-mask", "domain-masks", "magnitude", "alone")
MATCHES = ("flop", "exact_flop")
_SALIENCY_BATCHES = 16


def _masked(
    bank: SwitchBank, scores: Mapping[str, Tensor], costs: Tensor, share: float, keep: int
) -> dict[str, Tensor]:
    """The channels with the highest scores whose costs are at most a share."""
    lowest = torch.full((len(costs),), -1.0)
    return {
        name: project(value.float().cpu(), lowest, costs, share, bank.sizes, keep).scores > -1.0
        for name, value in scores.items()
    }


def _write(bank: SwitchBank, masks: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        limits = bank.thresholds(name)
        bank.write(name, torch.where(mask.to(limits.device), limits + 1.0, limits - 1.0))


def matched_masks(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    example: Tensor,
    match: str,
    target: float,
    keep_at_least: int = 1,
    rounds: int = 12,
) -> dict[str, Tensor]:
    """Masks by scores whose cost is as high as can be and at most a target.

    Args:
        model: a model with switches; a copy is counted.
        scores: {domain: (M,)}, not negative; the highest stay.
        example: (1, 3, H, W).
        match: ``"flop"`` or ``"exact_flop"``, see :class:`bap.prune.counting.Cost`.
        target: the cost.
        keep_at_least: of every layer.
        rounds: of the bisection over the share of multiply-adds.

    Returns:
        {domain: (M,) bool}.

    Raises:
        ValueError: if the target is below what the least masks cost.
    """
    model = copy.deepcopy(model)
    bank = SwitchBank(model)
    bk.set_domain(model, bank.domains[0])
    specs = conv_specs(model, example)
    costs = switch_costs("mac", {name: specs[name] for name in bank.names})
    best, low, high = None, 0.0, 1.0
    for number in range(rounds + 1):
        # The whole first: a target may be met by all channels.
        share = 1.0 if number == 0 else (low + high) / 2
        try:
            masks = _masked(bank, scores, costs, share, keep_at_least)
        except ValueError:
            # Less than one channel of every layer.
            low = share
            continue
        _write(bank, masks)
        if getattr(count(model, example), match) <= target:
            best, low = masks, share
            if share == 1.0:
                break
        else:
            high = share
    if best is None:
        raise ValueError(
            f"matched_masks(): expected `target` to leave room for {keep_at_least} channels of every layer, got "
            f"{target}."
        )
    return best


def narrow_options(config: Config, size: int, target: float) -> dict[str, Any] | None:
    """Options of the widest network, uniformly narrow, whose multiply-adds are at most a part of the backbone's.

    Args:
        config: the settings.
        size: of the input.
        target: the part, in (0, 1].

    Returns:
        None where the backbone has no option ``widths``, or none is narrow enough.
    """
    if "widths" not in MODELS[config.model.name].options:
        return None
    model = switched_network(config.replace(weights=None), {"a": 2})
    bk.set_domain(model, "a")
    whole = sum(spec.macs for spec in conv_specs(model, torch.zeros(1, 3, size, size)).values())
    widths = config.model.options.get("widths")
    if widths is None:
        stages = [getattr(model, f"layer{number}") for number in (1, 2, 3)]
        widths = [[m for m in stage.modules() if isinstance(m, nn.Conv2d)][-1].out_channels for stage in stages]
    best = None
    for part in range(100, 0, -1):
        narrow = [max(2, round(width * part / 100)) for width in widths]
        options = {**config.model.options, "widths": narrow}
        model = switched_network(config.replace(weights=None, model_options=options), {"a": 2})
        bk.set_domain(model, "a")
        if sum(spec.macs for spec in conv_specs(model, torch.zeros(1, 3, size, size)).values()) <= target * whole:
            best = options
            break
    return best


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> tuple[float, float | None, int]:
    """Mean of the differences over the seeds that both have, half of its 95 % interval, and their number.

    The interval is Student's; None for one seed.

    Examples:
        >>> from bap.results.compare import paired_difference
        >>> mean, half, seeds = paired_difference({0: 2.0, 1: 4.0, 2: 3.0}, {0: 1.0, 1: 2.0, 2: 3.0})
        >>> mean, round(half, 3), seeds
        (1.0, 2.484, 3)
    """
    differences = [values[seed] - reference[seed] for seed in values if seed in reference]
    if not differences:
        return math.nan, None, 0
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, None, 1
    from scipy.stats import t

    half = float(t.ppf(0.975, len(differences) - 1)) * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, half, len(differences)


class Comparison:
    """Runs the baselines of one seed, those that are missing.

    Args:
        config: settings of the seed, with the pre-trained weights.
        domains: the data.
        folder: of the study.
        run: ``run(config, name)``, the results of a run of that name, which is started or goes on where it is needed.
        pretrain: ``pretrain(config, name)``, the file of a backbone of other widths.
    """

    def __init__(
        self,
        config: Config,
        domains: Mapping[str, Domain],
        folder: Path,
        run: Callable[[Config, str], dict[str, Any]],
        pretrain: Callable[[Config, str], Path],
    ) -> None:
        # What shapes the switches' training is no part of a baseline.
        self.config = dense_settings(config)
        self.original = config
        self.domains, self.folder, self.run, self.pretrain = domains, folder, run, pretrain
        self.size = next(iter(domains.values())).size
        self._scores: dict[str, Tensor] | None = None

    @property
    def teacher(self) -> str:
        """Checkpoint of the dense network."""
        return str(self.folder / f"dense_seed{self.config.run.seed}" / "checkpoint")

    def dense(self) -> dict[str, Any]:
        """All channels on: at β = 1, with switches that do not move."""
        return self.run(self.config, f"dense_seed{self.config.run.seed}")

    def _saliency(self) -> dict[str, Tensor]:
        if self._scores is None:
            self.dense()
            model, _, _ = load_checkpoint(self.teacher)
            model.to(device_of(self.config.run.device))
            with bk.use_backend(backend_of(self.config)):
                self._scores = {
                    name: saliency_scores(copy.deepcopy(model), name, self._some_batches(domain))
                    for name, domain in self.domains.items()
                }
        return self._scores

    def _some_batches(self, domain: Domain) -> Any:
        batches = domain.batches("train", self.config.schedule.batch, (self.config.run.seed, "saliency"))
        return (batch for _, batch in zip(range(_SALIENCY_BATCHES), batches, strict=False))

    def masked(self, name: str, reference: str, match: str, target: float) -> dict[str, Any]:
        """A run with masks of a kind that are matched to a cost, named after the run that they are matched with."""
        model = switched_network(self.config, {name: len(domain.classes) for name, domain in self.domains.items()})
        if name == "magnitude":
            scores = dict.fromkeys(self.domains, magnitude_scores(model))
        elif name == "domain-masks":
            scores = self._saliency()
        else:
            # Domains count alike, whatever the size of their losses.
            parts = [value / value.sum().clamp_min(1e-30) for value in self._saliency().values()]
            scores = dict.fromkeys(self.domains, torch.stack(parts).sum(0))
        example = torch.zeros(1, 3, self.size, self.size)
        masks = matched_masks(model, scores, example, match, target, self.config.switches.keep_at_least)
        title = f"{name}_{match}_of_{reference}"
        path = self.folder / f"{title}.masks.safetensors"
        write_masks(path, SwitchBank(model), masks)
        return self.run(self.config.replace(fixed=str(path)), title)

    def narrow(self, target: float, teaching: Distill | None = None) -> dict[str, Any] | None:
        """A narrow network of at most a part of the multiply-adds; None where the backbone has no widths.

        Args:
            target: the part.
            teaching: how it learns from the dense network of its seed; None: it does not.
        """
        options = narrow_options(self.config, self.size, target)
        if options is None:
            return None
        title = "narrow_" + "-".join(map(str, options["widths"]))
        config = self.config.replace(model_options=options, weights=None)
        config = config.replace(weights=str(self.pretrain(config, title)))
        if teaching is not None:
            self.dense()
            config = config.replace(distill={**teaching.model_dump(), "teacher": self.teacher})
            title += "_taught"
        results = self.run(config, f"{title}_seed{config.run.seed}")
        return {**results, "cost": self._relative_to_the_backbone(results["cost"])}

    def _relative_to_the_backbone(self, cost: Mapping[str, Any]) -> dict[str, Any]:
        model = switched_network(self.config, {name: len(domain.classes) for name, domain in self.domains.items()})
        whole: Cost = count(model, torch.zeros(1, 3, self.size, self.size))
        macs, params = cost["backbone_macs"] / whole.backbone_macs, cost["backbone_params"] / whole.backbone_params
        return {
            **cost,
            "backbone_macs": whole.backbone_macs,
            "backbone_params": whole.backbone_params,
            "flop": cost["flop"] * macs,
            "exact_flop": cost["exact_flop"] * macs,
            "params": cost["params"] * params,
        }


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of baselines beside the runs that they are compared with.

    Args:
        rows: with ``beta``, ``method``, ``match`` ("reference", what a baseline is matched on, or ""), ``seed``,
            ``accuracy`` (mean, per cent), ``flop``, ``exact_flop``, ``params`` and ``seconds``.
    """
    return markdown_table(*comparison_cells(rows))


def comparison_cells(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of :func:`comparison_table`."""
    groups: dict[tuple[float, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["beta"], row["method"], row["match"]), []).append(row)
    references = {
        beta: {row["seed"]: row["accuracy"] for row in group}
        for (beta, _, match), group in groups.items()
        if match == "reference"
    }
    lines = []
    for (beta, method, match), group in sorted(groups.items(), key=lambda item: -item[0][0]):
        accuracies = {row["seed"]: row["accuracy"] for row in group}
        mean, half, seeds = paired_difference(accuracies, references.get(beta, {}))
        if match == "reference":
            shown = "–"
        elif seeds == 0:
            shown = "no common seed"
        else:
            shown = f"{mean:+.2f}" + (" (one seed)" if half is None else f" ± {half:.2f}")
        line = [f"{beta:g}", method, match.replace("_", " "), str(len(group))]
        line.append(f"{statistics.fmean(accuracies.values()):.2f}")
        line.append(shown)
        line += [f"{statistics.fmean([row[key] for row in group]):.3f}" for key in ("flop", "exact_flop", "params")]
        line.append(f"{statistics.fmean([row['seconds'] for row in group]):.0f}")
        lines.append(line)
    head = ["β", "method", "matched on", "seeds", "mean accuracy", "difference", "FLOP ×", "exact FLOP ×", "Params ×"]
    return [*head, "training, s"], lines


def comparison_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The compared runs as CSV, a row for each method and seed, at full precision, for other programs.

    Args:
        rows: mappings with ``seed``, ``beta``, ``method``, ``match``, ``accuracy`` (mean, per cent), ``flop``,
            ``exact_flop``, ``params`` and ``seconds``.

    Examples:
        >>> from bap.results.compare import comparison_csv
        >>> costs = {"flop": 1.0, "exact_flop": 1.0, "params": 1.0, "seconds": 9.5}
        >>> row = {"seed": 0, "beta": 0.5, "method": "dense", "match": "", "accuracy": 61.25, **costs}
        >>> print(comparison_csv([row]).replace(chr(13), ""), end="")
        seed,beta,method,match,accuracy,flop,exact_flop,params,seconds
        0,0.5,dense,,61.25,1.0,1.0,1.0,9.5
    """
    text = io.StringIO()
    names = ("seed", "beta", "method", "match", "accuracy", "flop", "exact_flop", "params", "seconds")
    writer = csv.DictWriter(text, names, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
