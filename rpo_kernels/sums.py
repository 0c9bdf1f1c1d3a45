"""Weighted sums of objectives, which the loss functions take in place of a single one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeAlias

from .objectives import RPOObjective, check_number


@dataclass(frozen=True)
class ObjectiveSum:
    """A weighted sum of objectives, sum_p w_p L_p."""

    weights: tuple[float, ...]
    parts: tuple[RPOObjective, ...]

    @staticmethod
    def of(weighted: Sequence[tuple[float, RPOObjective]]) -> ObjectiveSum:
        for weight, part in weighted:
            check_number("weight", weight, low=0.0, strict=True)
            if not isinstance(part, RPOObjective):
                raise TypeError(f"the parts must be RPOObjectives, got {part!r}")
        kinds = sorted({part.reference for _, part in weighted} - {"none"})
        if len(kinds) > 1:
            raise ValueError(
                f"the parts must take the same kind of reference, got {kinds[0]!r} and {kinds[1]!r}"
            )
        return ObjectiveSum(*(tuple(x) for x in zip(*weighted)))

    @property
    def spec(self) -> str:
        """The specs of the parts with their weights, separated by tabs."""
        return "\t".join([f"{w!r} {part.spec}" for w, part in zip(self.weights, self.parts)])

    @property
    def uses_rewards(self) -> bool:
        return any(part.uses_rewards for part in self.parts)

    @property
    def needs_lengths(self) -> bool:
        return any(part.needs_lengths for part in self.parts)

    @property
    def reference(self) -> str:
        """The kind of reference of the parts that have one."""
        return next((x.reference for x in self.parts if x.reference != "none"), "none")


# what the loss functions minimise, and what callers may pass for it
Objective: TypeAlias = RPOObjective | ObjectiveSum
AnyObjective: TypeAlias = RPOObjective | ObjectiveSum | Sequence[tuple[float, RPOObjective]]


def as_plain(objective: Objective) -> tuple[tuple[float, ...], str]:
    """Return the weights of a sum (none of a single objective), and the specs of its parts."""
    if isinstance(objective, RPOObjective):
        return (), objective.spec
    return objective.weights, "\t".join(part.spec for part in objective.parts)


def from_plain(weights: Sequence[float], specs: str) -> Objective:
    """Return the objective that `as_plain` took apart."""
    parts = [RPOObjective.from_spec(spec) for spec in specs.split("\t")]
    return ObjectiveSum(tuple(weights), tuple(parts)) if weights else parts[0]


@lru_cache(maxsize=256)
def weighted_parts(objective: ObjectiveSum) -> tuple[RPOObjective, ...]:
    """Return the parts of a sum, each with its weight in its own factors."""
    return tuple(
        replace(x, scale=x.scale * weight, sft_weight=x.sft_weight * weight)
        for weight, x in zip(objective.weights, objective.parts)
    )


def names_of(parts: Sequence[RPOObjective]) -> list[str]:
    """Return a name for each part; the second one of a name gets the suffix _2."""
    names: list[str] = []
    for part in parts:
        name = own = part.name or part.distance
        number = 1
        while name in names:
            number += 1
            name = f"{own}_{number}"
        names.append(name)
    return names
