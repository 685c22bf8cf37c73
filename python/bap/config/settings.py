"""All settings of a run, in groups. Each has a name like ``budget.beta`` and a short one, here ``beta``."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError

from bap.config.groups import (
    Budget,
    Data,
    Distill,
    Group,
    Model,
    Optimiser,
    Pretrain,
    Run,
    Schedule,
    Sharing,
    Switches,
)
from bap.data import BUILTIN_SIZE
from bap.models import MODELS, build

__all__ = ["SHORT_NAMES", "Config", "full_names", "known_settings"]


class Config(Group):
    """Settings of a run; defaults are the papers' where these are known [Q].

    Args:
        **values: settings by group, ``budget={"beta": 0.5}``, by name, or by short name, ``beta=0.5``.

    Raises:
        ValueError: for names that are not known, and types and values that cannot be used, NaN and infinities among
            them.

    Examples:
        >>> from bap.config import Config
        >>> config = Config(beta=0.5, sharing={"loss": "union"})
        >>> config.budget.measure, config.sharing.loss, config.replace(beta=0.25).budget.beta
        ('mac', 'union', 0.25)
    """

    data: Data = Data()
    model: Model = Model()
    switches: Switches = Switches()
    budget: Budget = Budget()
    sharing: Sharing = Sharing()
    distill: Distill = Distill()
    optimiser: Optimiser = Optimiser()
    schedule: Schedule = Schedule()
    pretrain: Pretrain = Pretrain()
    run: Run = Run()

    def __init__(self, **values: Any) -> None:
        groups: dict[str, dict[str, Any]] = {}
        for name, value in full_names(values).items():
            group, _, own = name.partition(".")
            groups.setdefault(group, {})[own] = value
        try:
            super().__init__(**groups)
        except ValidationError as error:
            raise ValueError(f"Config(): {_problem(error)}") from None
        self._check_together()

    def _check_together(self) -> None:
        data, schedule, switches, model = self.data, self.schedule, self.switches, self.model
        if len(set(data.domains)) < len(data.domains):
            raise ValueError(f"Config(): expected `data.domains` to name each domain once, got {data.domains}.")
        if schedule.accumulate > schedule.batch:
            raise ValueError(
                "Config(): expected `schedule.accumulate` to be at most `schedule.batch`, got "
                f"{schedule.accumulate} > {schedule.batch}."
            )
        if switches.initial <= switches.threshold:
            raise ValueError(
                "Config(): expected `switches.initial` to be above `switches.threshold`, so that training starts with "
                f"all channels on, got {switches.initial} <= {switches.threshold}."
            )
        if not data.built_in and data.root is None:
            raise ValueError(
                f"Config(): expected `data.root`, the folder of {data.suite!r}, got None. Hint: --set root=FOLDER"
            )
        if data.built_in and data.size not in (None, BUILTIN_SIZE):
            raise ValueError(
                f"Config(): expected `data.size` to be {BUILTIN_SIZE}, or left out, for {data.suite!r}, whose images "
                f"are drawn at that size, got {data.size}."
            )
        if data.crops != "papers" and data.suite != "decathlon":
            raise ValueError(
                f"Config(): expected `data.crops` to be 'papers' for {data.suite!r}, got {data.crops!r}, which is of "
                "the decathlon."
            )
        budget, sharing, distill = self.budget, self.sharing, self.distill
        if schedule.steps is not None and schedule.round_robin != "joint":
            raise ValueError(
                "Config(): expected `schedule.round_robin` to be 'joint' for `schedule.steps`, got "
                f"{schedule.round_robin!r}."
            )
        if not schedule.milestones or schedule.milestones != sorted(set(schedule.milestones)):
            raise ValueError(
                f"Config(): expected `schedule.milestones` to be ascending parts of the run, got {schedule.milestones}."
            )
        if budget.anneal is not None and budget.anneal_until > switches.freeze_at:
            raise ValueError(
                "Config(): expected `budget.anneal_until` to be at most `switches.freeze_at`, after which no switch "
                f"changes, got {budget.anneal_until} > {switches.freeze_at}."
            )
        if budget.anneal is not None and budget.milliseconds is None and budget.anneal_start < budget.beta:
            raise ValueError(
                "Config(): expected `budget.anneal_start` to be at least `budget.beta`, got "
                f"{budget.anneal_start} < {budget.beta}."
            )
        if sharing.learnable and sharing.schedule != "constant":
            raise ValueError(
                "Config(): expected `sharing.schedule` to be 'constant' for a learnable weight, got "
                f"{sharing.schedule!r}."
            )
        if distill.weight > 0 and distill.teacher is None:
            raise ValueError(
                "Config(): expected `distill.teacher`, the checkpoint of a trained network, for `distill.weight`, got "
                "None. Hint: -s teacher=dense, or -s teacher=RUN/checkpoint"
            )
        if data.train_on == "train+val" and data.evaluate_on == "val":
            raise ValueError(
                "Config(): expected `data.evaluate_on` to be 'test' or 'train' where `data.train_on` is 'train+val', "
                "got 'val', which is trained on. Hint: -s evaluate_on=train where test labels are hidden."
            )
        if data.train_on == "train+val" and data.suite == "sketch":
            raise ValueError(
                "Config(): expected `data.train_on` to be 'train' for 'sketch', whose validation images are its test "
                "images, got 'train+val'."
            )
        if self.budget.milliseconds is not None and self.budget.measure != "time":
            raise ValueError(
                "Config(): expected `budget.measure` to be 'time' for `budget.milliseconds`, got "
                f"{self.budget.measure!r}."
            )
        if model.options:
            try:
                problem = _options_problem(model.name, json.dumps(model.options, sort_keys=True))
            except (TypeError, ValueError, RecursionError) as error:
                problem = str(error)
            if problem:
                raise ValueError(
                    f"Config(): expected `model.options` to make a {model.name!r}, got {model.options!r}: {problem}"
                )

    def as_dict(self) -> dict[str, Any]:
        """All settings by group, for YAML and JSON."""
        return self.model_dump()

    def by_name(self) -> dict[str, Any]:
        """All settings, {"group.name": value}."""
        return full_names(self.model_dump())

    def replace(self, **changes: Any) -> Config:
        """Other settings, named as in the constructor, the rest as here."""
        return Config(**{**self.by_name(), **full_names(changes)})


# The names of version 0.1.0. They stay valid wherever settings are named.
SHORT_NAMES = {
    "data": "data.suite", "root": "data.root", "domains": "data.domains", "source": "data.source",
    "source_mode": "data.source_mode", "images": "data.images", "size": "data.size", "workers": "data.workers",
    "crops": "data.crops",
    "cache": "data.cache", "cache_gib": "data.cache_gib",
    "full": "data.full", "decode_all": "data.decode_all", "train_on": "data.train_on",
    "evaluate_on": "data.evaluate_on",
    "model": "model.name", "model_options": "model.options", "weights": "model.weights",
    "switch_stem": "switches.stem", "switch_shortcuts": "switches.shortcuts", "threshold": "switches.threshold",
    "initial": "switches.initial", "ste_every": "switches.ste_every", "keep_at_least": "switches.keep_at_least",
    "settle": "switches.freeze_at", "fixed": "switches.fixed",
    "beta": "budget.beta", "measure": "budget.measure", "budget_ms": "budget.milliseconds",
    "multiplier_rate": "budget.multiplier_rate", "give_back": "budget.give_back",
    "anneal": "budget.anneal", "anneal_start": "budget.anneal_start", "anneal_until": "budget.anneal_until",
    "sharing": "sharing.loss", "sharing_weight": "sharing.weight", "sharing_learnable": "sharing.learnable",
    "sharing_rate": "sharing.rate", "sharing_slack": "sharing.slack", "relaxed": "sharing.relaxed",
    "temperature": "sharing.temperature",
    "sharing_schedule": "sharing.schedule", "sharing_schedule_until": "sharing.schedule_until",
    "teacher": "distill.teacher", "distill_weight": "distill.weight", "distill_temperature": "distill.temperature",
    "distill_guard": "distill.guard",
    "lr_switch": "optimiser.lr_switch", "lr_norm": "optimiser.lr_norm", "lr_head": "optimiser.lr_head",
    "norm": "optimiser.norm",
    "lr_backbone": "optimiser.lr_backbone", "train_backbone": "optimiser.train_backbone",
    "momentum": "optimiser.momentum", "weight_decay": "optimiser.weight_decay",
    "epochs": "schedule.epochs", "batch": "schedule.batch", "accumulate": "schedule.accumulate",
    "round_robin": "schedule.round_robin", "steps": "schedule.steps", "schedule": "schedule.decay",
    "milestones": "schedule.milestones",
    "pretrain_epochs": "pretrain.epochs", "pretrain_lr": "pretrain.lr",
    "seed": "run.seed", "device": "run.device", "threads": "run.threads", "backend": "run.backend", "amp": "run.amp",
    "log_every": "run.log_every", "log_seconds": "run.log_seconds",
}  # fmt: skip


@functools.cache
def _names() -> frozenset[str]:
    groups = {group: type(field.default) for group, field in Config.model_fields.items()}
    return frozenset(f"{group}.{name}" for group, kind in groups.items() for name in kind.model_fields)


def full_names(values: Mapping[Any, Any]) -> dict[str, Any]:
    """{"group.name": value} from settings by group, by name or by short name.

    Raises:
        ValueError: for a name that is not known, or a setting that is named twice.

    Examples:
        >>> from bap.config import full_names
        >>> full_names({"beta": 0.5, "sharing": {"loss": "int", "weight": 1.0}, "run.seed": 2})
        {'budget.beta': 0.5, 'sharing.loss': 'int', 'sharing.weight': 1.0, 'run.seed': 2}
    """
    named: dict[str, Any] = {}
    for key, value in values.items():
        members: dict[Any, Any] = {key: value}
        if key in Config.model_fields and isinstance(value, Mapping):
            members = {f"{key}.{name}": member for name, member in value.items()}
        for name, member in members.items():
            full = SHORT_NAMES.get(name, name)
            if full not in _names():
                close = difflib.get_close_matches(str(name), [*_names(), *SHORT_NAMES, *Config.model_fields], 1)
                hint = f" Hint: {close[0]}?" if close else f" Hint: the groups are {', '.join(Config.model_fields)}."
                if name in Config.model_fields:
                    hint = f" Hint: {name} is a group of settings."
                raise ValueError(f"Config(): expected the name of a setting, got {name!r}.{hint}")
            if full in named:
                raise ValueError(f"Config(): expected each setting once, got {full!r} twice.")
            named[full] = member
    return named


def known_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"group.name": value} of what a file of any version stores; settings that are not known here are left out."""
    named: dict[str, Any] = {}
    for key, value in values.items():
        if key in Config.model_fields and isinstance(value, Mapping):
            named |= {f"{key}.{name}": member for name, member in value.items()}
        else:
            named[SHORT_NAMES.get(key, key)] = value
    return {name: value for name, value in named.items() if name in _names()}


