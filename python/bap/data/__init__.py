"""Domains: the embedded suite, and the loaders of the Visual Decathlon and of ImageNet-to-Sketch."""

from bap.data.domain import SPLITS, Arrays, Domain, Split, order_of, random_of
from bap.data.embedded import DOMAINS, embedded_suite

__all__ = ["DOMAINS", "SPLITS", "Arrays", "Domain", "Split", "embedded_suite", "order_of", "random_of"]
