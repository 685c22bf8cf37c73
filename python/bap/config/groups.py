"""The groups of settings: what each setting is, its type, its bounds and its default."""

from __future__ import annotations

import re
import warnings
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from bap.models import MODELS
from bap_kernels.settings import BACKENDS

__all__ = [
    "LOSSES",
    "MEASURES",
    "Budget",
    "Data",
    "Distill",
    "Group",
    "Model",
    "Optimiser",
    "Pretrain",
    "Run",
    "Schedule",
    "Sharing",
    "Switches",
]

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


class Group(BaseModel):
    """Settings that are checked when they are read, and do not change."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class Data(Group):
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
        size: height and width of the input, from 8 to 4096; None is the data's, as it always is of a built-in suite.
        workers: processes that load images from files.
        cache: folder in which decoded images are kept, as 8-bit pixels; None decodes them in every epoch.
        cache_gib: the most that these may take, in GiB of 2^30 bytes, all splits of all domains together.
        crops: of the decathlon's images: ``papers``, or ``rebuffi``, see :func:`bap.data.load_decathlon`.
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
    crops: Annotated[str, _one_of("papers", "rebuffi")] = "papers"
    full: bool = True
    decode_all: bool = False
    train_on: Annotated[str, _one_of("train", "train+val")] = "train"
    evaluate_on: Annotated[str, _one_of("val", "test", "train")] = "val"

    @property
    def built_in(self) -> bool:
        """Whether the images are made in memory, not read from files."""
        return self.suite in ("builtin", "varied")


class Model(Group):
    """The backbone.

    Attributes:
        name: one of :data:`bap.models.MODELS`.
        options: its further arguments.
        weights: file with the pre-trained backbone; None: random, or as ``bap pretrain`` makes it.
    """

    name: Annotated[str, _one_of(*MODELS)] = "resnet26"
    options: dict[str, Any] = {}
    weights: _Text | None = None


class Switches(Group):
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


class Budget(Group):
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


class Sharing(Group):
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


class Distill(Group):
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


class Optimiser(Group):
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


class Schedule(Group):
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


class Pretrain(Group):
    """The plain backbone on the source domain, for ``bap pretrain``.

    Attributes:
        epochs: passes over its training images.
        lr: of SGD, with a cosine decay.
    """

    epochs: _Count = 20
    lr: _NotNegative = 0.05


class Run(Group):
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
