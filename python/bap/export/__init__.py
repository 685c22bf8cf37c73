"""A trained network as files for other runtimes, one per domain."""

from bap.export.formats import FORMATS, Format, executorch_program, unavailable_reason
from bap.export.network import Exported, export_domain

__all__ = ["FORMATS", "Exported", "Format", "executorch_program", "export_domain", "unavailable_reason"]
