"""All settings of a run, from a YAML file and overrides; the resolved ones are saved beside the results."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from bap.budget import MEASURES
from bap.files import FileError, read_bytes
from bap.models import MODELS
from bap.sharing import LOSSES

__all__ = ["Config", "config_of", "load_config", "override_values", "settings_problem"]


def _one_of(*allowed: Any) -> BeforeValidator:
    def check(value: Any) -> Any:
        if not any(type(value) is type(one) and value == one for one in allowed):
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


_Text = Annotated[str, BeforeValidator(_text), Field(min_length=1, pattern=r"\A[^\x00]+\z")]
_Real = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
_Share = Annotated[_Real, Field(gt=0, le=1)]
_Positive = Annotated[_Real, Field(gt=0)]
_NotNegative = Annotated[_Real, Field(ge=0)]
# Larger ones are slips, and would only fail in the middle of something.
_Count = Annotated[int, Field(ge=1, le=10**9)]
_Whole = Annotated[int, Field(ge=0, le=10**9)]


@dataclass
class Config:
    """Settings of a run; defaults are the papers' where these are known [Q].

    Args:
        data: ``embedded``, ``decathlon`` or ``sketch`` (ImageNet-to-Sketch).
        root: folder of the data; None for the embedded suite.
        domains: names; empty means all of the suite.
        source: the domain that the backbone was trained on; None is the suite's first.
        source_mode: ``switched`` treats it as the others, ``dense`` keeps all its channels, so that nothing can be
            pruned, ``excluded`` leaves it out of the joint training [R].
        images: training images of an embedded domain.
        size: height and width of the input, from 8 to 4096; None is the data's.
        workers: processes that load images from files.
        full: whether data on disk must have all splits and all domains of the suite, the source among them, with the
            published numbers of images and classes; False accepts an extract.
        model: one of :data:`bap.models.MODELS`.
        model_options: its further arguments.
        weights: file with the pre-trained backbone; None: random, or as ``bap pretrain`` makes it.
        switch_stem: whether the convolution that reads the image has switches [R].
        switch_shortcuts: whether 1×1 convolutions of shortcuts have them [R].
        threshold, initial, ste_every: as in :class:`bap_kernels.nn.SwitchedConv2d`.
        beta: the budget β, in (0, 1].
        measure: what it bounds, one of :data:`bap.budget.MEASURES`.
        budget_ms: for ``time``: the budget in milliseconds of the switched convolutions, in place of ``beta``.
        multiplier_rate: η of the budget's dual ascent [R].
        sharing: sharing loss, ``int``, ``union``, ``jaccard``, or None.
        sharing_weight: λ_PS.
        sharing_learnable, sharing_rate, sharing_slack: see :class:`bap.sharing.SharingWeight`.
        relaxed: whether the sharing loss sees sigmoids of the scores in place of straight-through switches.
        temperature: of those sigmoids.
        settle: part of the run after which switches are projected and fixed; 1 projects at the end, as in the papers.
        keep_at_least: channels of every layer that the projection leaves on.
        epochs: passes over the training images of every domain.
        batch: images of a step, on each process.
        accumulate: parts of a batch that go through the network one by one.
        round_robin: ``epoch``: a whole epoch of one domain after another; ``batch``: domains take turns.
        lr_switch, lr_norm: Adam's, of switches and batch norm.
        lr_head, momentum, weight_decay: SGD's, of the classifiers (and of the backbone).
        train_backbone, lr_backbone: whether the shared weights are trained, with SGD.
        schedule: ``step``: × 0.1 after three quarters; ``cosine``.
        amp: mixed precision, ``bf16`` or ``fp16``; None is off.
        seed: of everything random.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        threads: of PyTorch; None leaves them. Results are bit-equal only for the same number.
        backend: of the kernels in training and evaluation; None: ``native`` where it runs, else ``aten``.
        evaluate_on: split of the accuracy in each epoch.
        pretrain_epochs, pretrain_lr: of the source domain, for ``bap pretrain``.
        log_every: steps between two progress lines inside an epoch, where progress is printed; 0: a line per epoch.

    Raises:
        ValueError: for types and values that cannot be used, NaN and infinities among them.

    Examples:
        >>> from bap.config import Config
        >>> Config(beta=0.5, sharing="union").measure
        'mac'
    """

    data: Annotated[str, _one_of("embedded", "decathlon", "sketch")] = "embedded"
    root: _Text | None = None
    domains: list[_Text] = field(default_factory=list)
    source: _Text | None = None
    source_mode: Annotated[str, _one_of("switched", "excluded", "dense")] = "switched"
    images: _Count = 1200
    size: Annotated[int, Field(ge=8, le=4096)] | None = None
    workers: Annotated[int, Field(ge=0, le=1024)] = 0
    full: bool = True
    model: Annotated[str, _one_of(*MODELS)] = "resnet26"
    model_options: dict[str, Any] = field(default_factory=dict)
    weights: _Text | None = None
    switch_stem: bool = False
    switch_shortcuts: bool = True
    threshold: _Real = 5e-3
    initial: _Real = 1e-2
    ste_every: _Count = 1
    beta: _Share = 0.5
    measure: Annotated[str, _one_of(*MEASURES)] = "mac"
    budget_ms: _Positive | None = None
    multiplier_rate: _Positive = 0.1
    sharing: Annotated[str | None, _one_of(None, *LOSSES)] = None
    sharing_weight: _NotNegative = 1.0
    sharing_learnable: bool = False
    sharing_rate: _Positive = 1e-2
    sharing_slack: _NotNegative = 0.0
    relaxed: bool = False
    temperature: _Positive = 2e-3
    settle: _Share = 1.0
    keep_at_least: _Whole = 1
    epochs: _Count = 150
    batch: _Count = 64
    accumulate: _Count = 1
    round_robin: Annotated[str, _one_of("epoch", "batch")] = "epoch"
    lr_switch: _NotNegative = 1e-4
    lr_norm: _NotNegative = 1e-4
    lr_head: _NotNegative = 1e-3
    momentum: Annotated[_Real, Field(ge=0, lt=1)] = 0.9
    weight_decay: _NotNegative = 0.0
    train_backbone: bool = False
    lr_backbone: _NotNegative = 1e-3
    schedule: Annotated[str, _one_of("step", "cosine")] = "step"
    amp: Annotated[str | None, _one_of(None, "bf16", "fp16")] = None
    seed: _Whole = 0
    device: Annotated[str, BeforeValidator(_device)] = "cpu"
    threads: Annotated[int, Field(ge=1, le=4096)] | None = None
    backend: Annotated[str | None, _one_of(None, "auto", "native", "aten", "triton", "cuda")] = None
    evaluate_on: Annotated[str, _one_of("val", "test")] = "val"
    pretrain_epochs: _Count = 20
    pretrain_lr: _NotNegative = 0.05
    log_every: _Whole = 200

    def __post_init__(self) -> None:
        for name, adapter in _adapters().items():
            value = getattr(self, name)
            try:
                setattr(self, name, adapter.validate_python(value))
            except ValidationError as error:
                raise ValueError(f"Config(): {settings_problem(name, value, error)}") from None
        if len(set(self.domains)) < len(self.domains):
            raise ValueError(f"Config(): expected `domains` to name each domain once, got {self.domains}.")
        if self.accumulate > self.batch:
            raise ValueError(
                f"Config(): expected `accumulate` to be at most `batch`, got {self.accumulate} > {self.batch}."
            )
        if self.initial <= self.threshold:
            raise ValueError(
                "Config(): expected `initial` to be above `threshold`, so that training starts with all channels on, "
                f"got {self.initial} <= {self.threshold}."
            )
        if self.data != "embedded" and self.root is None:
            raise ValueError(
                f"Config(): expected `root`, the folder of {self.data!r}, got None. Hint: --set root=FOLDER"
            )
        if self.budget_ms is not None and self.measure != "time":
            raise ValueError(f"Config(): expected `measure` to be 'time' for `budget_ms`, got {self.measure!r}.")
        if self.model_options:
            try:
                text = json.dumps(self.model_options, sort_keys=True)
                problem = _options_problem(self.model, text)
            except (TypeError, ValueError, RecursionError) as error:
                problem = str(error)
            if problem:
                raise ValueError(
                    f"Config(): expected `model_options` to make a {self.model!r}, got {self.model_options!r}: "
                    f"{problem}"
                )

    def as_dict(self) -> dict[str, Any]:
        """All settings, for YAML and JSON."""
        return dataclasses.asdict(self)


@functools.cache
def _adapters() -> dict[str, TypeAdapter[Any]]:
    hints = typing.get_type_hints(Config, include_extras=True)
    return {
        one.name: TypeAdapter(hints[one.name], config=ConfigDict(strict=True)) for one in dataclasses.fields(Config)
    }


def settings_problem(name: str, value: Any, error: ValidationError) -> str:
    """The first thing that pydantic found, in the words of the other messages."""
    first = error.errors(include_url=False)[0]
    place = "".join(f"[{one}]" for one in first["loc"] if isinstance(one, int))
    rule = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    rule = rule[:1].lower() + rule[1:] if first["msg"] != rule else f"follow this rule: {first['msg']}"
    verb = "to be" if first["msg"].startswith("Input should be ") else "to"
    shown = repr(value)
    return f"expected `{name}{place}` {verb} {rule}, got {shown if len(shown) < 200 else shown[:200] + '...'}."


@functools.lru_cache(maxsize=64)
def _options_problem(model: str, text: str) -> str | None:
    """Why a model cannot be built with options, given as JSON; tried without memory, on the meta device."""
    from bap.models import build

    options = json.loads(text)
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            if value is not None and (type(one) is not int or not 1 <= one <= 65536):
                return f"`{name}` needs positive whole numbers."
    try:
        with torch.device("meta"), torch.no_grad():
            made = build(model, 2, **options).eval()
            made(torch.zeros(1, 3, MODELS[model].size, MODELS[model].size))
    except Exception as error:
        # A constructor given what a user wrote may raise anything.
        return f"{error}"
    return None


def config_of(values: Mapping[str, Any], where: str) -> Config:
    """Settings from names and values that came from ``where``, a file or a command.

    Raises:
        ValueError: for names or values that cannot be used.
    """
    known = [one.name for one in dataclasses.fields(Config)]
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, 1)
            hint = f" Hint: {close[0]}?" if close else ""
            raise ValueError(f"load_config(): expected settings among {sorted(known)}, got {name!r} in {where}.{hint}")
    try:
        return Config(**values)
    except ValueError as error:
        raise ValueError(f"{error} (From {where}.)") from None


def _loader() -> Any:
    """PyYAML's safe loader, which otherwise takes the last of two values of one name in silence."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for name in names:
                if names.count(name) > 1:
                    raise yaml.constructor.ConstructorError(None, None, f"{name!r} is set twice", node.start_mark)
            return super().construct_mapping(node, deep)

    return Loader


