"""TRL's metrics for groups of any size, as sums and counts, which can be added over processes."""

from __future__ import annotations

import torch
from torch import Tensor

from rpo_kernels import RPOOutput

from .patch import RowStatistics

Metric = tuple[Tensor, Tensor]  # sum, count


def group_metrics(
    out: RPOOutput, sizes: Tensor, ragged: bool
) -> tuple[dict[str, Metric], Tensor, Tensor]:
    """Compute metrics of groups of `sizes` `[G]`, and their chosen and rejected sequences `[G]`.

    Chosen is the response with the largest target (the first of equal ones), rejected the one with
    the smallest (the last of equal ones). Groups with fewer than two responses that have scored
    tokens do not count.
    """
    # Not RPOOutput.metrics: its means cannot be added over processes (without anything to compare
    # one is NaN), it has no chosen and rejected for groups of more than two, and TRL's logits and
    # accuracies need to know these sequences.
    G, S = len(sizes), len(out.rewards)
    K = int(sizes.max()) if ragged else S // G
    exists = torch.arange(K, device=sizes.device) < sizes[:, None]

    def table(x: Tensor) -> Tensor:  # [S] -> [G, K]
        return torch.zeros(G, K, dtype=x.dtype, device=x.device).masked_scatter(exists, x)

    present = exists if out.lengths is None else exists & (table(out.lengths) > 0)
    s, t = table(out.rewards), table(out.targets)
    best = t.masked_fill(~present, -torch.inf).argmax(1, keepdim=True)
    worst = K - 1 - t.masked_fill(~present, torch.inf).flip(1).argmin(1, keepdim=True)
    first = (sizes.cumsum(0) - sizes)[:, None]
    counted = present.sum(1) > 1
    chosen, rejected = s.gather(1, best)[:, 0], s.gather(1, worst)[:, 0]
    by_group = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "rewards/margins": chosen - rejected,
        "rewards/target_margin": (t.gather(1, best) - t.gather(1, worst))[:, 0],
        "logps/chosen": table(out.logps).gather(1, best)[:, 0],
        "logps/rejected": table(out.logps).gather(1, worst)[:, 0],
    }
    metrics = {name: _total(x, counted) for name, x in by_group.items()}
    ordered = present[:, :, None] & present[:, None] & (t[:, :, None] > t[:, None])  # [G, K, K]
    metrics["rewards/agreement"] = _total((s[:, :, None] > s[:, None]).float(), ordered)
    return metrics, (first + best)[:, 0], (first + worst)[:, 0]


def token_metrics(
    statistics: RowStatistics, lengths: Tensor, chosen: Tensor, rejected: Tensor
) -> dict[str, Metric]:
    """Means over scored tokens, of which sequences have `lengths` `[S]`: of all responses, or
    of the sequences `chosen`, `rejected` `[G]`.
    """
    none = torch.zeros(0, device=lengths.device)
    entropy, logits, leads = (
        statistics.rows(name, none).float() for name in ("entropy", "mean_logits", "is_top1")
    )

    def among(sequences: Tensor) -> Tensor:  # [G] -> [n]
        has = torch.zeros(len(lengths), dtype=torch.bool, device=lengths.device)
        return has.index_fill_(0, sequences, True).repeat_interleave(
            lengths, output_size=len(entropy)
        )

    return {
        "entropy": _total(entropy, torch.ones_like(entropy, dtype=torch.bool)),
        "logits/chosen": _total(logits, among(chosen)),
        "logits/rejected": _total(logits, among(rejected)),
        "mean_token_accuracy": _total(leads, among(chosen)),
    }


def _total(x: Tensor, mask: Tensor) -> Metric:
    return torch.where(mask, x, 0).sum(), mask.sum()
