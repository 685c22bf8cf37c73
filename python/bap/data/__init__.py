"""Domains: the built-in suites, and the loaders of the Visual Decathlon and of ImageNet-to-Sketch."""

import warnings
from typing import Any

from bap.data.builtin import BUILTIN_DOMAINS, BUILTIN_SIZE, BUILTIN_SUITES, VARIED_DOMAINS, builtin_suite
from bap.data.decathlon import DECATHLON, DECATHLON_RESIZE, load_decathlon
from bap.data.domain import SPLITS, Arrays, Domain, Split, order_of, random_of
from bap.data.files import DECODED, DataError, ImageFiles
from bap.data.sketch import SKETCH, load_sketch, sketch_resize

__all__ = [
    "BUILTIN_DOMAINS",
    "BUILTIN_SIZE",
    "BUILTIN_SUITES",
    "DECATHLON",
    "DECATHLON_RESIZE",
    "DECODED",
    "SKETCH",
    "SPLITS",
    "VARIED_DOMAINS",
    "Arrays",
    "DataError",
    "Domain",
    "ImageFiles",
    "Split",
    "builtin_suite",
    "load_decathlon",
    "load_sketch",
    "order_of",
    "random_of",
    "sketch_resize",
]


def __getattr__(name: str) -> Any:
    new = {"DOMAINS": "BUILTIN_DOMAINS", "embedded_suite": "builtin_suite"}.get(name)
    if new is None:
        raise AttributeError(f"module 'bap.data' has no attribute {name!r}")
    warnings.warn(f"bap.data.{name} is deprecated, use {new}", DeprecationWarning, stacklevel=2)
    return globals()[new]
