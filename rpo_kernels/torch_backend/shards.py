"""Combination of statistics in PyTorch; same signature and results as `kernels.shards`."""

from __future__ import annotations

import torch

from ..inputs import LogitTransform
from .vocabulary_forward import entropy_of_parts, row_results


def combine(
    statistics: torch.Tensor, labels: torch.Tensor, transform: LogitTransform, entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return what `vocabulary_forward` returns for whole rows, given the statistics of R shards.

    statistics are `[R, 3 or 4, N]`, from `shard_statistics`.
    """
    z, peak, total = (x.t() for x in statistics[:, :3].unbind(1))  # [N, R]
    lse = peak.double() + total.double().log()
    others = torch.logsumexp(lse, 1)
    owners = (z != -torch.inf).sum(1)  # a label outside the vocabulary is NaN on every shard
    z_label = torch.where(owners > 1, torch.nan, torch.where(z == -torch.inf, 0, z).sum(1))
    z_label = torch.where(owners == 0, -torch.inf, z_label)
    h_others = entropy_of_parts(statistics[:, 3].t().double(), lse, others) if entropy else None
    scored = labels != transform.ignore_index
    where_scored = lambda x: torch.where(scored, x, 0)
    logps, lse, entropies = row_results(others, z_label, h_others)
    entropies = None if entropies is None else where_scored(entropies)
    return where_scored(logps), where_scored(lse), entropies
