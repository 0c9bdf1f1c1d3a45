"""Tables of a command's results, for terminals, Markdown and programs."""

from __future__ import annotations

import json
from typing import Any


def show(rows: list[dict[str, Any]], columns: dict[str, str], style: str = "text") -> str:
    """Format rows of dictionaries as a table; `columns` maps their keys to headings.

    Styles: text, markdown, json (every key).
    """
    if style == "json":
        return json.dumps(rows, indent=1)
    cells = [list(columns.values())] + [[_text(row.get(key)) for key in columns] for row in rows]
    if style == "markdown":
        cells.insert(1, ["---"] * len(columns))
        return "\n".join(f"| {' | '.join(line)} |" for line in cells)
    widths = [max(map(len, column)) for column in zip(*cells)]
    numeric = [
        all(isinstance(row.get(key), (int, float, type(None))) for row in rows) for key in columns
    ]
    lines = []
    for line in cells:
        padded = (
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric)
        )
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
