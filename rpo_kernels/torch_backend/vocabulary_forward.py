"""The vocabulary pass forward in PyTorch, for CPUs; see `kernels.vocabulary_forward`."""

from __future__ import annotations

import math

import torch

from ..inputs import LogitTransform
from .rows import FLOOR, as_blocks, for_each_chunk, log_softmax_blocks, rows_of, transformed


def vocabulary_forward(
    logits: torch.Tensor, labels: torch.Tensor, transform: LogitTransform, entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return log p(label), logsumexp and entropy; see `kernels.vocabulary_forward`."""
    N, device = labels.numel(), logits.device
    logps = torch.zeros(N, dtype=torch.float32, device=device)
    lse = torch.zeros((2, N), dtype=torch.float32, device=device)
    entropies = torch.zeros_like(logps) if entropy else None

    def work(rows: torch.Tensor, scratch: torch.Tensor) -> None:
        z_label, _, others, h_others = _read(
            rows_of(logits, rows), labels[rows], transform, scratch, torch.nan
        )
        logps[rows], lse[:, rows], h = row_results(others, z_label, h_others)
        if entropies is not None and h is not None:
            entropies[rows] = h

    for_each_chunk(work, labels != transform.ignore_index, logits.shape[2], 2 if entropy else 1)
    return logps, lse, entropies


def shard_statistics(
    logits: torch.Tensor, labels: torch.Tensor, transform: LogitTransform, entropy: bool = False
) -> torch.Tensor:
    """Compute what `shards.combine` needs of one shard of the columns, fp32 `[3 or 4, N]`.

    The rows are the label's z (-inf for label -1, which is on another shard); and of the other
    columns the maximum of z, the sum of exp(z - maximum) and, with entropy, the entropy. Labels are
    relative to the shard's first column.
    """
    statistics = torch.zeros(
        (4 if entropy else 3, labels.numel()), dtype=torch.float32, device=logits.device
    )
    if not logits.shape[2]:
        statistics[:2] = -torch.inf
        statistics[0].masked_fill_((labels != -1) & (labels != transform.ignore_index), torch.nan)
        return statistics

    def work(rows: torch.Tensor, scratch: torch.Tensor) -> None:
        z_label, peak, others, h = _read(
            rows_of(logits, rows), labels[rows], transform, scratch, -torch.inf
        )
        statistics[0, rows], statistics[1, rows] = z_label, peak
        statistics[2, rows] = torch.where(peak == -torch.inf, 0, (others - peak).exp()).float()
        if h is not None:
            statistics[3, rows] = h.float()

    for_each_chunk(work, labels != transform.ignore_index, logits.shape[2], 2 if entropy else 1)
    return statistics


def _read(
    chunk: torch.Tensor,
    label: torch.Tensor,
    transform: LogitTransform,
    scratch: torch.Tensor,
    elsewhere: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the label's z and maximum, logsumexp and entropy of the other columns, of `[rows, V]`.

    z is `elsewhere` for label -1; the entropy is None unless scratch has two buffers.
    """
    V = chunk.shape[1]
    z = transformed(chunk, scratch[0], transform)
    inside = (label >= 0) & (label < V)
    column = torch.where(inside, label, 0)[:, None].long()
    z_label = z.gather(1, column)
    # log p = -softplus(lse of the others - z_label): which keeps digits when p is close to 1
    z.scatter_(1, column, torch.where(inside[:, None], -torch.inf, z_label))
    z_label = z_label[:, 0]
    z_label = torch.where(
        inside,
        z_label,
        torch.full_like(z_label, torch.nan).masked_fill_(label == -1, elsewhere),
    )
    blocks, block_lse = log_softmax_blocks(z)
    others = torch.logsumexp(block_lse, 1)
    h_others = None
    if len(scratch) == 2:
        p = torch.softmax(blocks, 2, out=as_blocks(scratch[1]))
        h_others = entropy_of_parts(
            -p.mul_(blocks.clamp_(min=FLOOR)).sum(2, dtype=torch.float64), block_lse, others
        )
    return z_label, block_lse.amax(1).float(), others, h_others


def row_results(
    others: torch.Tensor, z_label: torch.Tensor, h_others: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return (log p, lse, entropy) of rows from the label's z and the other columns' statistics.

    lse `[2, rows]` is log2 of the sum of e^z as integer and fraction, so that large logits cost the
    backward no digits.
    """
    odds = torch.where(z_label == torch.inf, torch.nan, others - z_label)
    logp = -_softplus(odds)
    log2 = torch.logaddexp(others, z_label.double()) / math.log(2)
    whole = log2.round().float()
    lse = torch.stack([whole, torch.where(log2.isinf(), 0, log2 - whole).float()])
    if h_others is None:
        return logp.float(), lse, None
    h_label = torch.where(logp == -torch.inf, 0, -logp.exp() * logp)
    p_not = -torch.expm1(logp)
    entropy = h_label + torch.where(p_not == 0, 0, p_not * (h_others + _softplus(-odds)))
    return logp.float(), lse, entropy.float()


def entropy_of_parts(h: torch.Tensor, lse: torch.Tensor, lse_of_all: torch.Tensor) -> torch.Tensor:
    """Combine entropies and logsumexps `[N, parts]` of parts of the columns to `[N]`."""
    share = (lse - lse_of_all[:, None]).exp()
    return torch.where(share == 0, 0, share * (h - lse + lse_of_all[:, None])).sum(1)


def _softplus(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, x, torch.where(x.isnan(), x, 0)) + torch.log1p(torch.exp(-x.abs()))
