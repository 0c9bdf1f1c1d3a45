"""Tables of a command's results, for terminals, Markdown and programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any


def show(rows: list[dict[str, Any]], columns: dict[str, str], style: str = "text") -> str:
    """Format rows of dictionaries as a table; `columns` maps their keys to headings.

    Styles: text, markdown, json (every key).
    """
    if style == "json":
        return json.dumps(rows, indent=1)
    if style == "markdown":
        cells = [list(columns.values()), ["---"] * len(columns)]
        cells += [_cells(row, columns) for row in rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in cells)
    return "\n".join(lines(rows, columns, rows))


def lines(
    rows: Iterable[dict[str, Any]], columns: dict[str, str], like: list[dict[str, Any]]
) -> Iterator[str]:
    """Yield the lines of a table in text style, the headings first, as its rows come.

    Columns are as wide as the rows `like` need, and right-aligned where these have numbers.
    """
    cells = [list(columns.values()), *(_cells(row, columns) for row in like)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    numeric = [
        all(isinstance(row.get(key), (int, float, type(None))) for row in like) for key in columns
    ]

    def line(texts: Iterable[str]) -> str:
        padded = (
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(texts, widths, numeric)
        )
        return "  ".join(padded).rstrip()

    yield line(columns.values())
    for row in rows:
        yield line(_cells(row, columns))


def _cells(row: dict[str, Any], columns: dict[str, str]) -> list[str]:
    return [_text(row.get(key)) for key in columns]


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
