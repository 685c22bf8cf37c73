"""All settings of a run, from a YAML file and overrides; the resolved ones are saved beside the results."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bap.budget import MEASURES
from bap.models import MODELS
from bap.sharing import LOSSES

__all__ = ["Config", "load_config"]

_CHOICES: dict[str, tuple[Any, ...]] = {
    "data": ("embedded", "decathlon", "sketch"),
    "model": tuple(MODELS),
    "source_mode": ("switched", "excluded", "dense"),
    "measure": MEASURES,
    "sharing": (None, *LOSSES),
    "round_robin": ("epoch", "batch"),
    "schedule": ("step", "cosine"),
    "amp": (None, "bf16", "fp16"),
    "evaluate_on": ("val", "test"),
}
_POSITIVE = (
    "images",
    "epochs",
    "batch",
    "accumulate",
    "temperature",
    "multiplier_rate",
    "sharing_rate",
    "pretrain_epochs",
)


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
        size: height and width of the input; None is the data's.
        workers: processes that load images from files.
        full: whether data on disk must have the published numbers of images and classes.
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
        device: such as ``cpu`` or ``cuda``.
        threads: of PyTorch; None leaves them. Results are bit-equal only for the same number.
        backend: of the kernels in training and evaluation; None: ``native`` where it runs, else ``aten``.
        evaluate_on: split of the accuracy in each epoch.
        pretrain_epochs, pretrain_lr: of the source domain, for ``bap pretrain``.

    Raises:
        ValueError: for values that cannot be used.

    Examples:
        >>> from bap.config import Config
        >>> Config(beta=0.5, sharing="union").measure
        'mac'
    """

    data: str = "embedded"
    root: str | None = None
    domains: list[str] = field(default_factory=list)
    source: str | None = None
    source_mode: str = "switched"
    images: int = 1200
    size: int | None = None
    workers: int = 0
    full: bool = True
    model: str = "resnet26"
    model_options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    switch_stem: bool = False
    switch_shortcuts: bool = True
    threshold: float = 5e-3
    initial: float = 1e-2
    ste_every: int = 1
    beta: float = 0.5
    measure: str = "mac"
    budget_ms: float | None = None
    multiplier_rate: float = 0.1
    sharing: str | None = None
    sharing_weight: float = 1.0
    sharing_learnable: bool = False
    sharing_rate: float = 1e-2
    sharing_slack: float = 0.0
    relaxed: bool = False
    temperature: float = 2e-3
    settle: float = 1.0
    keep_at_least: int = 1
    epochs: int = 150
    batch: int = 64
    accumulate: int = 1
    round_robin: str = "epoch"
    lr_switch: float = 1e-4
    lr_norm: float = 1e-4
    lr_head: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    train_backbone: bool = False
    lr_backbone: float = 1e-3
    schedule: str = "step"
    amp: str | None = None
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None
    backend: str | None = None
    evaluate_on: str = "val"
    pretrain_epochs: int = 20
    pretrain_lr: float = 0.05

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"Config(): expected `{name}` to be one of {list(allowed)}, got {getattr(self, name)!r}."
                )
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise ValueError(f"Config(): expected `{name}` to be positive, got {getattr(self, name)}.")
        for name in ("beta", "settle"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"Config(): expected `{name}` to be in (0, 1], got {getattr(self, name)}.")
        if self.accumulate > self.batch:
            raise ValueError(
                f"Config(): expected `accumulate` to be at most `batch`, got {self.accumulate} > {self.batch}."
            )
        if self.data != "embedded" and self.root is None:
            raise ValueError(
                f"Config(): expected `root`, the folder of {self.data!r}, got None. Hint: --set root=FOLDER"
            )
        if self.budget_ms is not None and self.measure != "time":
            raise ValueError(f"Config(): expected `measure` to be 'time' for `budget_ms`, got {self.measure!r}.")

    def as_dict(self) -> dict[str, Any]:
        """All settings, for YAML and JSON."""
        return dataclasses.asdict(self)


def _converted(name: str, value: Any, kind: str) -> Any:
    """A value of the field's type; YAML reads 1e-4 as text, and 1 for a float as an int."""
    optional = "None" in kind
    if value is None:
        if optional:
            return None
    elif kind.startswith("float") and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif (kind.startswith("int") and isinstance(value, int) and not isinstance(value, bool)) or (
        kind.startswith("bool") and isinstance(value, bool)
    ):
        return value
    elif kind.startswith("str") and isinstance(value, (str, int, float)):
        return str(value)
    elif kind.startswith("list") and isinstance(value, list):
        return [str(one) for one in value]
    elif kind.startswith("dict") and isinstance(value, dict):
        return value
    raise ValueError(f"load_config(): expected `{name}` to be {kind}, got {value!r}.")


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
    import yaml

    values: dict[str, Any] = dict(base or {})
    if path is not None:
        try:
            loaded = yaml.safe_load(Path(path).read_text())
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"load_config(): expected `path` to be a YAML file, got {path}: {error}") from None
        if not isinstance(loaded, dict):
            raise ValueError(f"load_config(): expected {path} to hold names and values, got {type(loaded).__name__}.")
        values.update(loaded)
    for one in overrides:
        name, equals, text = one.partition("=")
        if not equals:
            raise ValueError(f"load_config(): expected overrides like name=value, got {one!r}.")
        values[name.strip()] = yaml.safe_load(text)
    kinds = {f.name: str(f.type) for f in dataclasses.fields(Config)}
    for name in values:
        if name not in kinds:
            raise ValueError(f"load_config(): expected settings among {sorted(kinds)}, got {name!r}.")
    return Config(**{name: _converted(name, value, kinds[name]) for name, value in values.items()})
