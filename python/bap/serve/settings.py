"""Settings of a service."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from bap.data.images import MAX_PIXELS

__all__ = ["ServeError", "ServeSettings"]


class ServeError(RuntimeError):
    """The service could not be started."""


def _names(value: Any) -> Any:
    """Ray's command line gives strings only."""
    return tuple(value.split(",")) if isinstance(value, str) else value


class ServeSettings(BaseModel):
    """What is served, and its limits.

    Args:
        checkpoint: folder of a trained network; every node reads it under this path.
        domains: those that are served; None serves all. A string lists them with commas between.
        replicas: processes that hold the network.
        cpus: CPUs, and threads, of each.
        backend: of the kernels; None: ``heuristic``.
        max_batch: images of a batch.
        max_wait_ms: milliseconds that the first image of a batch waits for others.
        queue: images that may wait for a replica; further requests are refused.
        max_image_bytes: of a request's body.
        max_image_pixels: of an image, before it is resized.
        timeout: seconds for receiving a request, and for answering it.

    Examples:
        >>> from bap.serve import ServeSettings
        >>> settings = ServeSettings.of({"checkpoint": "runs/half/checkpoint", "max_batch": "16", "domains": "a,b"})
        >>> settings.max_batch, settings.domains, settings.queue
        (16, ('a', 'b'), 64)
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: Path
    domains: Annotated[tuple[str, ...], BeforeValidator(_names), Field(min_length=1)] | None = None
    replicas: Annotated[int, Field(ge=1, le=4096)] = 1
    cpus: Annotated[int, Field(ge=1, le=4096)] = 1
    backend: Literal["heuristic", "native", "aten", "auto"] | None = None
    max_batch: Annotated[int, Field(ge=1, le=4096)] = 8
    max_wait_ms: Annotated[float, Field(ge=0, le=60_000, allow_inf_nan=False)] = 2.0
    queue: Annotated[int, Field(ge=1, le=1_000_000)] = 64
    max_image_bytes: Annotated[int, Field(ge=1, le=2**31)] = 10 * 2**20
    max_image_pixels: Annotated[int, Field(ge=1, le=MAX_PIXELS)] = 2**25
    timeout: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] = 30.0

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> ServeSettings:
        """Checks values, and makes the path absolute: other processes have other working directories.

        Raises:
            ValueError: naming the setting, its rule and the value.
        """
        try:
            settings = cls.model_validate(dict(values))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = str(first["loc"][0]) if first["loc"] else "settings"
            got = "none" if first["type"] == "missing" else repr(first["input"])
            rule = {"missing": "be given", "extra_forbidden": f"be one of {', '.join(cls.model_fields)}"}
            message = rule.get(first["type"], f"fit ({first['msg']})")
            raise ValueError(f"serve(): expected `{name}` to {message}, got {got}.") from None
        return settings.model_copy(update={"checkpoint": Path(os.path.abspath(settings.checkpoint))})

    @property
    def max_ongoing(self) -> int:
        """Images at one replica: a batch that is computed, and the next one."""
        return 2 * self.max_batch
