"""The vocabulary pass backward in PyTorch, for CPUs; see `kernels.vocabulary_backward`."""

from __future__ import annotations

import math

import torch

from ..inputs import LogitTransform
from .rows import FLOOR, as_blocks, for_each_chunk, rows_of, transformed, view_of


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
    inner_chain = 1 if softcap > 0 else chain  # with a softcap, the slope has the rest of it

    rows = alive.nonzero()[:, 0]
    label, logp = labels[rows, None], logps[rows, None]
    column = label.clamp(0, V - 1).long()
    factor = coef[rows, None] * inner_chain
    total = (lse[0, rows, None].double() + lse[1, rows, None]) * math.log(2)
    at_label = -factor * torch.expm1(logp)
    if entropies is not None and entropy_coef is not None:
        h, entropy_factor = entropies[rows, None], entropy_coef[rows, None] * inner_chain
        at_label -= entropy_factor * logp.exp() * (logp.clamp(min=FLOOR) + h)
    elsewhere = label == -1  # on another shard
    nothing = ~(total > -torch.inf)
    any_elsewhere, any_nothing = bool(elsewhere.any()), bool(nothing.any())

    def work(some: slice, scratch: torch.Tensor) -> None:
        here = rows[some]
        z = transformed(rows_of(logits, here), scratch[0], transform)
        slope = (1 - (z * (temperature / softcap)) ** 2).mul_(chain) if softcap > 0 else None
        blocks = as_blocks(z)
        top = blocks.amax(2)
        if entropy_coef is None:
            share = torch.softmax(blocks, 2, out=blocks).amax(2)
            scale = (top - total[some]).exp_().div_(share).mul_(-factor[some])
            blocks.mul_(scale.float()[..., None])
        else:
            offset = top.double() - torch.log_softmax(blocks, 2, out=blocks).amax(2) - total[some]
            p = torch.softmax(blocks, 2, out=as_blocks(scratch[1]))
            blocks.clamp_(min=FLOOR).add_((offset + h[some]).float()[..., None])
            blocks.mul_(entropy_factor[some, None]).add_(factor[some, None])
            blocks.mul_(p.mul_(-offset.exp().float()[..., None]))
        if (empty := top == -torch.inf).any():
            blocks.masked_fill_(empty[..., None], 0)
        value = at_label[some]
        if any_elsewhere:
            value = torch.where(elsewhere[some], z.gather(1, column[some]), value)
        z.scatter_(1, column[some], value)
        if any_nothing:
            z.masked_fill_(nothing[some], torch.nan)
        if slope is not None:
            z.mul_(slope)
        if (target := view_of(out, here)) is not None:
            target.copy_(z)
        else:
            out[here // inner, here % inner] = z.to(out.dtype)

    for_each_chunk(work, len(rows), V, logits.device, 1 if entropy_coef is None else 2)
