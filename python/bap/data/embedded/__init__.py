"""The embedded suite: five visual domains of 32×32 colour images, made in memory, the same in every run."""

from bap.data.embedded.suite import DOMAINS, embedded_suite

__all__ = ["DOMAINS", "embedded_suite"]
