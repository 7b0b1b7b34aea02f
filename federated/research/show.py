"""A small table that a notebook shows as HTML and a terminal as text. No data frames needed."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Texts in rows under headings. `notes` stand below; `warnings` above everything else."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        widths = [max(map(len, cells)) for cells in zip(self.columns, *self.rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (self.columns, *self.rows)
        ]
        warned = [f"WARNING: {one}" for one in self.warnings]
        return "\n".join([*warned, self.title, *lines, *self.notes])

    def _repr_html_(self) -> str:
        """What a notebook shows. Every text is escaped: names in a release are other people's."""
        head = "".join(f"<th>{escape(one)}</th>" for one in self.columns)
        body = "".join(
            f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in self.rows
        )
        warned = "".join(f"<p><strong>WARNING: {escape(one)}</strong></p>" for one in self.warnings)
        notes = "".join(f"<p>{escape(one)}</p>" for one in self.notes)
        caption = f"<caption>{escape(self.title)}</caption>"
        return f"{warned}<table>{caption}<tr>{head}</tr>{body}</table>{notes}"
