"""Builds backbones, loads their weights, and names the convolutions that can stay without switches."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn

from bap.files import parse_tensors, read_bytes
from bap.models.rebuffi import RebuffiResNet26, URLResNet26, renamed_keys
from bap.models.resnet26 import ResNet26
from bap.models.wide_resnet import WideResNet

__all__ = ["MODELS", "Backbone", "build", "load_weights", "stem_and_shortcuts"]


@dataclass(frozen=True)
class Backbone:
    """A network that can be built by name.

    Args:
        make: ``make(num_classes=..., **options)``.
        size: height and width of its usual input.
        head: name of the last linear layer.
        options: names of further arguments.
        renamed: from entries of released weights to those of the network; None: they have its names.
    """

    make: Callable[..., nn.Module]
    size: int
    head: str
    options: tuple[str, ...] = ()
    renamed: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None


def _torchvision(name: str) -> Callable[..., nn.Module]:
    def make(num_classes: int = 1000) -> nn.Module:
        try:
            import torchvision
        except ImportError as error:
            raise ImportError(
                f"build(): expected torchvision for {name!r}, got {error}. Hint: pip install torchvision"
            ) from None
        return getattr(torchvision.models, name)(weights=None, num_classes=num_classes)

    return make


def _vgg16(num_classes: int = 1000) -> nn.Module:
    return _torchvision("vgg16")(num_classes)


def _options(kind: type[nn.Module]) -> tuple[str, ...]:
    return tuple(name for name in inspect.signature(kind).parameters if name != "num_classes")


MODELS: dict[str, Backbone] = {
    "resnet26": Backbone(ResNet26, 64, "fc", _options(ResNet26)),
    "resnet26_rebuffi": Backbone(RebuffiResNet26, 64, "fc", _options(RebuffiResNet26), renamed_keys),
    "resnet26_url": Backbone(URLResNet26, 64, "fc", _options(URLResNet26), renamed_keys),
    "wrn28_4": Backbone(WideResNet, 64, "fc", _options(WideResNet)),
    "resnet50": Backbone(_torchvision("resnet50"), 224, "fc"),
    "densenet121": Backbone(_torchvision("densenet121"), 224, "classifier"),
    "vgg16": Backbone(_vgg16, 224, "classifier.6"),
}


def build(name: str, num_classes: int, **options: Any) -> nn.Module:
    """A new backbone with random weights.

    Args:
        name: one of :data:`MODELS`; ``resnet50``, ``densenet121`` and ``vgg16`` are torchvision's, with its key names.
        num_classes: outputs of the classifier.
        **options: of :class:`~bap.models.ResNet26` and :class:`~bap.models.WideResNet`, such as ``widths``.

    Raises:
        ValueError: for other names and options.
        ImportError: if torchvision is needed and not installed.

    Examples:
        >>> from bap.models import build
        >>> sum(p.numel() for p in build("wrn28_4", 1000).parameters())
        6103480
    """
    if name not in MODELS:
        raise ValueError(f"build(): expected `name` to be one of {list(MODELS)}, got {name!r}.")
    backbone = MODELS[name]
    for option in options:
        if option not in backbone.options:
            raise ValueError(
                f"build(): expected options of {name!r} to be among {list(backbone.options)}, got {option!r}."
            )
    return backbone.make(num_classes=num_classes, **options)


def _today(key: str) -> str:
    """The current name of a key: torchvision's DenseNet files say ``norm.1`` for ``norm1``."""
    return re.sub(r"(\.denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key.removeprefix("module."))


def load_weights(
    model: nn.Module,
    path: str | Path,
    head: str,
    renamed: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None,
) -> list[str]:
    """Loads a checkpoint of the plain backbone; the classifier only where it fits.

    Args:
        model: the plain backbone.
        path: a ``.safetensors`` file, or a state dict that :func:`torch.load` reads with ``weights_only=True``.
            ``{"state_dict": ...}``, ``{"net": ...}``, names that begin with ``module.``, and older DenseNet names
            are understood.
        head: name of the classifier.
        renamed: see :class:`Backbone`.

    Returns:
        Names of the classifier's entries that were left out.

    Raises:
        ValueError: if the file cannot be read, or lacks entries, or has others or other shapes.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            data = read_bytes(path)
            state: Mapping[str, Any] = load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
            if {"info", "checksum"} & set(header):
                # Written by bap, with a checksum.
                state = parse_tensors(data, path)[0]
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        problem = str(error) or type(error).__name__
        raise ValueError(
            f"load_weights(): expected `path` to be a checkpoint of tensors, got {path}: {problem}"
        ) from None
    if not isinstance(state, Mapping):
        raise ValueError(
            f"load_weights(): expected `path` to be a checkpoint of tensors, got {path}: {type(state).__name__}."
        )
    for wrapper in ("state_dict", "net"):
        if isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    state = {_today(key): value for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if renamed is not None:
        state = renamed(state)
    own = model.state_dict()
    left_out = [
        key for key in own if key.startswith(f"{head}.") and (key not in state or state[key].shape != own[key].shape)
    ]
    state = {key: value for key, value in state.items() if key not in left_out}
    missing = [
        key for key in own if key not in state and key not in left_out and not key.endswith("num_batches_tracked")
    ]
    strange = [key for key in state if key not in own or state[key].shape != own[key].shape]
    if missing or strange:
        raise ValueError(
            f"load_weights(): expected {path} to hold the backbone's entries, got none for {missing[:3]} and others, "
            f"or of other shapes, for {strange[:3]}. Hint: are the model's name and options those of the file?"
        )
    model.load_state_dict(state, strict=False)
    return left_out


def stem_and_shortcuts(model: nn.Module) -> set[str]:
    """Names of the convolutions that read the image, and of those on shortcuts: options leave them unswitched [R]."""
    names = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            last = name.split(".")
            if module.in_channels == 3 or "shortcut" in last or "downsample" in last:
                names.add(name)
    return names
