"""Links in docstrings: a public name in backticks leads to its place on the page of the API."""

from __future__ import annotations

import re
from pathlib import Path

import griffe

NAME = re.compile(r"(?<!`)`(\w+)`(?!`)")
# public names, by what they end in, with their full names
API = (Path(__file__).parents[1] / "api.md").read_text()
PUBLIC = {name.rpartition(".")[2]: name for name in re.findall(r"^::: (\S+)$", API, re.MULTILINE)}


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring:
            obj.docstring.value = NAME.sub(link, obj.docstring.value)


def link(name: re.Match) -> str:
    """
    >>> link(NAME.match("`rpo_loss`")), link(NAME.match("`logits`"))
    ('[`rpo_loss`][rpo_kernels.rpo_loss]', '`logits`')
    """
    return f"[{name[0]}][{PUBLIC[name[1]]}]" if name[1] in PUBLIC else name[0]
