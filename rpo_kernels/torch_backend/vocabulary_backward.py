"""The vocabulary pass backward in PyTorch, for CPUs; see `kernels.vocabulary_backward`."""

from __future__ import annotations

import math

import torch

from ..inputs import LogitTransform
from .rows import (
    FLOOR,
    as_blocks,
    for_each_chunk,
    log_softmax_blocks,
    rows_of,
    transformed,
    view_of,
)


def vocabulary_backward(
    logits: torch.Tensor,
    labels: torch.Tensor,
    logps: torch.Tensor,
    lse: torch.Tensor,
    coef: torch.Tensor,
    transform: LogitTransform,
    out: torch.Tensor,
    *,
    entropies: torch.Tensor | None = None,
    entropy_coef: torch.Tensor | None = None,
    upstream: torch.Tensor | None = None,
) -> None:
    """Write dL/dlogits to `out` `[outer, inner, V]`, given coef = dL/dlogp `[N]`.

    `out` may be `logits`. `upstream` `[]` multiplies the coefficients.
    """
    if not logits.shape[2]:
        return
    if upstream is not None:
        coef = coef * upstream
    alive = (labels != transform.ignore_index) & (coef != 0)
    if entropy_coef is not None:
        alive |= (labels != transform.ignore_index) & (entropy_coef != 0)
    inner, V = logits.shape[1:]
    dead = (~alive).nonzero()[:, 0]
    if dead.numel() == alive.numel():
        out.zero_()
    else:
        out[dead // inner, dead % inner] = 0
    temperature, logit_scale, softcap, _ = transform
    chain = logit_scale / temperature

    def work(rows: torch.Tensor, scratch: torch.Tensor) -> None:
        z = transformed(rows_of(logits, rows), scratch[0], transform)
        slope = (1 - (z * (temperature / softcap)) ** 2).mul_(chain) if softcap > 0 else None
        label = labels[rows][:, None]
        column = label.clamp(0, V - 1).long()
        c, logp = coef[rows][:, None], logps[rows][:, None]
        factor = c if slope is not None else c * chain
        total = (lse[0, rows, None].double() + lse[1, rows, None]) * math.log(2)
        at_label = -factor * torch.expm1(logp)
        if entropies is None or entropy_coef is None:
            blocks, block_lse = log_softmax_blocks(z, exponentiate=True)
            blocks.mul_((-factor * (block_lse - total).exp()).float()[..., None])
        else:
            h, hc = (
                entropies[rows][:, None],
                entropy_coef[rows][:, None] * (1 if slope is not None else chain),
            )
            blocks, block_lse = log_softmax_blocks(z)
            p = torch.softmax(blocks, 2, out=as_blocks(scratch[1]))
            offset = block_lse - total
            blocks.clamp_(min=FLOOR).add_((offset + h).float()[..., None]).mul_(hc[..., None]).add_(
                factor[..., None]
            )
            blocks.mul_(p.mul_(-offset.exp().float()[..., None]))
            at_label -= hc * logp.exp() * (logp.clamp(min=FLOOR) + h)
        if (dead_blocks := block_lse == -torch.inf).any():
            blocks.masked_fill_(dead_blocks[..., None], 0)
        # label -1: on another shard
        z.scatter_(1, column, torch.where(label == -1, z.gather(1, column), at_label))
        if (nothing := ~(total > -torch.inf)).any():
            z.masked_fill_(nothing, torch.nan)
        if slope is not None:
            z.mul_(slope)
        if (target := view_of(out, rows)) is not None:
            target.copy_(z)
        else:
            out[rows // inner, rows % inner] = z.to(out.dtype)

    for_each_chunk(work, alive, V, 1 if entropy_coef is None else 2)
