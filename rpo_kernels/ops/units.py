"""Which groups are worked off together."""

from __future__ import annotations

import itertools
from typing import NamedTuple


class Unit(NamedTuple):
    """Neighbouring groups whose tokens are worked off together."""

    groups: slice
    sequences: slice
    tokens: slice

    @property
    def size(self) -> int:
        return self.tokens.stop - self.tokens.start


def pack_groups(counts: list[int], bounds: list[int], rows: int, most: list[int] | None = None) -> list[Unit]:
    """Whole groups in units of at most ``rows`` tokens; a larger group is a unit of its own.

    ``counts`` are the scored tokens of each sequence, ``bounds`` ``[G+1]`` the groups' boundaries among the sequences. Ranks that
    share sequences make the same units from ``most``, the most tokens of each that one of them has.
    """
    token, packed = [0, *itertools.accumulate(counts)], [0, *itertools.accumulate(most or counts)]
    starts, held = [0], 0
    for g, (a, b) in enumerate(itertools.pairwise(bounds)):
        size = packed[b] - packed[a]
        if held and size and held + size > rows:  # groups without tokens never make a unit
            starts.append(g)
            held = 0
        held += size
    units = []
    for first, last in itertools.pairwise([*starts, len(bounds) - 1]):
        a, b = bounds[first], bounds[last]
        units.append(Unit(slice(first, last), slice(a, b), slice(token[a], token[b])))
    return units
