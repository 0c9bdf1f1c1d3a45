"""The vocabulary pass in PyTorch: the engine for CPUs, same signatures and results as ``kernels.vocabulary``.

Rows are worked off in chunks that stay in the cache: one chunk of fp32 logits is all that exists beside input and gradient.
The work is PyTorch's own fused (log_)softmax, several times as fast as its exp, sub and sum one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

_FLOOR = -1e4  # of log-probabilities where 0 log 0 is to be 0
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
    scratch = _scratch(logits, 2 if entropy else 1)
    for rows, chunk in _chunks(logits, labels != ignore_index):
        z, scale = _transform(chunk, scratch[0, : len(rows)], temperature, logit_scale, softcap)
        label = labels[rows]
        inside = (label >= 0) & (label < V)
        label = torch.where(inside, label, 0)[:, None].long()
        lse[0, rows] = z.gather(1, label)[:, 0] / scale
        log_p = torch.log_softmax(z, 1, out=scratch[0, : len(rows)])
        logp = torch.where(inside, log_p.gather(1, label)[:, 0], torch.nan)
        confident = (logp > -0.1).nonzero()[:, 0]
        if len(confident):
            logp[confident] = _from_the_others(log_p[confident], label[confident])
        logps[rows] = logp
        lse[1, rows] = -logp
        if entropy:
            log_p.scatter_(1, label, logp[:, None]).clamp_(min=_FLOOR)
            p = torch.softmax(log_p, 1, out=scratch[1, : len(rows)])
            entropies[rows] = -p.mul_(log_p).sum(1)
    return logps, lse, entropies


def _from_the_others(log_p: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """log p = log(1 - sum of the others), which keeps the digits of a p near 1; overwrites log_p."""
    log_p.scatter_(1, label, -torch.inf)
    top = log_p.amax(1)
    log_others = torch.where(top == -torch.inf, top, top - torch.log_softmax(log_p, 1, out=log_p).amax(1))
    return torch.log1p(-log_others.exp())


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
    scratch = _scratch(logits, 1 if entropy_coef is None else 2)
    for rows, chunk in _chunks(logits, alive):
        target = _view(out, rows)
        direct = target is not None and out.dtype == torch.float32
        buffer = target if direct else scratch[0, : len(rows)]
        z, scale = _transform(chunk, buffer, temperature, logit_scale, softcap)
        chain = logit_scale / temperature
        slope = (1 - (z / scale) ** 2).mul_(chain) if softcap > 0 else None  # of z = scale tanh(...)
        label = labels[rows].clamp(0, logits.shape[2] - 1)[:, None].long()
        c, logp = coef[rows][:, None], logps[rows][:, None]
        at_label = -c * torch.expm1(logp)
        if entropy_coef is None:
            z = torch.softmax(z, 1, out=buffer).mul_(-c if slope is not None else -c * chain)
        else:
            h, hc = entropies[rows][:, None], entropy_coef[rows][:, None]
            z = torch.log_softmax(z, 1, out=buffer).clamp_(min=_FLOOR)
            p = torch.softmax(z, 1, out=scratch[1, : len(rows)])
            z.add_(h).mul_(hc).add_(c).mul_(p).mul_(-1 if slope is not None else -chain)
            p = logp.exp()
            at_label -= hc * p * (logp.clamp(min=_FLOOR) + h)
        z.scatter_(1, label, at_label if slope is not None else at_label * chain)
        if slope is not None:
            z.mul_(slope)
        if target is None:
            out[rows // inner, rows % inner] = z.to(out.dtype)
        elif not direct:
            target.copy_(z)


def _scratch(logits: torch.Tensor, buffers: int) -> torch.Tensor:
    """``[buffers, rows, V]`` fp32, rows of a chunk."""
    rows = min(_rows(logits.shape[2]), logits.shape[0] * logits.shape[1])
    return torch.empty((buffers, rows, logits.shape[2]), dtype=torch.float32, device=logits.device)


def _rows(V: int) -> int:
    return max(1, CHUNK_BYTES // (4 * V))


def _transform(
    x: torch.Tensor, buffer: torch.Tensor, temperature: float, logit_scale: float, softcap: float
) -> tuple[torch.Tensor, float]:
    """(z, scale): logits in fp32, in the buffer unless x serves as it is, and z = scale * y for the units of ``lse``."""
    scale = softcap / temperature if softcap > 0 else logit_scale / temperature
    if x.dtype == torch.float32 and softcap == 0 and scale == 1:
        return x, scale
    z = x if buffer.data_ptr() == x.data_ptr() else buffer.copy_(x)
    if softcap > 0:
        z.mul_(logit_scale / softcap).tanh_()
    return z.mul_(scale) if scale != 1 else z, scale


def _chunks(logits: torch.Tensor, alive: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Flat indices of the rows that are alive, with their logits ``[rows, V]``: a view where they are neighbours."""
    inner, V = logits.shape[1:]
    scored = alive.nonzero()[:, 0]
    for rows in scored.split(_rows(V)) if scored.numel() else ():
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
