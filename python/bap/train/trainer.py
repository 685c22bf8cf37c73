r"""Joint training of all domains under their budgets:  Σ_d [ CE_d + L_B,d ] + λ_PS L_PS   (BAP, arXiv 2309.11464).

A batch is of one domain: it takes the gradient of the whole objective in what that domain owns, its switches, batch
norm and classifier, while the other domains' switches are constants [R]. Over a round of domains that is the whole
gradient. A step is of one batch, or, jointly, of one of every domain.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bap_kernels as bk
from bap.config import Config
from bap.data import Domain
from bap.files import FileError, remove_leftovers
from bap.prune.layers import SwitchBank, conv_specs
from bap.prune.masks import fix_switches
from bap.train.budget import Multiplier, beta_of, check_room, project, share, switch_costs
from bap.train.distill import Teacher, distillation_loss, guarded
from bap.train.domains import source_of
from bap.train.evaluate import Accuracy, check_splits, evaluate
from bap.train.finite import CHECKED_EVERY, TrainError, check_losses, check_parameters
from bap.train.layer_times import LayerTimes
from bap.train.network import switched_network
from bap.train.objective import Objective, warn_of_vanishing_gradients
from bap.train.optimizers import optimizers_of
from bap.train.processes import Processes
from bap.train.resume import Origin
from bap.train.run_log import RunLog
from bap.train.schedule import annealed_budget, batches_of, learning_rate, sharing_factor, steps_of_epoch
from bap.train.sharing import SharingWeight, intersection, union
from bap.train.state import load_state, save_state

__all__ = ["TrainError", "Trainer", "backend_of"]

STATE = "state.safetensors"


def backend_of(config: Config) -> str:
    """The kernels of a run. ``auto`` has to be asked for: its choice is measured, and may differ between two runs."""
    return config.run.backend or "heuristic"


class Trainer:
    """Trains one network for all domains.

    The constructor checks its arguments and keeps them. :meth:`open` joins the other processes, seeds, builds the
    network and loads the state; :meth:`fit` does so where it was not done.

    Args:
        config: the settings.
        domains: the data, {name: Domain}.
        folder: where state, metrics and results go; None keeps nothing.
        resume: go on from the folder's state, if there is one.
        progress: as in :class:`bap.train.run_log.RunLog`.
        layer_times: for the measure ``time``, see :func:`bap.train.layer_times.measure_layers`.
        model: a network to go on with, which may have further domains: these stay as they are, and the sharing loss
            sees them. None makes a new one.

    Attributes:
        model: the network; it and the following attributes exist once the trainer is open.
        bank: its switches, s.
        costs: (M,), a.
        beta: β.
        multipliers: {domain: λ_d, of its budget}.
        sharing_weight: λ_PS.
        epoch: epochs that are done.
        projected_off: {domain: switches that the projection turned off}.
        given_back: {domain: switches that it turned on}, see ``budget.give_back``.

    Raises:
        ValueError: if a domain lacks images or labels.
    """

    def __init__(
        self,
        config: Config,
        domains: Mapping[str, Domain],
        folder: str | Path | None = None,
        resume: bool = False,
        progress: bool | None = None,
        layer_times: LayerTimes | None = None,
        model: nn.Module | None = None,
    ) -> None:
        check_splits(domains, config.data.evaluate_on)
        self.config = config
        self.domains = dict(domains)
        self.folder = None if folder is None else Path(folder)
        self.resume = resume
        self.progress = progress
        self.layer_times = layer_times
        self.size = next(iter(self.domains.values())).size
        self.is_open = False
        self._given_model = model

    def open(self) -> Trainer:
        """Prepares training; a second call does nothing.

        Returns:
            The trainer itself.

        Raises:
            ValueError: for settings that do not fit the data, or, to go on, are not those of the state.
            FileError: if the state is damaged or of another network.
        """
        if self.is_open:
            return self
        config = self.config
        self.processes = Processes(config.run.device)
        if config.run.threads is not None:
            torch.set_num_threads(config.run.threads)
        self._build(self._given_model)
        self.epoch = 0
        self.projected_off: dict[str, int] = {}
        self.given_back: dict[str, int] = {}
        if config.switches.fixed is not None:
            fix_switches(config.switches.fixed, self.bank, list(self.multipliers), config.switches.initial)
        self._set_trainable()
        self.optimizers = optimizers_of(self.model, config)
        self.scaler = torch.amp.GradScaler(self.processes.device.type, enabled=config.run.amp == "fp16")
        first = self.processes.first
        if self.folder is not None:
            if self.resume and (self.folder / STATE).exists():
                self._load(self.folder / STATE)
            if first:
                remove_leftovers(self.folder)
        self.ddp_model = self.processes.parallel(self.model)
        self.log = RunLog(
            self.folder if first else None,
            config.schedule.epochs,
            self.epoch,
            self.progress if first else False,
            config.run.log_every,
            config.run.log_seconds,
        )
        self.is_open = True
        return self

    def _build(self, model: nn.Module | None) -> None:
        """Builds the network, its budgets and its losses."""
        config, device = self.config, self.processes.device
        classes = {name: len(domain.classes) for name, domain in self.domains.items()}
        self.model = (switched_network(config, classes) if model is None else model).to(device)
        self.bank = SwitchBank(self.model)
        bk.set_domain(self.model, next(iter(self.domains)))
        specs = conv_specs(self.model, torch.zeros(1, 3, self.size, self.size, device=device))
        times = self.layer_times
        self.costs = switch_costs(
            config.budget.measure,
            {name: specs[name] for name in self.bank.names},
            None if times is None else times.per_channel,
        )
        self.beta = beta_of(config.budget, self.costs, 0.0 if times is None else times.fixed)
        distill = config.distill
        self.teacher = Teacher(str(distill.teacher), self.domains, device) if distill.weight > 0 else None
        source = source_of(config, self.domains)
        self.dense_domains = {source} if config.data.source_mode == "dense" and source in self.domains else set()
        self.multipliers = {
            name: Multiplier(self.beta, config.budget.multiplier_rate)
            for name in self.domains
            if name not in self.dense_domains
        }
        sharing = config.sharing
        self.sharing_weight = SharingWeight(sharing.weight, sharing.learnable, sharing.rate, sharing.slack)
        self.objective = Objective(
            config, self.bank, self.costs, self.beta, self.multipliers, self.sharing_weight, self.dense_domains, device
        )
        self.origin = Origin(config, self.domains)
        if self.processes.first:
            warn_of_vanishing_gradients(config, len(self.bank.domains) - len(self.dense_domains))

    def _set_trainable(self) -> None:
        own = {name for name, _ in bk.nn.domain_parameters(self.model)}
        for name, parameter in self.model.named_parameters():
            if name not in own:
                parameter.requires_grad_(self.config.optimiser.train_backbone)
        for name in self.dense_domains | (set(self.bank.domains) - set(self.domains)):
            self._freeze(name)

    def _freeze(self, domain: str) -> None:
        for switch in self.bank.of(domain):
            switch.score.requires_grad_(False)

    @property
    def frozen(self) -> bool:
        """Whether the switches are projected and fixed."""
        if self.config.switches.fixed is not None:
            return True
        return self.epoch >= self.config.switches.freeze_at * self.config.schedule.epochs

    def fit(self, until: int | None = None, after_epoch: Callable[[dict[str, Any]], None] | None = None) -> None:
        """Trains up to an epoch, or to the end, where the budgets hold exactly.

        Args:
            until: the epoch to stop after; None is the last one.
            after_epoch: called with the record of every epoch, after the state was written.

        Raises:
            ValueError: if the budget has no room for what ``switches.keep_at_least`` keeps.
            FileError: if a file cannot be written, or another run writes into the folder.
            TrainError: if a loss or a parameter is not finite; the state of the last epoch stays.
        """
        self.open()
        config = self.config
        last = config.schedule.epochs if until is None else min(until, config.schedule.epochs)
        if last == config.schedule.epochs and self.multipliers and not self.frozen:
            check_room(self.costs, self.beta, self.bank.sizes, config.switches.keep_at_least)
        with self.processes.lock(self.folder), bk.use_backend(backend_of(config)):
            if self.frozen:
                self._freeze_switches()
            while self.epoch < last:
                record = self._train_epoch()
                self.epoch += 1
                record["epoch"] = self.epoch
                if self.frozen or self.epoch == config.schedule.epochs:
                    self._freeze_switches()
                elif config.budget.anneal is not None:
                    self._project(self.objective.beta)
                self._describe(record)
                # Before the state: a resumed run drops records that have no state.
                self.log.add(record)
                if self.folder is not None and self.processes.first:
                    self._save(self.folder / STATE)
                self.processes.wait()
                if after_epoch is not None:
                    after_epoch(record)

    def _train_epoch(self) -> dict[str, Any]:
        config = self.config
        started = time.perf_counter()
        # Users of the global generator, such as dropout, draw the same numbers after a resumption.
        torch.manual_seed(config.run.seed * 1_000_003 + self.epoch)
        epochs = config.schedule.epochs
        factor = learning_rate(config.schedule.decay, self.epoch, epochs, config.schedule.milestones)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * factor
        self.ddp_model.train()
        sharing = config.sharing
        self.objective.begin(
            self.beta_after(self.epoch + 1),
            sharing_factor(sharing.schedule, sharing.schedule_until, self.epoch, epochs),
        )
        seen = {name: Accuracy() for name in self.domains}
        processes = self.processes
        steps = steps_of_epoch(self.domains, config, processes.world)
        batches = batches_of(self.domains, config, self.epoch, processes.rank, processes.world)
        checked_every = 1 if processes.device.type == "cpu" else CHECKED_EVERY
        for number, turns in enumerate(batches, 1):
            self._joint_step(turns, seen)
            if number % checked_every == 0:
                check_losses({name: seen[name] for name, _, _ in turns}, config, self.epoch)
            name = turns[-1][0]
            self.log.step(self.epoch + 1, number, steps, name, partial(getattr, seen[name], "mean_loss"))
        check_losses(seen, config, self.epoch)
        check_parameters(self.model, config, self.epoch)
        self.objective.end()
        losses = {name: counts.reduced() for name, counts in seen.items()}
        return {
            "epoch": self.epoch,
            "seconds": time.perf_counter() - started,
            "rate": factor,
            "domains": {name: {"loss": total.mean_loss, "accuracy": total.percent} for name, total in losses.items()},
        }

    def _step(self, name: str, x: Tensor, y: Tensor, seen: Accuracy) -> None:
        self._joint_step([(name, x, y)], {name: seen})

    def _joint_step(self, turns: Sequence[tuple[str, Tensor, Tensor]], seen: Mapping[str, Accuracy]) -> None:
        """A step of the optimisers on the sum of the losses of batches of different domains."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        for name, images, labels in turns:
            self._add_gradients(name, images, labels, seen[name])
        for optimizer in self.optimizers.values():
            self.scaler.step(optimizer)
        self.scaler.update()
        for name, _, _ in turns:
            self.objective.changed(name)

    def _add_gradients(self, name: str, x: Tensor, y: Tensor, seen: Accuracy) -> None:
        config, device = self.config, self.processes.device
        bk.set_domain(self.model, name)
        parts = list(zip(*(tensor.to(device).chunk(config.schedule.accumulate) for tensor in (x, y)), strict=True))
        for number, (images, labels) in enumerate(parts):
            last = number == len(parts) - 1
            with contextlib.nullcontext() if last else self.processes.no_sync(self.ddp_model):
                with self.processes.autocast(self.config.run.amp):
                    logits = self.ddp_model(images)
                loss = F.cross_entropy(logits.float(), labels)
                seen.add(logits.detach(), labels, loss)
                if self.teacher is not None:
                    loss = loss + self._distilled(name, images, logits.float(), loss)
                total = loss * (len(images) / len(x))
                if last and name in self.multipliers and not self.frozen:
                    total = total + self.objective.penalty(name)
                self.scaler.scale(total).backward()

    def _distilled(self, name: str, images: Tensor, logits: Tensor, loss: Tensor) -> Tensor:
        """The weighted, guarded loss of the teacher's logits."""
        assert self.teacher is not None
        distill = self.config.distill
        with self.processes.autocast(self.config.run.amp):
            targets = self.teacher.logits(name, images).float()
        return guarded(distill.weight * distillation_loss(logits, targets, distill.temperature), loss, distill.guard)

    def used(self, domain: str) -> float:
        """θ̄ of a domain, exact."""
        return float(share(self.bank.mask(domain).cpu(), self.costs))

    def beta_after(self, done: int) -> float:
        """The budget that holds after so many epochs, β of the run but for annealing."""
        budget, epochs = self.config.budget, self.config.schedule.epochs
        return annealed_budget(budget.anneal, budget.anneal_start, self.beta, budget.anneal_until, done, epochs)

    def _freeze_switches(self) -> None:
        """Projects every domain whose budget does not hold, and freezes all switches."""
        self._project(self.beta)
        for name in self.multipliers:
            self._freeze(name)

    def _project(self, beta: float) -> None:
        """Makes a budget hold exactly in every domain."""
        for name in self.multipliers:
            projection = project(
                self.bank.scores(name),
                self.bank.thresholds(name),
                self.costs,
                beta,
                self.bank.sizes,
                self.config.switches.keep_at_least,
                self.config.budget.give_back,
            )
            if projection.turned_off or projection.turned_on:
                self.bank.write(name, projection.scores)
                self._recalibrate(name)
            self.projected_off[name] = self.projected_off.get(name, 0) + projection.turned_off
            self.given_back[name] = self.given_back.get(name, 0) + projection.turned_on

    def _recalibrate(self, name: str) -> None:
        processes = self.processes
        key = (self.config.run.seed, self.epoch, "recalibrate")
        batches = self.domains[name].batches("train", self.config.schedule.batch, key, processes.rank, processes.world)
        bk.nn.recalibrate_bn(self.model, batches, name, 16)
        processes.average_statistics(self.ddp_model, name)

    def _describe(self, record: dict[str, Any]) -> None:
        processes = self.processes
        for name, values in record["domains"].items():
            counts = evaluate(
                self.model, self.domains[name], self.config.data.evaluate_on, rank=processes.rank, world=processes.world
            )
            used = self.used(name)
            values.update(evaluated=counts.percent, kept=used, gap=used - self.objective.beta)
            values["multiplier"] = self.multipliers[name].value if name in self.multipliers else 0.0
        masks = self.bank.masks().cpu().double()
        total = float(self.costs.sum())
        record["intersection"] = float(intersection(masks, self.costs)) / total
        record["union"] = float(union(masks, self.costs)) / total
        record["beta"] = self.objective.beta
        record["sharing_weight"] = self.sharing_weight.value * self.objective.factor
        record["projected_off"] = sum(self.projected_off.values())

    def _save(self, path: Path) -> None:
        progress = {
            "epoch": self.epoch,
            "multipliers": {name: multiplier.value for name, multiplier in self.multipliers.items()},
            "sharing_weight": self.sharing_weight.value,
            "projected_off": self.projected_off,
            "given_back": self.given_back,
            "scaler": self.scaler.state_dict(),
            **self.origin.as_dict(),
        }
        save_state(path, self.model, self.optimizers, progress)

    def _load(self, path: Path) -> None:
        try:
            progress = load_state(path, self.model, self.optimizers, self.origin.check)
            self.epoch = int(progress["epoch"])
            for name, value in progress["multipliers"].items():
                self.multipliers[name].value = float(value)
            self.sharing_weight.value = float(progress["sharing_weight"])
            # Version 0.1.0 wrote "taken".
            self.projected_off = dict(progress["projected_off" if "projected_off" in progress else "taken"])
            self.given_back = dict(progress.get("given_back", {}))
            self.scaler.load_state_dict(progress["scaler"])
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise FileError(f"Trainer(): expected {path} to be a state as a run writes it, got {error!r}.") from None
