"""The directive ``environment-table``: bap_kernels' environment variables, from their declaration."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList

from bap_kernels.settings import ENVIRONMENT


class EnvironmentTable(Directive):
    """A table of every variable that the package declares."""

    def run(self) -> list[nodes.Node]:
        """The table's nodes."""
        lines = [".. list-table::", "   :header-rows: 1", "   :widths: 34 16 10 40", ""]
        for row in (("Variable", "Default", "Read at", "Meaning"), *self._rows()):
            for place, cell in enumerate(row):
                lines.append(f"   {'* -' if place == 0 else '  -'} {cell}")
        parent = nodes.section()
        parent.document = self.state.document
        self.state.nested_parse(StringList(lines, source="bap_kernels.settings"), self.content_offset, parent)
        return list(parent.children)

    def _rows(self) -> list[tuple[str, str, str, str]]:
        return [
            (f"``{one.name}``", f"``{one.default}``" if one.default else "", one.read, one.meaning)
            for one in ENVIRONMENT
        ]


def setup(app: Any) -> dict[str, bool]:
    """Registers the directive."""
    app.add_directive("environment-table", EnvironmentTable)
    return {"parallel_read_safe": True}
