"""Docstrings as mkdocstrings reads them: Markdown, from the few marks of reStructuredText that ours
have.
"""

from __future__ import annotations

import re
from pathlib import Path

import griffe

ROLE = re.compile(r":[a-z]+:`~?([\w.]+)`")
TABLE = re.compile(r"^( *)(=+(?: +=+)+)\n(.+)\n\1\2\n((?:.+\n)+?)\1\2$", re.MULTILINE)
# Public names, by what they end in, with the address of their place on the page.
API = (Path(__file__).parents[1] / "api.md").read_text()
PUBLIC = {name.rpartition(".")[2]: name for name in re.findall(r"^::: (\S+)$", API, re.MULTILINE)}


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """
    >>> markdown("see :func:`rpo_loss`, of :class:`trl.DPOConfig`")
    'see [`rpo_loss`][rpo_kernels.rpo_loss], of `trl.DPOConfig`'
    """
    return TABLE.sub(table, ROLE.sub(reference, text))


def reference(role: re.Match) -> str:
    name = role[1].rpartition(".")[2]
    return f"[`{name}`][{PUBLIC[name]}]" if name in PUBLIC else f"`{role[1]}`"


def table(rows: re.Match) -> str:
    """A simple table of reStructuredText: columns begin where its rule says, the last one ends
    with the line.
    """
    indent = rows[1]
    begin = [part.start() for part in re.finditer("=+", rows[2])]
    columns = [slice(*ends) for ends in zip(begin, [*begin[1:], None])]
    cells = [
        [line[len(indent) :][column].strip().replace("|", r"\|") for column in columns]
        for line in (rows[3], *rows[4].splitlines())
    ]
    cells.insert(1, ["---"] * len(begin))
    return "\n".join(f"{indent}| " + " | ".join(line) + " |" for line in cells)
