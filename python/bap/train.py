r"""Joint training of all domains under their budgets:  Σ_d [ CE_d + L_B,d ] + λ_PS L_PS   (BAP, arXiv 2309.11464).

A step is of one domain: it takes the gradient of the whole objective in what that domain owns, its switches, batch norm
and classifier, while the other domains' switches are constants [R]. Over a round of domains that is the whole gradient.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bap_kernels as bk
from bap.budget import Multiplier, project, share, switch_costs
from bap.config import Config
from bap.data import Domain
from bap.evaluate import Accuracy, evaluate
from bap.facts import SwitchBank, conv_facts
from bap.files import FileError, remove_leftovers
from bap.journal import Journal
from bap.network import source_of, switched_network
from bap.processes import Processes
from bap.resume import check_same_data, check_same_settings, data_facts, learning_rate, weights_digest
from bap.sharing import SharingWeight, intersection, relax, sharing_loss, union
from bap.state import load_state, save_state

__all__ = ["TrainError", "Trainer", "backend_of", "check_splits", "learning_rate"]

STATE = "state.safetensors"


class TrainError(RuntimeError):
    """Training cannot go on: a loss or a parameter is not finite."""


def backend_of(config: Config) -> str:
    """The kernels of a run: never ``auto``, whose choice is measured and may differ between two runs."""
    if config.backend is not None:
        return config.backend
    from bap_kernels import _C

    return "native" if config.device == "cpu" and _C.why_not("native") is None else "aten"


def check_splits(domains: Mapping[str, Domain], evaluate_on: str) -> None:
    """Refuses data that would be missed after an epoch, or after all of them.

    Args:
        domains: the data.
        evaluate_on: the split of the accuracies, which needs labels.

    Raises:
        ValueError: if a domain lacks images or labels of ``train`` or ``evaluate_on``.
    """
    for name, domain in domains.items():
        for split in ("train", evaluate_on):
            held = domain.splits.get(split)
            found = "no such split" if held is None else "no images" if not len(held) else "no labels"
            if held is None or not len(held) or held.labels is None:
                raise ValueError(
                    f"check_splits(): expected {name!r} to have images with labels in {split!r}, got {found}. "
                    + ("Hint: evaluate_on chooses the split of the accuracies." if split != "train" else "")
                )


class Trainer:
    """Trains one network for all domains.

    Args:
        config: the settings.
        domains: the data, {name: Domain}.
        folder: where state, metrics and results go; None keeps nothing.
        resume: go on from the folder's state, if there is one.
        progress: as in :class:`bap.journal.Journal`.
        milliseconds: for the measure ``time``, see :func:`bap.timing.measure_layers`.
        fixed_milliseconds: what the layers take without channels, for ``budget_ms``.
        model: a network to go on with, which may have further domains: these stay as they are, and the sharing loss
            sees them. None makes a new one.

    Attributes:
        model: the network.
        bank: its switches.
        costs: (M,), a.
        beta: β.
        epoch: epochs that are done.
        taken: {domain: switches that the projection turned off}.

    Raises:
        ValueError: for settings that do not fit the data, or, to go on, are not those of the state.
        FileError: if the state is damaged or of another network.
    """

    def __init__(
        self,
        config: Config,
        domains: Mapping[str, Domain],
        folder: str | Path | None = None,
        resume: bool = False,
        progress: bool | None = None,
        milliseconds: Mapping[str, float] | None = None,
        fixed_milliseconds: float = 0.0,
        model: nn.Module | None = None,
    ) -> None:
        self.config = config
        self.domains = dict(domains)
        self.folder = None if folder is None else Path(folder)
        check_splits(self.domains, config.evaluate_on)
        self.processes = Processes(config.device)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        classes = {name: len(one.classes) for name, one in self.domains.items()}
        self.model = switched_network(config, classes) if model is None else model
        self.model.to(self.processes.device)
        self.bank = SwitchBank(self.model)
        self.size = next(iter(self.domains.values())).size
        bk.set_domain(self.model, next(iter(self.domains)))
        example = torch.zeros(1, 3, self.size, self.size, device=self.processes.device)
        self.facts = conv_facts(self.model, example)
        switched = {name: self.facts[name] for name in self.bank.names}
        self.costs = switch_costs(config.measure, switched, milliseconds)
        self._weights = (self.costs / self.costs.sum()).float().to(self.processes.device)
        self.beta = config.beta
        if config.budget_ms is not None:
            self.beta = min(1.0, (config.budget_ms - fixed_milliseconds) / float(self.costs.sum()))
            if self.beta <= 0:
                raise ValueError(
                    f"Trainer(): expected `budget_ms` to be above {fixed_milliseconds:.3f} ms, which the layers take "
                    f"without channels, got {config.budget_ms}."
                )
        source = source_of(config, self.domains)
        self.dense = {source} if config.source_mode == "dense" and source in self.domains else set()
        self.multipliers = {
            name: Multiplier(self.beta, config.multiplier_rate) for name in self.domains if name not in self.dense
        }
        self.weight = SharingWeight(
            config.sharing_weight, config.sharing_learnable, config.sharing_rate, config.sharing_slack
        )
        self._weights_digest = weights_digest(config)
        self.epoch = 0
        self.taken: dict[str, int] = {}
        self._set_trainable()
        self.optimizers = self._optimizers()
        self.scaler = torch.amp.GradScaler(self.processes.device.type, enabled=config.amp == "fp16")
        if self.folder is not None and resume and (self.folder / STATE).exists():
            self._load(self.folder / STATE)
        if self.folder is not None and self.processes.first:
            remove_leftovers(self.folder)
        self.run: nn.Module = self.processes.parallel(self.model)
        kept = self.folder if self.processes.first else None
        self.journal = Journal(
            kept, config.epochs, self.epoch, progress if self.processes.first else False, config.log_every
        )

    def _set_trainable(self) -> None:
        own = {name for name, _ in bk.nn.domain_parameters(self.model)}
        for name, parameter in self.model.named_parameters():
            if name not in own:
                parameter.requires_grad_(self.config.train_backbone)
        for name in self.dense | (set(self.bank.domains) - set(self.domains)):
            self._freeze(name)

    def _freeze(self, domain: str) -> None:
        for switch in self.bank.of(domain):
            switch.score.requires_grad_(False)

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        config = self.config
        groups: dict[str, list[nn.Parameter]] = {"switch": [], "norm": [], "head": [], "backbone": []}
        heads = {p for m in self.model.modules() if isinstance(m, bk.nn.DomainLinear) for p in m.parameters()}
        own = {parameter for _, parameter in bk.nn.domain_parameters(self.model)}
        for name, parameter in self.model.named_parameters():
            if name.endswith(".score"):
                groups["switch"].append(parameter)
            elif parameter in heads:
                groups["head"].append(parameter)
            else:
                groups["norm" if parameter in own else "backbone"].append(parameter)
        adam = [
            {"params": groups["switch"], "lr": config.lr_switch, "base": config.lr_switch},
            {"params": groups["norm"], "lr": config.lr_norm, "base": config.lr_norm},
        ]
        sgd = [{"params": groups["head"], "lr": config.lr_head, "base": config.lr_head}]
        if config.train_backbone:
            sgd.append({"params": groups["backbone"], "lr": config.lr_backbone, "base": config.lr_backbone})
        return {
            "adam": torch.optim.Adam(adam),
            "sgd": torch.optim.SGD(sgd, momentum=config.momentum, weight_decay=config.weight_decay),
        }

    @property
    def settled(self) -> bool:
        """Whether switches are projected and fixed."""
        return self.epoch >= self.config.settle * self.config.epochs

    def fit(self, until: int | None = None, after_epoch: Callable[[dict[str, Any]], None] | None = None) -> None:
        """Trains up to an epoch, or to the end, where the budgets hold exactly.

        Args:
            until: the epoch to stop after; None is the last one.
            after_epoch: called with the record of every epoch, after the state was written.

        Raises:
            FileError: if a file cannot be written, or another run writes into the folder.
            TrainError: if a loss or a parameter is not finite; the state of the last epoch stays.
        """
        last = self.config.epochs if until is None else min(until, self.config.epochs)
        with self.processes.lock(self.folder), bk.use_backend(backend_of(self.config)):
            if self.settled:
                self._fix_switches()
            while self.epoch < last:
                record = self._one_epoch()
                self.epoch += 1
                record["epoch"] = self.epoch
                if self.settled or self.epoch == self.config.epochs:
                    self._fix_switches()
                self._describe(record)
                # First the record: a resumed run drops records that no state belongs to.
                self.journal.add(record)
                if self.folder is not None and self.processes.first:
                    self._save(self.folder / STATE)
                self.processes.wait()
                if after_epoch is not None:
                    after_epoch(record)

    def _one_epoch(self) -> dict[str, Any]:
        config = self.config
        started = time.perf_counter()
        # Whatever draws from the global generator, such as dropout, draws the same after a resumption.
        torch.manual_seed(config.seed * 1_000_003 + self.epoch)
        factor = learning_rate(config.schedule, self.epoch, config.epochs)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * factor
        self.run.train()
        seen = {name: Accuracy() for name in self.domains}
        steps = sum(
            max(1, len(one.splits["train"]) // self.processes.world // config.batch) for one in self.domains.values()
        )
        for number, (name, x, y) in enumerate(self._turns(), 1):
            self._step(name, x, y, seen[name])
            self.journal.step(self.epoch + 1, number, steps, name, seen[name].mean_loss)
        self._check_finite()
        losses = {name: one.reduced() for name, one in seen.items()}
        return {
            "epoch": self.epoch,
            "seconds": time.perf_counter() - started,
            "rate": factor,
            "domains": {name: {"loss": one.mean_loss, "accuracy": one.percent} for name, one in losses.items()},
        }

    def _check_finite(self) -> None:
        # The last step's gradient is seen by no loss.
        for name, parameter in self.model.named_parameters():
            if not bool(parameter.detach().isfinite().all()):
                raise self._not_finite(f"parameter {name!r}")

    def _not_finite(self, what: str) -> TrainError:
        rates = {name: getattr(self.config, name) for name in ("lr_switch", "lr_norm", "lr_head")}
        if self.config.train_backbone:
            rates["lr_backbone"] = self.config.lr_backbone
        return TrainError(
            f"Trainer.fit(): expected losses and parameters to stay finite, got another {what} in epoch "
            f"{self.epoch + 1}. Hint: lower a learning rate of {rates}. What was saved of earlier epochs is unchanged."
        )

    def _turns(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        config, processes = self.config, self.processes
        key = (config.seed, self.epoch)
        streams = {
            name: one.batches("train", config.batch, key, processes.rank, processes.world)
            for name, one in self.domains.items()
        }
        if config.round_robin == "epoch":
            for name, stream in streams.items():
                for x, y in stream:
                    yield name, x, y
            return
        # Every domain is seen once in an epoch: one with fewer images takes its turns farther apart.
        each = {
            name: max(1, len(one.splits["train"]) // processes.world // config.batch)
            for name, one in self.domains.items()
        }
        turns = sorted(((turn + 0.5) / count, name) for name, count in each.items() for turn in range(count))
        for _, name in turns:
            batch = next(streams[name], None)
            if batch is not None:
                yield name, *batch

    def _step(self, name: str, x: Tensor, y: Tensor, seen: Accuracy) -> None:
        config, device = self.config, self.processes.device
        bk.set_domain(self.model, name)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        parts = list(zip(x.to(device).chunk(config.accumulate), y.to(device).chunk(config.accumulate), strict=True))
        for number, (images, labels) in enumerate(parts):
            last = number == len(parts) - 1
            with contextlib.nullcontext() if last else self.processes.no_sync(self.run):
                with self._autocast():
                    logits = self.run(images)
                loss = F.cross_entropy(logits.float(), labels)
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise self._not_finite(f"loss of {name!r}, {value},")
                seen.add(logits.detach(), labels, value)
                total = loss * (len(images) / len(x))
                if last and name in self.multipliers and not self.settled:
                    total = total + self._penalty(name)
                self.scaler.scale(total).backward()
        for optimizer in self.optimizers.values():
            self.scaler.step(optimizer)
        self.scaler.update()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.amp is None:
            return contextlib.nullcontext()
        dtype = torch.bfloat16 if self.config.amp == "bf16" else torch.float16
        return torch.autocast(self.processes.device.type, dtype)

    def _penalty(self, name: str) -> Tensor:
        """λ_d-weighted budget and λ_PS-weighted sharing loss in one domain's switches; one step of dual ascent."""
        config = self.config
        switches = self.bank.switches(name)
        used = share(switches, self._weights)
        multiplier = self.multipliers[name]
        total = multiplier.loss(used)
        others = [one for one in self.bank.domains if one != name and one not in self.dense]
        if config.sharing is not None and others:
            if config.relaxed:
                rows = [self._relaxed(name), *(self._relaxed(one).detach() for one in others)]
            else:
                rows = [switches, *(self.bank.mask(one).to(switches.dtype) for one in others)]
            loss = sharing_loss(config.sharing, torch.stack(rows), self._weights, self.beta)
            total = total + self.weight.value * loss
            self.weight.update(float(loss.detach()))
        multiplier.update(float(used.detach()))
        return total

    def _relaxed(self, name: str) -> Tensor:
        return relax(self.bank.scores(name), self.bank.thresholds(name), self.config.temperature)

    def used(self, domain: str) -> float:
        """θ̄ of a domain, exact."""
        return float(share(self.bank.mask(domain).cpu(), self.costs))

    def _fix_switches(self) -> None:
        """Projects every domain whose budget does not hold, and fixes all switches."""
        for name in self.multipliers:
            made = project(
                self.bank.scores(name),
                self.bank.thresholds(name),
                self.costs,
                self.beta,
                self.bank.sizes,
                self.config.keep_at_least,
            )
            if made.taken:
                self.bank.write(name, made.scores)
                self._recalibrate(name)
            self.taken[name] = self.taken.get(name, 0) + made.taken
            self._freeze(name)

    def _recalibrate(self, name: str) -> None:
        processes = self.processes
        key = (self.config.seed, self.epoch, "recalibrate")
        batches = self.domains[name].batches("train", self.config.batch, key, processes.rank, processes.world)
        bk.nn.recalibrate_bn(self.model, batches, name, 16)
        processes.average_statistics(self.run, name)

    def _describe(self, record: dict[str, Any]) -> None:
        processes = self.processes
        for name, one in record["domains"].items():
            found = evaluate(
                self.model, self.domains[name], self.config.evaluate_on, rank=processes.rank, world=processes.world
            )
            used = self.used(name)
            one.update(evaluated=found.percent, kept=used, gap=used - self.beta)
            one["multiplier"] = self.multipliers[name].value if name in self.multipliers else 0.0
        masks = self.bank.masks().cpu().double()
        total = float(self.costs.sum())
        record["intersection"] = float(intersection(masks, self.costs)) / total
        record["union"] = float(union(masks, self.costs)) / total
        record["sharing_weight"] = self.weight.value
        record["taken"] = sum(self.taken.values())

    def _save(self, path: Path) -> None:
        facts = {
            "epoch": self.epoch,
            "multipliers": {name: one.value for name, one in self.multipliers.items()},
            "sharing_weight": self.weight.value,
            "taken": self.taken,
            "scaler": self.scaler.state_dict(),
            "config": self.config.as_dict(),
            "data": data_facts(self.domains),
            "weights": self._weights_digest,
        }
        save_state(path, self.model, self.optimizers, facts)

    def _load(self, path: Path) -> None:
        try:
            facts = load_state(path, self.model, self.optimizers, self._check_same)
            self.epoch = int(facts["epoch"])
            for name, value in facts["multipliers"].items():
                self.multipliers[name].value = float(value)
            self.weight.value = float(facts["sharing_weight"])
            self.taken = dict(facts["taken"])
            self.scaler.load_state_dict(facts["scaler"])
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise FileError(f"Trainer(): expected {path} to be a state as a run writes it, got {error!r}.") from None

    def _check_same(self, facts: Mapping[str, Any], path: Path) -> None:
        stored = facts["config"]
        check_same_settings(stored, self.config, str(path), facts["epoch"], facts.get("weights"))
        check_same_data(facts.get("data"), self.domains, path)
