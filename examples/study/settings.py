"""What the study varies: one thing at a time around a base, and one crossed grid."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import NamedTuple

from rpo_kernels import RPOObjective
from rpo_kernels.objectives import COMPARISONS, DISTANCES

STEP = 64  # responses per step
WORDS = (  # in names of settings
    ("^(objective|comparison) ", ""),
    ("^reference ", "two references, "),
    ("^rounds 0", "online"),
    (r"^rounds (\d+)", r"\1 rounds"),
    ("^refresh True", "reference refreshed"),
)


@dataclass(frozen=True)
class Setting:
    """One training run, without its seed."""

    objective: str = "backward_kl"  # a distance, or the name of a preset
    strength: float = 4.0  # eta / beta, 1 / beta of presets; the optimum is pi_ref exp(strength r)
    eta: float = 1.0  # at equal strength; distances only, like the next three
    comparison: str = "listwise"
    target: str | float = "rewards"  # or a number: the gap between the best response and the others
    reference: str = "single"  # or "geometric", "harmonic": with the policy of a better author
    sft_weight: float = 0.0
    K: int = 4  # responses per group
    per_prompt: int = 0  # responses sampled to a prompt at a time, a multiple of K; 0: K
    budget: int = 0  # responses sampled in a round and reused; 0: as many as its steps need
    rounds: int = 1  # of sampling from the current policy. 1: offline; 0: online, before each step
    refresh: bool = False  # each round makes the policy its reference
    noise: float = 0.0  # standard deviation of the judge's errors, in points
    judged_pairs: int = 0  # for a reward model, which then is the judge
    steps: int = 160
    lr: float = 3e-3

    def rpo(self) -> RPOObjective:
        """The objective."""
        beta = self.eta / self.strength
        if self.objective in DISTANCES:
            options = {"target": self.target, "reference": self.reference}
            objective = RPOObjective(self.objective, beta, self.eta, self.comparison, **options)
        else:
            parameter = self.strength if self.objective == "rebel" else beta  # REBEL's is 1 / beta
            objective = getattr(RPOObjective, self.objective)(parameter)
        return replace(objective, sft_weight=self.sft_weight) if self.sft_weight else objective

    def __str__(self) -> str:
        """Name what differs from the base."""
        values = {x.name: getattr(self, x.name) for x in fields(self)}
        changes = [(x.name, values[x.name]) for x in fields(self) if values[x.name] != x.default]
        texts = [f"{name.replace('_', ' ')} {value}" for name, value in changes]
        for old, new in WORDS:
            texts = [re.sub(old, new, text) for text in texts]
        return ", ".join(texts) or "base"


BASE = Setting()


class Axis(NamedTuple):
    question: str
    settings: Sequence[Setting]
    more: Sequence[Setting] = ()  # only with --full


def vary(start: Setting = BASE, **values) -> list[Setting]:
    """Return all combinations of the values of these fields."""
    return [
        replace(start, **dict(zip(values, combination)))
        for combination in product(*values.values())
    ]


PAIRS = replace(BASE, K=2)
SWEEP = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 24.0)
OTHERS = ("squared", "forward_kl")
ORDERED = (
    "dpo",
    "robust_dpo",
    "ipo",
    "exo",
    "sppo",
    "bco",
    "cpo",
)  # published for pairs and their order
TWINS = (
    "infonca",
    "rloo",
    "gvpo",
)  # each is a distance in gradient, except for a factor; so are the next two, of pairs
PAIR_TWINS = ("distill_dpo", "rebel")

AXES = {
    "strength": Axis(
        "How far from the reference?",
        vary(strength=SWEEP),
        vary(objective=OTHERS, strength=SWEEP),
    ),
    "objective": Axis(
        "Which objective?",
        vary(objective=(*OTHERS, "nca", "softmax_dpo"))
        + vary(PAIRS, objective=("backward_kl", *ORDERED))
        + vary(PAIRS, objective=("simpo",), strength=(0.5, 4.0)),
        vary(objective=("nca", "softmax_dpo", *TWINS), strength=(1.0, 2.0, 4.0, 8.0))
        + vary(PAIRS, objective=(*OTHERS, *ORDERED, *PAIR_TWINS), strength=(1.0, 2.0, 4.0, 8.0))
        + vary(PAIRS, objective=("simpo",), strength=(1.0, 2.0, 8.0)),
    ),
    "comparison": Axis(
        "Lists, pairs or points? (crossed with the distance)",
        vary(objective=DISTANCES, comparison=COMPARISONS),
        vary(objective=DISTANCES, comparison=COMPARISONS, K=(2, 8, 16), rounds=(1, 0)),
    ),
    "responses": Axis(
        "How many responses? (as many samples in all, so for fewer prompts)",
        vary(K=(2, 4, 8, 16)),
        vary(objective=OTHERS, K=(2, 4, 8, 16)),
    ),
    "grouping": Axis(
        "How large a group? (of the same samples, 16 to a prompt)",
        vary(per_prompt=(16,), K=(2, 4, 8, 16)),
        vary(objective=OTHERS, per_prompt=(16,), K=(2, 4, 8, 16)),
    ),
    "rewards": Axis(
        "Explicit rewards or the order alone?",
        vary(objective=("backward_kl", "squared"), target=("rewards", 0.8))
        + vary(objective=("backward_kl", "softmax_dpo"), noise=(0.0, 1.0)),
        vary(objective=("backward_kl", "squared"), target=(0.4, 1.6))
        + vary(objective=("softmax_dpo",), strength=(1.0, 2.0, 8.0), noise=(0.0, 1.0)),
    ),
    "scale": Axis(
        "Does the scale matter at equal eta / beta?",
        vary(objective=DISTANCES, eta=(0.1, 1.0, 10.0)),
        vary(objective=DISTANCES, eta=(0.01, 3.0)),
    ),
    "rounds": Axis(
        "Offline, iterated or online?",
        vary(rounds=(1, 4, 16, 0))
        + vary(rounds=(4,), refresh=(True,), strength=(1.0, 4.0))
        + vary(objective=("rloo",), rounds=(0,))
        + vary(PAIRS, objective=("dpo",), rounds=(1, 0)),
        vary(objective=OTHERS, rounds=(4, 16, 0))
        + vary(PAIRS, objective=("dpo",), rounds=(4,))
        + vary(rounds=(0,), strength=(2.0, 8.0, 16.0)),
    ),
    "references": Axis(
        "One reference or two?",
        vary(reference=("single", "geometric", "harmonic")),
        vary(reference=("geometric", "harmonic"), strength=(2.0, 8.0)),
    ),
    "sft": Axis(
        "A term that imitates the best response?",
        vary(sft_weight=(0.0, 0.01, 0.1, 1.0)),
        vary(PAIRS, objective=("dpo",), sft_weight=(0.01, 0.1, 1.0)),
    ),
    "judge": Axis(
        "What do errors of the judge cost?",
        vary(noise=(0.0, 0.5, 1.0, 2.0)) + vary(judged_pairs=(100, 400, 1600)),
        vary(objective=OTHERS, noise=(0.5, 1.0, 2.0)) + vary(K=(16,), noise=(1.0, 2.0)),
    ),
    "budget": Axis(
        "How many samples?",
        vary(budget=(640, 2560, 0)),
        vary(objective=OTHERS, budget=(640, 2560)) + vary(K=(2, 16), budget=(640, 2560)),
    ),
    "training": Axis(
        "Does the optimizer decide?",
        vary(lr=(1e-3, 3e-3, 1e-2)) + vary(objective=("squared", "backward_kl"), steps=(640,)),
        vary(objective=("forward_kl", "hellinger"), steps=(640,))
        + vary(objective=DISTANCES, steps=(2560,), rounds=(0,))
        + vary(objective=OTHERS, lr=(1e-3, 1e-2))
        + vary(PAIRS, objective=("dpo",), lr=(1e-3, 1e-2)),
    ),
}


def settings(axes: list[str], full: bool) -> list[Setting]:
    """Return each setting of these axes once, and the base's sweep, for rewards at equal KL."""
    chosen = list(AXES["strength"].settings)
    for name in axes:
        chosen += [*AXES[name].settings, *(AXES[name].more if full else ())]
    return list(dict.fromkeys(chosen))
