"""Serving a checkpoint over HTTP on Ray Serve, the extra ``serve``; ``bap serve`` starts it.

:func:`app` is the builder for Ray's own commands: ``serve run bap.serve:app checkpoint=RUN/checkpoint``, and for the
``import_path`` of a Serve config file.
"""

from __future__ import annotations

from typing import Any

from bap.serve.settings import ServeError, ServeSettings

__all__ = ["ServeError", "ServeSettings", "app"]


def app(arguments: dict[str, Any]) -> Any:
    """Builds the Ray Serve application.

    Args:
        arguments: fields of :class:`bap.serve.ServeSettings`; ``checkpoint`` is needed. Strings are converted.

    Returns:
        The ``ray.serve.Application``.

    Raises:
        ValueError: for settings that cannot be used.
        FileError: if the checkpoint cannot be loaded.
    """
    from bap.serve.deployments import build

    return build(ServeSettings.of(arguments))
