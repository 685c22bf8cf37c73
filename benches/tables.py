"""A table that is shown three ways: on the screen (rich), in Markdown and in HTML."""

import html
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.table import Table as RichTable

GOOD, BAD = "met", "missed"
_COLOURS = {GOOD: "green", BAD: "red"}


@dataclass
class Table:
    """Cells are text; columns are aligned to the right except the first ``left``.

    Args:
        title: Heading.
        columns: Column names.
        rows: Cells, as many per row as there are columns.
        note: Shown below the heading.
        left: Columns aligned to the left.
        screen: Whether the table is shown on the screen too.
        screen_rows: Rows shown there at most.
        highlight: Cells in colour.
    """

    title: str
    columns: Sequence[str]
    rows: list[list[str]]
    note: str = ""
    left: int = 1
    screen: bool = True
    screen_rows: int = 100
    highlight: set[str] = field(default_factory=lambda: {GOOD, BAD})

    def rich(self) -> RichTable:
        """For the screen."""
        left_out = len(self.rows) - self.screen_rows
        note = f"{self.note} {left_out} more in the report." if left_out > 0 else self.note
        table = RichTable(title=self.title, caption=note or None, title_justify="left", caption_justify="left")
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="left" if i < self.left else "right", no_wrap=True)
        for row in self.rows[: self.screen_rows]:
            table.add_row(*(f"[{_COLOURS[cell]}]{cell}[/]" if cell in self.highlight else cell for cell in row))
        return table

    def markdown(self) -> str:
        """For ``report.md``."""
        rule = [":--" if i < self.left else "--:" for i in range(len(self.columns))]
        lines = [f"| {' | '.join(line)} |" for line in (self.columns, rule, *self.rows)]
        note = f"{self.note}\n\n" if self.note else ""
        return f"## {self.title}\n\n{note}" + "\n".join(lines) + "\n"

    def html(self) -> str:
        """For ``report.html``."""

        def line(cells: Sequence[str], tag: str) -> str:
            parts = []
            for i, cell in enumerate(cells):
                classes = ["l"] if i < self.left else []
                classes += [cell] if cell in self.highlight else []
                attribute = f' class="{" ".join(classes)}"' if classes else ""
                parts.append(f"<{tag}{attribute}>{html.escape(cell)}</{tag}>")
            return f"<tr>{''.join(parts)}</tr>"

        note = f"<p>{html.escape(self.note)}</p>" if self.note else ""
        body = "\n".join(line(row, "td") for row in self.rows)
        return (
            f"<h2>{html.escape(self.title)}</h2>{note}\n<div class=scroll><table><thead>{line(self.columns, 'th')}"
            f"</thead><tbody>\n{body}\n</tbody></table></div>"
        )
