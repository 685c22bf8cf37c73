"""All settings of a run, in groups. Each has a name like ``budget.beta`` and a short one, here ``beta``."""

from __future__ import annotations

import difflib
import functools
import json
import re
import warnings
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from bap.models import MODELS, build
from bap_kernels.settings import BACKENDS

__all__ = ["LOSSES", "MEASURES", "SHORT_NAMES", "Config", "Distill", "full_names", "known_settings"]

# What a budget bounds, and the sharing losses; see bap.train.budget and bap.train.sharing.
MEASURES = ("switch", "layer", "param", "mac", "time")
LOSSES = ("int", "union", "jaccard")


def _one_of(*allowed: Any) -> BeforeValidator:
    def check(value: Any) -> Any:
        if not any(type(value) is type(choice) and value == choice for choice in allowed):
            raise PydanticCustomError("one_of", f"Input should be one of {list(allowed)}")
        return value

    return BeforeValidator(check)


def _number(value: Any) -> Any:
    """YAML reads 1e-4, without a point, as text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _text(value: Any) -> Any:
    """YAML reads a folder named 2024 as a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _device(value: Any) -> Any:
    if not isinstance(value, str) or not re.fullmatch(r"(cpu|cuda)(:\d{1,3})?", value):
        raise PydanticCustomError("device", "Input should be 'cpu', 'cuda' or 'cuda:N'")
    return value


def _suite(value: Any) -> Any:
    if value == "embedded":
        warnings.warn("data.suite: 'embedded' is deprecated, its name is 'builtin'", DeprecationWarning, stacklevel=2)
        return "builtin"
    return value


_Text = Annotated[str, BeforeValidator(_text), Field(min_length=1, pattern=r"\A[^\x00]+\z")]
_Real = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
_Share = Annotated[_Real, Field(gt=0, le=1)]
_Positive = Annotated[_Real, Field(gt=0)]
_NotNegative = Annotated[_Real, Field(ge=0)]
# Larger ones are slips, and would only fail in the middle of something.
_Count = Annotated[int, Field(ge=1, le=10**9)]
_Whole = Annotated[int, Field(ge=0, le=10**9)]


