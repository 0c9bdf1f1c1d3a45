"""The prompts of the demo: a question, then an instruction that code can check.

Training and held-out prompts share kinds of instructions, so that following them can be learnt, but
no question.
"""

from __future__ import annotations

from typing import NamedTuple

from demo.judge import RULES

TRAINING_QUESTIONS = """
    Why is the sky blue? | What is a volcano? | How do bees make honey? | What does a dentist do? | Why do cats purr?
    What is a rainbow? | How does a clock work? | What is bread made of? | Why do leaves fall? | What is a library for?
    How do fish breathe? | What is chess? | Why do we sleep? | What is a glacier? | How is paper made? | What is jazz?
    Why do we need salt? | What does a farmer do? | What is a comet? | How do plants drink? | What is a bridge for?
    Why do dogs bark? | What is a desert? | How does soap work? | What does a judge do? | What is an engine?
    Why does ice float? | What is a poem? | How do trees grow? | What is glass made of? | Why do people travel?
"""

HELD_OUT_QUESTIONS = """
    What is the moon? | Why is the sea salty? | How do birds fly? | What does a nurse do? | What is an island?
    What is cheese made of? | Why do we laugh? | How does a candle burn? | What is a museum for? | Why do we dream?
"""


class Task(NamedTuple):
    """A prompt, and the rule that judges its responses."""

    rule: str
    prompt: str


def tasks(questions: str) -> list[Task]:
    """Combine every question with every rule; a few consecutive tasks differ in both."""
    asked = [
        question.strip() for line in questions.strip().splitlines() for question in line.split("|")
    ]
    return [
        task(asked[(i + j) % len(asked)], rule)
        for i in range(len(asked))
        for j, rule in enumerate(RULES)
    ]


def task(question: str, rule: str) -> Task:
    """An instruction in capitals has its question in capitals."""
    instruction = RULES[rule].instruction
    return Task(rule, f"{question.upper() if instruction.isupper() else question} {instruction}")
