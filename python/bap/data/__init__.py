"""Domains: the embedded suite, and the loaders of the Visual Decathlon and of ImageNet-to-Sketch."""

from bap.data.decathlon import DECATHLON, load_decathlon
from bap.data.domain import SPLITS, Arrays, Domain, Split, order_of, random_of
from bap.data.embedded import DOMAINS, embedded_suite
from bap.data.files import DataError, ImageFiles
from bap.data.sketch import SKETCH, load_sketch

__all__ = [
    "DECATHLON",
    "DOMAINS",
    "SKETCH",
    "SPLITS",
    "Arrays",
    "DataError",
    "Domain",
    "ImageFiles",
    "Split",
    "embedded_suite",
    "load_decathlon",
    "load_sketch",
    "order_of",
    "random_of",
]