def _parsed(text: str, where: str) -> Any:
    import yaml

    try:
        return yaml.load(text, _loader())
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        found = " ".join(str(error).split())
        raise ValueError(f"load_config(): expected {where} to be YAML, got {found}.") from None


def override_values(overrides: Iterable[str]) -> dict[str, Any]:
    """``name=value`` overrides, whose values are YAML, as a dictionary; the last of two with one name counts.

    Raises:
        ValueError: for others.
    """
    values = {}
    for one in overrides:
        name, equals, text = one.partition("=")
        if not equals:
            raise ValueError(f"load_config(): expected overrides like name=value, got {one!r}.")
        values[name.strip()] = _parsed(text, f"the value of {one!r}")
    return values


def load_config(
    path: str | Path | None = None, overrides: Iterable[str] = (), base: Mapping[str, Any] | None = None
) -> Config:
    """Settings from a YAML file, then from ``name=value`` overrides, whose values are YAML too.

    Args:
        path: the file; None starts from the defaults.
        overrides: such as ``"beta=0.25"`` or ``"domains=[digits, signs]"``.
        base: settings to start from, before the file's.

    Raises:
        ValueError: for files, names or values that cannot be used.

    Examples:
        >>> from bap.config import load_config
        >>> config = load_config(overrides=["beta=0.25", "sharing=int", "domains=[digits, signs]"])
        >>> config.beta, config.sharing, config.domains
        (0.25, 'int', ['digits', 'signs'])
    """
    values: dict[str, Any] = dict(base or {})
    where = []
    if path is not None:
        try:
            text = read_bytes(path).decode()
        except (FileError, UnicodeDecodeError) as error:
            raise ValueError(f"load_config(): expected `path` to be a YAML file, got {path}: {error}") from None
        loaded = _parsed(text, str(path))
        if not isinstance(loaded, dict):
            raise ValueError(f"load_config(): expected {path} to hold names and values, got {type(loaded).__name__}.")
        values.update(loaded)
        where.append(str(path))
    changed = override_values(overrides)
    values.update(changed)
    where += [f"-s {name}" for name in changed]
    return config_of(values, ", ".join(where) or "the defaults")
