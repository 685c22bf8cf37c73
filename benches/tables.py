"""A table with three forms: for the screen (rich), Markdown and HTML."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table as RichTable

GOOD, BAD = "met", "missed"
_COLOURS = {GOOD: "green", BAD: "red"}


@dataclass
class Table:
    """A table of text cells.

    Args:
        title: Heading.
        columns: Column names.
        rows: Cells, one per column.
        note: Text below the heading.
        left: Number of columns aligned to the left; the others are aligned to the right.
        screen: Whether the table is also shown on the screen.
        screen_rows: Rows shown there at most.
    """

    title: str
    columns: Sequence[str]
    rows: list[list[str]]
    note: str = ""
    left: int = 1
    screen: bool = True
    screen_rows: int = 100

    def rich(self) -> RichTable:
        """Return the table for the screen."""
        hidden = len(self.rows) - self.screen_rows
        note = f"{self.note} {hidden} more in the report." if hidden > 0 else self.note
        table = RichTable(title=self.title, caption=note or None, title_justify="left", caption_justify="left")
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="left" if i < self.left else "right", no_wrap=True)
        for row in self.rows[: self.screen_rows]:
            table.add_row(*(f"[{_COLOURS[cell]}]{cell}[/]" if cell in _COLOURS else cell for cell in row))
        return table

    def markdown(self) -> str:
        """Return the table in Markdown."""
        rule = [":--" if i < self.left else "--:" for i in range(len(self.columns))]
        lines = [f"| {' | '.join(line)} |" for line in (self.columns, rule, *self.rows)]
        note = f"{self.note}\n\n" if self.note else ""
        return f"## {self.title}\n\n{note}" + "\n".join(lines) + "\n"

    def html(self) -> str:
        """Return the table in HTML."""

        def line(cells: Sequence[str], tag: str) -> str:
            parts = []
            for i, cell in enumerate(cells):
                classes = ["l"] if i < self.left else []
                classes += [cell] if cell in _COLOURS else []
                attribute = f' class="{" ".join(classes)}"' if classes else ""
                parts.append(f"<{tag}{attribute}>{html.escape(cell)}</{tag}>")
            return f"<tr>{''.join(parts)}</tr>"

        note = f"<p>{html.escape(self.note)}</p>" if self.note else ""
        body = "\n".join(line(row, "td") for row in self.rows)
        return (
            f"<h2>{html.escape(self.title)}</h2>{note}\n<div class=scroll><table><thead>{line(self.columns, 'th')}"
            f"</thead><tbody>\n{body}\n</tbody></table></div>"
        )
