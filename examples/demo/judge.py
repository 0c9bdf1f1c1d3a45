"""A judge without a model: code checks each instruction, as in IFEval (arXiv 2311.07911).

    >>> judge("few words", "What is the moon? Answer in at most 8 words.", "A rock.")
    1.0

A small model already follows each rule now and then: RPO reweights what a policy can sample, and a
rule that never succeeds has no reward to learn from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import NamedTuple


class Rule(NamedTuple):
    """An instruction, and whether a response (without surrounding white space) follows it."""

    instruction: str
    follows: Callable[[str], bool]


def is_short(text: str) -> bool:
    return 0 < len(re.findall(r"\w+(?:['’-]\w+)*", text)) <= 8


def is_pair_of_bullets(text: str) -> bool:
    """Two bullet points and nothing else."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return len(lines) == 2 and all(re.match(r"[-*•] +\S", line) for line in lines)


def is_json_answer(text: str) -> bool:
    """One JSON object with a non-empty "answer" and no other key; bare or in a Markdown fence."""
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text, re.DOTALL)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except ValueError:
        return False
    return (
        isinstance(value, dict)
        and list(value) == ["answer"]
        and re.search(r"\w", str(value["answer"])) is not None
    )


def has_title(text: str) -> bool:
    """A title in <<angular brackets>> that is not just "title"."""
    return re.search(r"<<(?! *title *>)[^<>]*\w[^<>]*>>", text, re.IGNORECASE) is not None


RULES = {
    "capitals": Rule("ANSWER IN CAPITAL LETTERS ONLY.", str.isupper),
    "few words": Rule("Answer in at most 8 words.", is_short),
    "bullets": Rule(
        "Use exactly two bullet points, for example:\n- one thing\n- another thing",
        is_pair_of_bullets,
    ),
    "JSON": Rule('Reply with a short JSON object only, like {"answer": "..."}', is_json_answer),
    "title": Rule("Answer with a title in double angular brackets, like <<Title>>.", has_title),
    "question": Rule(
        "Answer with a question that ends with a question mark.", lambda text: text.endswith("?")
    ),
}


def judge(rule: str, prompt: str, response: str) -> float:
    """Return 1 if the response follows the rule and is not part of the prompt; else 0."""
    text = response.strip()
    return float(text.lower() not in prompt.lower() and RULES[rule].follows(text))
