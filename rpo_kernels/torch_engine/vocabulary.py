"""The vocabulary pass in PyTorch: the engine for CPUs, same signatures and results as ``kernels.vocabulary``.

Rows are worked off in chunks that stay in the cache: one chunk of fp32 logits is all that exists beside input and gradient.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

CHUNK_BYTES = 8 << 20  # of fp32 logits: inside the L3 cache, and few enough chunks that waking threads costs nothing


def vocabulary_forward(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log p(label) ``[N]``, logsumexp ``[2, N]`` as (peak, rest) and entropy ``[N]``, fp32, of rows ``[outer, inner, V]``."""
    V, N, device = logits.shape[2], labels.numel(), logits.device
    logps = torch.zeros(N, dtype=torch.float32, device=device)
    lse = torch.zeros((2, N), dtype=torch.float32, device=device)
    entropies = torch.zeros(N if entropy else 0, dtype=torch.float32, device=device)
    for rows, chunk in _chunks(logits, labels != ignore_index):
        y, scale = _transform(chunk.to(torch.float32, copy=True), temperature, logit_scale, softcap)
        label = labels[rows]
        inside = (label >= 0) & (label < V)
        label = torch.where(inside, label, 0)[:, None].long()
        y_label = torch.where(inside, y.gather(1, label)[:, 0], torch.nan)
        # log p = -softplus(lse of the others - z_label): digits survive when p is near 1
        y.scatter_(1, label, -torch.inf)
        top = y.amax(1, keepdim=True)
        top = torch.where(top == -torch.inf, 0, top)
        y.sub_(top)
        if scale != 1:
            y.mul_(scale)
        if entropy:
            weights = y.exp()
            total = weights.sum(1)
            moment = torch.where(weights == 0, 0, weights.mul_(y)).sum(1)
        else:
            total = y.exp_().sum(1)
        odds = (top[:, 0] - y_label) * scale + total.log()
        odds = torch.where(y_label == torch.inf, torch.nan, odds)
        logp = -_softplus(odds)
        logps[rows] = logp
        lse[0, rows] = torch.where(odds > 0, top[:, 0], y_label)
        lse[1, rows] = torch.where(odds > 0, total.log() + _softplus(-odds), -logp)
        if entropy:
            p_not = -torch.expm1(logp)
            h_others = torch.where(total == 0, 0, total.log() - moment / total)
            h_label = torch.where(logp == -torch.inf, 0, -logp.exp() * logp)
            entropies[rows] = h_label + torch.where(p_not == 0, 0, p_not * (h_others + _softplus(-odds)))
    return logps, lse, entropies


def vocabulary_backward(
    logits: torch.Tensor,
    labels: torch.Tensor,
    logps: torch.Tensor,
    lse: torch.Tensor,
    coef: torch.Tensor,
    *,
    entropies: torch.Tensor | None,
    entropy_coef: torch.Tensor | None,
    upstream: torch.Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    out: torch.Tensor,
) -> None:
    """Write dL/dlogits into ``out`` ``[outer, inner, V]`` (``logits`` itself to work in place), given dL/dlogp ``[N]``."""
    if upstream is not None:
        coef = coef * upstream
    alive = (labels != ignore_index) & (coef != 0)
    if entropy_coef is not None:
        alive |= (labels != ignore_index) & (entropy_coef != 0)
    inner = logits.shape[1]
    dead = (~alive).nonzero()[:, 0]
    if dead.numel() == alive.numel():
        out.zero_()
    else:
        out[dead // inner, dead % inner] = 0
    for rows, chunk in _chunks(logits, alive):
        target = _view(out, rows)
        direct = target is not None and out.dtype == torch.float32
        if direct and chunk.data_ptr() == target.data_ptr():
            z = chunk
        elif direct:
            z = target.copy_(chunk)
        else:
            z = chunk.to(torch.float32, copy=True)
        z, scale = _transform(z, temperature, logit_scale, softcap)
        slope = (1 - z * z).mul_(logit_scale / temperature) if softcap > 0 else None
        peak, rest = lse[:, rows, None]
        z.sub_(peak)
        if scale != 1:
            z.mul_(scale)
        label = labels[rows].clamp(0, logits.shape[2] - 1)[:, None].long()
        c, logp = coef[rows][:, None], logps[rows][:, None]
        if entropy_coef is None:
            factor = -c * torch.exp(-rest)
            z.exp_().mul_(factor if slope is not None else factor * scale)
            at_label = -c * torch.expm1(logp)
        else:
            h, hc = entropies[rows][:, None], entropy_coef[rows][:, None]
            q = z.sub_(rest).exp()
            z.add_(h).mul_(hc).add_(c).mul_(q).neg_()
            z[q == 0] = 0
            p = logp.exp()
            at_label = -c * torch.expm1(logp) - hc * torch.where(p == 0, 0, p * (logp + h))
            if slope is None and scale != 1:
                z.mul_(scale)
        z.scatter_(1, label, at_label if slope is not None else at_label * scale)
        if slope is not None:
            z.mul_(slope)
        if not direct:
            if target is not None:
                target.copy_(z)
            else:
                out[rows // inner, rows % inner] = z.to(out.dtype)


def _softplus(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, x, torch.where(x.isnan(), x, 0)) + torch.log1p(torch.exp(-x.abs()))


def _transform(x: torch.Tensor, temperature: float, logit_scale: float, softcap: float) -> tuple[torch.Tensor, float]:
    """(y, scale) with logits z = scale * y; overwrites x."""
    if softcap > 0:
        return x.mul_(logit_scale / softcap).tanh_(), softcap / temperature
    return x, logit_scale / temperature


def _chunks(logits: torch.Tensor, alive: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Flat indices of the rows that are alive, with their logits ``[rows, V]``: a view where they are neighbours."""
    inner, V = logits.shape[1:]
    scored = alive.nonzero()[:, 0]
    for rows in scored.split(max(1, CHUNK_BYTES // (4 * V))) if scored.numel() else ():
        view = _view(logits, rows)
        yield rows, logits[rows // inner, rows % inner] if view is None else view


def _view(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor | None:
    """Rows of ``[outer, inner, V]`` as a view, if they are neighbours that one stride reaches."""
    outer, inner, V = logits.shape
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 != rows.numel():
        return None
    if first // inner == last // inner:
        return logits[first // inner, first % inner : last % inner + 1]
    if inner == 1 or logits.stride(0) == inner * logits.stride(1):
        stride = logits.stride(0) if inner == 1 else logits.stride(1)
        offset = logits.storage_offset() + first * stride
        return logits.as_strided((rows.numel(), V), (stride, 1), offset)
    return None
