"""Lines for a terminal: wrapped, cut or aligned by the cells that their characters take. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.cells import cell_len, chop_cells, set_cell_size
from rich.text import Text

from swarmtrain.words import one_line

FACT_LINES = 4
FACT_INDENT = 14


def cut_line(width: int, *parts: str | Text | tuple[str, str]) -> Text:
    """Return one line of `parts`, cut with an ellipsis if it does not fit."""
    line = Text.assemble(*parts, no_wrap=True)
    line.truncate(width, overflow="ellipsis")
    return line


def fact_lines(width: int, name: str, text: str, most: int = FACT_LINES) -> list[Text]:
    """Return a named fact in at most `most` lines."""
    lines = wrap(text, width - FACT_INDENT, most)
    return [cut_line(width, (f"{name if not n else '':<{FACT_INDENT}}", "dim"), line) for n, line in enumerate(lines)]


def wrapped_lines(text: str, width: int, most: int, style: str = "") -> list[Text]:
    """Return `text` in at most `most` lines of one style."""
    return [cut_line(width, (line, style)) for line in wrap(text, width, most)]


def wrap(text: str, cells: int, most: int) -> list[str]:
    """Wrap `text` between words into at most `most` lines of `cells`; if longer, the last ends with an ellipsis."""
    cells, lines = max(10, cells), [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if cell_len(joined) <= cells:
            lines[-1] = joined
            continue
        pieces = chop_cells(word, cells)
        lines[-1:] = [lines[-1], *pieces] if lines[-1] else pieces
    if len(lines) > most:
        lines = [*lines[: most - 1], set_cell_size(lines[most - 1], min(cells - 1, cell_len(lines[most - 1]))) + "…"]
    return lines


def clipped(text: str, cells: int) -> str:
    """Return the beginning of `text`, escaped, in at most `cells`."""
    text = one_line(text)
    return text if cell_len(text) <= cells else set_cell_size(text, cells - 1).rstrip() + "…"


def aligned(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    """Format rows as lines with aligned columns; columns in `right` are right-aligned."""
    widths = [max(cell_len(row[column]) for row in rows) for column in range(len(rows[0]))] if rows else []
    lines = []
    for row in rows:
        cells = []
        for column, (text, width) in enumerate(zip(row, widths, strict=True)):
            pad = " " * (width - cell_len(text))
            cells.append(pad + text if column in right else text + pad)
        lines.append("  ".join(cell for cell, width in zip(cells, widths, strict=True) if width).rstrip())
    return lines
