"""The snippets of docs/trainers.md and docs/hosts.md, by the heading above them."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def snippets_of(page: str) -> dict[str, list[str]]:
    sections = re.findall(
        r"^## (.*?)\n(.*?)(?=^## |\Z)", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE
    )
    return {
        title.strip(): re.findall(r"```python\n(.*?)```", body, re.DOTALL)
        for title, body in sections
    }


SNIPPETS = snippets_of("trainers.md") | snippets_of("hosts.md")
