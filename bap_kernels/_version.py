"""The version, by itself, so that every module can have it."""

__version__ = "0.2.0"
