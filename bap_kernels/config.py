"""Deprecated, for one release: its names are in :mod:`bap_kernels.settings` and :mod:`bap_kernels.dispatch`."""

from __future__ import annotations

import warnings
from typing import Any

from bap_kernels import dispatch as _dispatch
from bap_kernels import settings as _settings

_RENAMED = {"why_not": "unsupported_reason"}


def __getattr__(name: str) -> Any:
    new_name = _RENAMED.get(name, name)
    for module in (_settings, _dispatch):
        if new_name in module.__all__:
            warnings.warn(
                f"bap_kernels.config.{name} is deprecated. Hint: it is {module.__name__}.{new_name} now.",
                DeprecationWarning,
                stacklevel=2,
            )
            return getattr(module, new_name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