class _Group(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class Data(_Group):
    """The images.

    Attributes:
        suite: ``builtin`` or ``varied``, made in memory; ``decathlon`` or ``sketch`` (ImageNet-to-Sketch), in files;
            ``embedded`` is ``builtin``'s old name.
        root: folder of the data; None for the built-in suites.
        domains: names; empty means all of the suite.
        source: the domain that the backbone was trained on; None is the suite's usual one, which a benchmark must have
            then; a part of a built-in suite takes its first.
        source_mode: ``switched`` treats it as the others, ``dense`` keeps all its channels, so that nothing can be
            pruned, ``excluded`` leaves it out of the joint training [R].
        images: training images of a built-in domain.
        size: height and width of the input, from 8 to 4096; None is the data's.
        workers: processes that load images from files.
        cache: folder in which decoded images are kept, as 8-bit pixels; None decodes them in every epoch.
        cache_gib: the most that these may take, in GiB of 2^30 bytes, all splits of all domains together.
        full: whether data on disk must have all splits and all domains of the suite, the source among them, with the
            published numbers of images and classes; False accepts an extract.
        decode_all: whether every image file is decoded before training; False decodes a sample, and every JPEG and PNG
            whose end is missing.
        train_on: ``train``, or ``train+val`` for submissions to a benchmark's server: validation images are trained on,
            and no accuracy is measured on them.
        evaluate_on: split of the accuracy in each epoch; ``train`` is for ``train+val`` without labels of the test
            images, and results then say so.
    """

    suite: Annotated[str, _one_of("builtin", "varied", "decathlon", "sketch"), BeforeValidator(_suite)] = "builtin"
    root: _Text | None = None
    domains: list[_Text] = []
    source: _Text | None = None
    source_mode: Annotated[str, _one_of("switched", "excluded", "dense")] = "switched"
    images: _Count = 1200
    size: Annotated[int, Field(ge=8, le=4096)] | None = None
    workers: Annotated[int, Field(ge=0, le=1024)] = 0
    cache: _Text | None = None
    cache_gib: _Positive = 16.0
    full: bool = True
    decode_all: bool = False
    train_on: Annotated[str, _one_of("train", "train+val")] = "train"
    evaluate_on: Annotated[str, _one_of("val", "test", "train")] = "val"

    @property
    def built_in(self) -> bool:
        """Whether the images are made in memory, not read from files."""
        return self.suite in ("builtin", "varied")


class Model(_Group):
    """The backbone.

    Attributes:
        name: one of :data:`bap.models.MODELS`.
        options: its further arguments.
        weights: file with the pre-trained backbone; None: random, or as ``bap pretrain`` makes it.
    """

    name: Annotated[str, _one_of(*MODELS)] = "resnet26"
    options: dict[str, Any] = {}
    weights: _Text | None = None


class Switches(_Group):
    """The switches on input channels, s = 1[s̃ > τ].

    Attributes:
        stem: whether the convolution that reads the image has switches [R].
        shortcuts: whether 1×1 convolutions of shortcuts have them [R].
        threshold, initial, ste_every: τ, the first s̃, and how often scores get gradients: as in
            :class:`bap_kernels.nn.SwitchedConv2d`.
        keep_at_least: channels of every layer that the projection leaves on.
        freeze_at: part of the run after which switches are projected and fixed; 1 projects at the end, as in the
            papers.
        fixed: file with the channels that are on from the start and for good, see :mod:`bap.prune.masks`; None: they
            are trained.
    """

    stem: bool = False
    shortcuts: bool = True
    threshold: _Real = 5e-3
    initial: _Real = 1e-2
    ste_every: _Count = 1
    keep_at_least: _Whole = 1
    freeze_at: _Share = 1.0
    fixed: _Text | None = None


class Budget(_Group):
    """What a domain may use.

    Attributes:
        beta: the budget β, in (0, 1].
        measure: what it bounds, one of :data:`MEASURES`.
        milliseconds: for the measure ``time``: the budget of the switched convolutions, in place of ``beta``.
        multiplier_rate: η of the dual ascent of λ [R].
        anneal: how β goes down from ``anneal_start`` during the run, with a projection after every epoch: ``linear`` or
            ``cubic``; None: it is the same throughout.
        anneal_start: β of the start.
        anneal_until: part of the run after which β has reached ``beta``.
        give_back: whether the projection also switches channels on, strongest first, in a domain that ends below its
            budget.
    """

    beta: _Share = 0.5
    measure: Annotated[str, _one_of(*MEASURES)] = "mac"
    milliseconds: _Positive | None = None
    multiplier_rate: _Positive = 0.1
    anneal: Annotated[str | None, _one_of(None, "linear", "cubic")] = None
    anneal_start: _Share = 1.0
    anneal_until: _Share = 0.75
    give_back: bool = False


class Sharing(_Group):
    """The sharing loss L_PS.

    Attributes:
        loss: ``int``, ``union``, ``jaccard``, or None.
        weight: λ_PS.
        schedule: of λ_PS over the run: ``constant``; ``rise`` from 0 to ``weight``, ``fall`` from it to 0.
        schedule_until: part of the run after which it has risen or fallen.
        learnable, rate, slack: see :class:`bap.train.sharing.SharingWeight`.
        relaxed: whether the loss sees sigmoids of the scores in place of straight-through switches.
        temperature: of those sigmoids.
    """

    loss: Annotated[str | None, _one_of(None, *LOSSES)] = None
    weight: _NotNegative = 1.0
    schedule: Annotated[str, _one_of("constant", "rise", "fall")] = "constant"
    schedule_until: _Share = 0.5
    learnable: bool = False
    rate: _Positive = 1e-2
    slack: _NotNegative = 0.0
    relaxed: bool = False
    temperature: _Positive = 2e-3


class Distill(_Group):
    """Distillation from a trained network, such as the dense one; see :mod:`bap.train.distill`.

    Attributes:
        teacher: its checkpoint, RUN/checkpoint; or ``dense``, the dense network of the same settings, which is trained
            first.
        weight: of the loss; 0 is off.
        temperature: T.
        guard: the most that the weighted loss may be, as a multiple of the cross entropy; None does not bound it.
    """

    teacher: _Text | None = None
    weight: _NotNegative = 0.0
    temperature: _Positive = 4.0
    guard: _Positive | None = 1.0


class Optimiser(_Group):
    """Learning rates.

    Attributes:
        lr_switch, lr_norm: Adam's, of switches and batch norm.
        norm: ``sgd`` trains batch norm with SGD, like the backbone; ``adam``.
        lr_head, momentum, weight_decay: SGD's, of the classifiers (and of the backbone).
        train_backbone, lr_backbone: whether the shared weights are trained, with SGD.
    """

    lr_switch: _NotNegative = 1e-4
    lr_norm: _NotNegative = 1e-4
    norm: Annotated[str, _one_of("adam", "sgd")] = "adam"
    lr_head: _NotNegative = 1e-3
    momentum: Annotated[_Real, Field(ge=0, lt=1)] = 0.9
    weight_decay: _NotNegative = 0.0
    train_backbone: bool = False
    lr_backbone: _NotNegative = 1e-3


class Schedule(_Group):
    """How long, and in which order.

    Attributes:
        epochs: passes over the training images of every domain.
        batch: images of a step, on each process.
        accumulate: parts of a batch that go through the network one by one.
        round_robin: ``epoch``: a whole epoch of one domain after another; ``batch``: domains take turns; ``joint``: a
            step sums a batch of every domain.
        steps: of an epoch, for ``joint``; None: as many as the largest domain has batches.
        decay: of the learning rates, ``step``: × 0.1 at each of the ``milestones``; ``cosine``.
        milestones: parts of the run, ascending.
    """

    epochs: _Count = 150
    batch: _Count = 64
    accumulate: _Count = 1
    round_robin: Annotated[str, _one_of("epoch", "batch", "joint")] = "epoch"
    steps: _Count | None = None
    decay: Annotated[str, _one_of("step", "cosine")] = "step"
    milestones: list[_Share] = [0.75]


class Pretrain(_Group):
    """The plain backbone on the source domain, for ``bap pretrain``.

    Attributes:
        epochs: passes over its training images.
        lr: of SGD, with a cosine decay.
    """

    epochs: _Count = 20
    lr: _NotNegative = 0.05


class Run(_Group):
    """Where and how it is computed.

    Attributes:
        seed: of everything random.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        threads: of PyTorch; None leaves them. Results are bit-equal only for the same number.
        backend: of the kernels in training and evaluation; None: ``heuristic``.
        amp: mixed precision, ``bf16`` or ``fp16``; None is off.
        log_every: steps between two progress lines inside an epoch, where progress is printed; 0: a line per epoch.
        log_seconds: a line is also printed once so many have passed since the last one; 0: not.
    """

    seed: _Whole = 0
    device: Annotated[str, BeforeValidator(_device)] = "cpu"
    threads: Annotated[int, Field(ge=1, le=4096)] | None = None
    backend: Annotated[str | None, _one_of(None, *BACKENDS)] = None
    amp: Annotated[str | None, _one_of(None, "bf16", "fp16")] = None
    log_every: _Whole = 200
    log_seconds: _NotNegative = 30.0


class Config(_Group):
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
    return f"expected `{group}.{name}{index}` {verb} {rule}, got {shown}."


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
