"""Training goes on only while losses and parameters are finite."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from bap.config import Config
from bap.train.evaluate import Accuracy

__all__ = ["CHECKED_EVERY", "TrainError", "check_losses", "check_parameters"]

# Steps between two looks at a loss on a GPU: each look waits for it.
CHECKED_EVERY = 50


class TrainError(RuntimeError):
    """Training cannot go on: a loss or a parameter is not finite."""


def check_losses(seen: Mapping[str, Accuracy], config: Config, epoch: int) -> None:
    """Looks at the sum of each domain's losses.

    Raises:
        TrainError: if one is not finite.
    """
    for name, counts in seen.items():
        if not math.isfinite(counts.loss):
            raise _not_finite(f"loss of {name!r}, {counts.loss},", config, epoch)


def check_parameters(model: nn.Module, config: Config, epoch: int) -> None:
    """Looks at what the last step of an epoch left, which no loss follows.

    Raises:
        TrainError: if a parameter is not finite.
    """
    for name, parameter in model.named_parameters():
        if not bool(parameter.detach().isfinite().all()):
            raise _not_finite(f"parameter {name!r}", config, epoch)


def _not_finite(what: str, config: Config, epoch: int) -> TrainError:
    trained = {"lr_backbone"} if config.optimiser.train_backbone else set()
    rates = config.optimiser.model_dump(include={"lr_switch", "lr_norm", "lr_head"} | trained)
    return TrainError(
        f"Trainer.fit(): expected losses and parameters to stay finite, got another {what} in epoch "
        f"{epoch + 1}. Hint: lower a learning rate of {rates}. What was saved of earlier epochs is unchanged."
    )
