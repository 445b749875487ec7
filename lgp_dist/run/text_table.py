"""Tables as aligned text: plain for a terminal, or Markdown."""

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, Literal

Row = Mapping[str, Any]
Column = str | tuple[str, Callable[[Row], Any]]
"""A field of each row; or a heading and a function of the row."""


def text_table(
    head: Sequence[str],
    lines: Sequence[Sequence[str]],
    left: int = 1,
    style: Literal["plain", "ruled", "markdown"] = "plain",
) -> str:
    """Cells in columns as wide as their widest cell, without a final newline.

    left: number of columns, from the first, that are aligned to the left; the others to the right. ruled: plain, with
    dashes under the head. markdown: with dashes too, and | in a cell is escaped.
    """
    markdown = style == "markdown"
    cells = [[cell.replace("|", "\\|") if markdown else cell for cell in line] for line in (head, *lines)]
    widths = [max(3 * markdown, *map(len, column)) for column in zip(*cells, strict=True)]
    if style != "plain":
        ends = ["-"] * left + [":" if markdown else "-"] * (len(head) - left)
        cells.insert(1, ["-" * (width - 1) + end for width, end in zip(widths, ends, strict=True)])
    pads = [str.ljust] * left + [str.rjust] * (len(head) - left)
    padded = [[pad(cell, width) for pad, cell, width in zip(pads, line, widths, strict=True)] for line in cells]
    if markdown:
        return "\n".join(f"| {' | '.join(line)} |" for line in padded)
    return "\n".join("  ".join(line).rstrip() for line in padded)


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """`text_table` as Markdown: the first column to the left, the others to the right."""
    return text_table(head, lines, style="markdown")


def objects_table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """Some fields of objects as a plain table: - for None; the first columns to the left until one holds numbers."""
    named = [(column, itemgetter(column)) if isinstance(column, str) else column for column in columns]
    values = [[value(row) for _, value in named] for row in rows]
    numeric = [all(isinstance(value, int | float | None) for value in column) for column in zip(*values, strict=True)]
    left = numeric.index(True) if True in numeric else len(columns)
    lines = [["-" if value is None else str(value) for value in line] for line in values]
    return text_table([heading for heading, _ in named], lines, left)
