"""The built-in suites: visual domains of 32×32 colour images, made in memory, the same in every run."""

from bap.data.builtin.canvas import SIZE as BUILTIN_SIZE
from bap.data.builtin.suite import BUILTIN_DOMAINS, BUILTIN_SUITES, VARIED_DOMAINS, builtin_suite

__all__ = ["BUILTIN_DOMAINS", "BUILTIN_SIZE", "BUILTIN_SUITES", "VARIED_DOMAINS", "builtin_suite"]
