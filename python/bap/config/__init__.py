"""Settings: types, bounds and defaults, from YAML files and the command line."""

from bap.config.groups import LOSSES, MEASURES, Distill
from bap.config.load import config_of, load_config, override_values
from bap.config.settings import SHORT_NAMES, Config, full_names, known_settings

__all__ = [
    "LOSSES",
    "MEASURES",
    "SHORT_NAMES",
    "Config",
    "Distill",
    "config_of",
    "full_names",
    "known_settings",
    "load_config",
    "override_values",
]
