"""The group pass over a sum of objectives: one launch for each part."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..backend import module_of
from ..inputs import Groups, PerSequence, Sequences


class Losses(NamedTuple):
    """Losses of P parts, G groups and S sequences; fp32."""

    loss: Tensor  # []
    losses: Tensor  # [G], sums over the parts
    part_losses: Tensor  # [P, G]; [0, G] of one part
    by_sequence: Tensor  # [5 P, S]: the rows of PerSequence of each part


def group_pass(
    op: str,
    backend: str,
    logps: Tensor,
    labels: Tensor | None,
    lengths: Tensor | None,
    sequences: Sequences,
    parts: list[Groups],
    ignore_index: int,
) -> tuple[Losses, Tensor, Tensor]:
    """Return losses, lengths `[S]` int32 and dL/dlogps of tokens `[N]` (empty without labels).

    Each of `parts` has a single objective; the other arguments are those of `kernels.group_pass`.
    """
    one = module_of(op, backend, logps.device, "group_pass").group_pass
    results = [one(logps, labels, lengths, sequences, part, ignore_index) for part in parts]
    loss, losses, by_sequence, lengths, coef = results[0]
    if len(results) == 1:
        return Losses(loss, losses, losses.new_empty(0, len(losses)), by_sequence), lengths, coef
    loss, losses, by_sequence, _, coef = zip(*results)
    part_losses = torch.stack(losses)
    summed = Losses(total(loss), part_losses.sum(0), part_losses, torch.cat(by_sequence))
    return summed, lengths, total(coef)


def fake_losses(like: Tensor, groups: Groups, S: int) -> Losses:
    """Return empty tensors with the shapes of `Losses`."""
    x, G, P = like.new_empty((), dtype=torch.float32), groups.number(S), len(groups.objective.parts)
    return Losses(x, x.new_empty(G), x.new_empty(P if P > 1 else 0, G), x.new_empty(5 * P, S))


def parts_of(by_sequence: Tensor) -> list[PerSequence]:
    """Return the results per sequence of each part, from the rows `[5 P, S]` of `Losses`."""
    rows = by_sequence.unbind()
    return [PerSequence(*rows[i : i + 5]) for i in range(0, len(rows), 5)]


def total(terms: Iterable[Tensor]) -> Tensor:
    """Return the sum of tensors; a single one unchanged."""
    first, *others = terms
    return torch.stack([first, *others]).sum(0) if others else first
