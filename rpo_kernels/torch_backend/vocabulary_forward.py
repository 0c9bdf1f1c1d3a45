"""The vocabulary pass forward in PyTorch, for CPUs; see `kernels.vocabulary_forward`."""

from __future__ import annotations

import math

import torch

from ..inputs import LogitTransform
from .rows import FLOOR, as_blocks, block_count, for_each_chunk, rows_of, transformed


def vocabulary_forward(
    logits: torch.Tensor, labels: torch.Tensor, transform: LogitTransform, entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return log p(label), logsumexp and entropy; see `kernels.vocabulary_forward`."""
    N, device = labels.numel(), logits.device
    logps = torch.zeros(N, dtype=torch.float32, device=device)
    lse = torch.zeros((2, N), dtype=torch.float32, device=device)
    entropies = torch.zeros_like(logps) if entropy else None

    rows = (labels != transform.ignore_index).nonzero()[:, 0]
    z_label, _, others, h_others = _read(logits, labels, rows, transform, entropy, torch.nan)
    logps[rows], lse[:, rows], h = row_results(others, z_label, h_others)
    if entropies is not None and h is not None:
        entropies[rows] = h
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

    rows = (labels != transform.ignore_index).nonzero()[:, 0]
    z_label, peak, others, h = _read(logits, labels, rows, transform, entropy, -torch.inf)
    statistics[0, rows], statistics[1, rows] = z_label, peak
    statistics[2, rows] = torch.where(peak == -torch.inf, 0, (others - peak).exp()).float()
    if h is not None:
        statistics[3, rows] = h.float()
    return statistics


def _read(
    logits: torch.Tensor,
    labels: torch.Tensor,
    rows: torch.Tensor,
    transform: LogitTransform,
    entropy: bool,
    elsewhere: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the label's z and maximum, logsumexp and entropy of the other columns, of some rows.

    z is `elsewhere` for label -1.
    """
    V = logits.shape[2]
    label = labels[rows]
    inside = (label >= 0) & (label < V)
    column = torch.where(inside, label, 0)[:, None].long()
    z_label = torch.empty(column.shape, dtype=torch.float32, device=logits.device)
    top = z_label.new_empty(len(rows), block_count(V))  # maximum of each block, and log p of it
    top_logp = torch.empty_like(top)
    h_blocks = torch.empty_like(top, dtype=torch.float64) if entropy else None

    def work(some: slice, scratch: torch.Tensor) -> None:
        z = transformed(rows_of(logits, rows[some]), scratch[0], transform)
        torch.gather(z, 1, column[some], out=z_label[some])
        # log p = -softplus(lse of the others - z_label): which keeps digits when p is close to 1
        masked = torch.where(inside[some, None], -torch.inf, z_label[some])
        blocks = as_blocks(z.scatter_(1, column[some], masked))
        torch.amax(blocks, 2, out=top[some])
        torch.amax(torch.log_softmax(blocks, 2, out=blocks), 2, out=top_logp[some])
        if h_blocks is not None:
            p = torch.softmax(blocks, 2, out=as_blocks(scratch[1]))
            p.mul_(blocks.clamp_(min=FLOOR))
            torch.sum(p, 2, dtype=torch.float64, out=h_blocks[some])

    for_each_chunk(work, len(rows), V, logits.device, 2 if entropy else 1)
    z_label = z_label[:, 0].masked_fill_(~inside, torch.nan).masked_fill_(label == -1, elsewhere)
    block_lse = torch.where(top == -torch.inf, -torch.inf, top.double() - top_logp)
    others = torch.logsumexp(block_lse, 1)
    h_others = None if h_blocks is None else entropy_of_parts(-h_blocks, block_lse, others)
    return z_label, top.amax(1), others, h_others


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