def _problem(error: ValidationError) -> str:
    """The first error of pydantic, in the form of the other messages."""
    first = error.errors(include_url=False)[0]
    group, name, *rest = map(str, first["loc"])
    index = "".join(f"[{part}]" for part in rest if part.isdecimal())
    rule = first["msg"].removeprefix("Input should be ")
    rule = rule[:1].lower() + rule[1:] if first["msg"] != rule else f"follow this rule: {first['msg']}"
    verb = "to be" if first["msg"].startswith("Input should be ") else "to"
    shown = repr(first["input"])
    shown = shown if len(shown) < 200 else shown[:200] + "..."
    # YAML, which a value after -s is read as, writes lists in brackets.
    hint = f" Hint: [{first['input']}]." if first["type"] == "list_type" and isinstance(first["input"], str) else ""
    return f"expected `{group}.{name}{index}` {verb} {rule}, got {shown}.{hint}"


@functools.lru_cache(maxsize=64)
def _options_problem(model: str, text: str) -> str | None:
    """Why a model cannot be built with options, given as JSON; tried without memory, on the meta device."""
    options = json.loads(text)
    for name, value in options.items():
        for number in value if isinstance(value, list) else [value]:
            if value is not None and (type(number) is not int or not 1 <= number <= 65536):
                return f"`{name}` needs positive whole numbers."
    try:
        with torch.device("meta"), torch.no_grad():
            network = build(model, 2, **options).eval()
            network(torch.zeros(1, 3, MODELS[model].size, MODELS[model].size))
    except Exception as error:
        # A constructor given what a user wrote may raise anything.
        return f"{error}"
    return None
