"""A language of instructions, small enough that all responses to a prompt can be listed.

    prompt      first a, last b, n words, rising or falling, answer:
    response    up to 4 of 5 words, then END, which a response of 4 words does without: 781 in all

A prompt requires a first word, a last word, a number of words, and a direction. The judge gives up
to 1 point for each of the four, in parts: a ground truth on a real-valued scale.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

WORDS, LONGEST = 5, 4  # words are the tokens 0..4
END, TOKENS = WORDS, WORDS + 1  # what a policy generates: words and END
SIZES, DIRECTIONS = (2, 3, 4), (1, -1)
FIRST, LAST = TOKENS, TOKENS + WORDS  # marks that only occur in prompts
SIZE, DIRECTION = LAST + WORDS, LAST + WORDS + len(SIZES)
ANSWER = DIRECTION + len(DIRECTIONS)
VOCABULARY = ANSWER + 1
IGNORE = -100


class Prompt(NamedTuple):
    first: int
    last: int
    size: int
    direction: int


PROMPTS = [
    Prompt(*wishes) for wishes in itertools.product(range(WORDS), range(WORDS), SIZES, DIRECTIONS)
]
RESPONSES = [
    words for size in range(LONGEST + 1) for words in itertools.product(range(WORDS), repeat=size)
]


def judge(prompt: Prompt, words: tuple[int, ...]) -> float:
    """Return points between 0 and 4."""
    points = 1 - abs(prompt.size - len(words)) / LONGEST
    if words:
        points += 1 - abs(prompt.first - words[0]) / (WORDS - 1)
        points += 1 - abs(prompt.last - words[-1]) / (WORDS - 1)
    steps = [(b - a) * prompt.direction > 0 for a, b in itertools.pairwise(words)]
    return points + sum(steps) / max(len(steps), 1)


def prompt_tokens() -> Tensor:
    """`[prompts, 5]` int64."""
    sizes, directions = SIZES.index, DIRECTIONS.index
    marks = lambda p: (FIRST + p.first, LAST + p.last, SIZE + sizes(p.size))
    return torch.tensor([(*marks(p), DIRECTION + directions(p.direction), ANSWER) for p in PROMPTS])


def response_labels() -> Tensor:
    """`[responses, 4]` int64: words, then END, then IGNORE."""
    rows = [(*words, END)[:LONGEST] for words in RESPONSES]
    return torch.tensor([row + (IGNORE,) * (LONGEST - len(row)) for row in rows])


def judged() -> Tensor:
    """`[prompts, responses]`: the judge's points of all responses."""
    return torch.tensor([[judge(prompt, words) for words in RESPONSES] for prompt in PROMPTS])


def response_index(labels: Tensor) -> Tensor:
    """Return the position in RESPONSES of labels `[S, 4]`."""
    is_word = (labels >= 0) & (labels < END)
    size, base = is_word.sum(1), torch.where(is_word, labels, 0)
    number = torch.zeros_like(size)
    for t in range(LONGEST):
        number = torch.where(is_word[:, t], number * WORDS + base[:, t], number)
    shorter = (WORDS**size - 1) // (WORDS - 1)  # number of responses with fewer words
    return shorter + number


def demonstrations(number: int, heed: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return prompts `[n]` and labels `[n, 4]` of an author.

    With probability `heed` each, the author follows a first word, a last word and a size, but never
    a direction.
    """
    prompt = torch.randint(len(PROMPTS), (number,), generator=generator)
    wishes = torch.tensor(PROMPTS)[prompt]
    heeds = torch.rand((3, number), generator=generator) < heed
    size = torch.where(
        heeds[0], wishes[:, 2], torch.randint(1, LONGEST + 1, (number,), generator=generator)
    )
    words = torch.randint(WORDS, (number, LONGEST), generator=generator)
    words[:, 0] = torch.where(heeds[1], wishes[:, 0], words[:, 0])
    end = (size - 1)[:, None]
    last = torch.where(heeds[2], wishes[:, 1], words.gather(1, end)[:, 0])
    words.scatter_(1, end, last[:, None])
    at = torch.arange(LONGEST)
    labels = torch.where(at < size[:, None], words, torch.where(at == size[:, None], END, IGNORE))
    return prompt, labels
