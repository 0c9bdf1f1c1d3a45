"""The vocabulary pass in PyTorch: the engine for CPUs, same signatures and results as ``kernels.vocabulary``.

Rows are worked off in chunks that stay in the cache: one chunk of fp32 logits is all that exists beside input and gradient.
The work is PyTorch's own fused (log_)softmax, several times as fast as its exp, sub and sum one after the other; it sums a row
naively in fp32, so long rows go through it in blocks whose sums are put together in float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

CHUNK_BYTES = 8 << 20  # of fp32 logits: inside the L3 cache, and few enough chunks that waking threads costs nothing
_FLOOR = -1e4  # of log-probabilities where 0 log 0 is to be 0


def vocabulary_forward(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """See ``kernels.vocabulary.vocabulary_forward``; the logsumexp is a peak and the rest."""
    N, device = labels.numel(), logits.device
    logps = torch.zeros(N, dtype=torch.float32, device=device)
    lse = torch.zeros((2, N), dtype=torch.float32, device=device)
    entropies = torch.zeros_like(logps) if entropy else None
    for rows, z_label, peak, others, h_others in _read(
        logits, labels, temperature, logit_scale, softcap, ignore_index, entropy, torch.nan
    ):
        logps[rows], lse[0, rows], lse[1, rows], h = row_results(peak, others, z_label, h_others)
        if entropy:
            entropies[rows] = h
    return logps, lse, entropies


def shard_statistics(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    entropy: bool,
) -> torch.Tensor:
    """What ``shards.combine`` needs of one shard of the columns, fp32 ``[3 or 4, N]``; labels count from its first column.

    The label's z (-inf for label -1, which lies on another shard); of the other columns the maximum of z, the sum of
    exp(z - maximum), and if asked the entropy.
    """
    statistics = torch.zeros((4 if entropy else 3, labels.numel()), dtype=torch.float32, device=logits.device)
    if not logits.shape[2]:
        statistics[:2] = -torch.inf
        statistics[0].masked_fill_((labels != -1) & (labels != ignore_index), torch.nan)
        return statistics
    for rows, z_label, peak, others, h_others in _read(
        logits, labels, temperature, logit_scale, softcap, ignore_index, entropy, -torch.inf
    ):
        statistics[0, rows], statistics[1, rows] = z_label, peak
        statistics[2, rows] = torch.where(peak == -torch.inf, 0, (others - peak).exp()).float()
        if entropy:
            statistics[3, rows] = h_others.float()
    return statistics


def _read(logits, labels, temperature, logit_scale, softcap, ignore_index, entropy, elsewhere) -> Iterator[tuple]:
    """Scored rows chunk by chunk: indices, z of the label, and of the other columns maximum, logsumexp and entropy."""
    V = logits.shape[2]
    scratch = _scratch(logits, 2 if entropy else 1)
    for rows, chunk in _chunks(logits, labels != ignore_index):
        z = _transform(chunk, scratch[0, : len(rows)], temperature, logit_scale, softcap)
        label = labels[rows]
        inside = (label >= 0) & (label < V)
        column = torch.where(inside, label, 0)[:, None].long()
        z_label = z.gather(1, column)
        # log p = -softplus(lse of the others - z_label): digits survive when p is near 1
        z.scatter_(1, column, torch.where(inside[:, None], -torch.inf, z_label))
        z_label = z_label[:, 0]
        z_label = torch.where(inside, z_label, torch.full_like(z_label, torch.nan).masked_fill_(label == -1, elsewhere))
        blocks, block_lse = _log_softmax_blocks(z)
        others = torch.logsumexp(block_lse, 1)
        h_others = None
        if entropy:
            p = torch.softmax(blocks, 2, out=_blocks(scratch[1, : len(rows)]))
            h_others = entropy_of_parts(-p.mul_(blocks.clamp_(min=_FLOOR)).sum(2, dtype=torch.float64), block_lse, others)
        yield rows, z_label, block_lse.amax(1).float(), others, h_others


def row_results(
    peak: torch.Tensor, others: torch.Tensor, z_label: torch.Tensor, h_others: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(log p, peak, rest, entropy) of rows from the label's z and the other columns' maximum, logsumexp and entropy."""
    odds = torch.where(z_label == torch.inf, torch.nan, others - z_label)
    logp = -_softplus(odds)
    peak = torch.maximum(z_label, peak)
    rest = torch.logaddexp(others, z_label.double()) - peak
    if h_others is None:
        return logp.float(), peak, rest.float(), None
    h_label = torch.where(logp == -torch.inf, 0, -logp.exp() * logp)
    p_not = -torch.expm1(logp)
    entropy = h_label + torch.where(p_not == 0, 0, p_not * (h_others + _softplus(-odds)))
    return logp.float(), peak, rest.float(), entropy.float()


def entropy_of_parts(h: torch.Tensor, lse: torch.Tensor, lse_of_all: torch.Tensor) -> torch.Tensor:
    """Entropy ``[N]`` of columns in parts, from the parts' entropies and logsumexps ``[N, parts]``."""
    share = (lse - lse_of_all[:, None]).exp()
    return torch.where(share == 0, 0, share * (h - lse + lse_of_all[:, None])).sum(1)


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
    if not logits.shape[2]:
        return
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
    chain = logit_scale / temperature
    for rows, chunk in _chunks(logits, alive):
        z = _transform(chunk, scratch[0, : len(rows)], temperature, logit_scale, softcap)
        slope = (1 - (z * (temperature / softcap)) ** 2).mul_(chain) if softcap > 0 else None
        label, V = labels[rows][:, None], logits.shape[2]
        column = label.clamp(0, V - 1).long()
        c, logp = coef[rows][:, None], logps[rows][:, None]
        factor = c if slope is not None else c * chain
        total = lse[0, rows, None].double() + lse[1, rows, None]
        at_label = -factor * torch.expm1(logp)
        if entropy_coef is None:
            blocks, block_lse = _log_softmax_blocks(z, exponentiate=True)
            blocks.mul_((-factor * (block_lse - total).exp()).float()[..., None])
        else:
            h, hc = entropies[rows][:, None], entropy_coef[rows][:, None] * (1 if slope is not None else chain)
            blocks, block_lse = _log_softmax_blocks(z)
            p = torch.softmax(blocks, 2, out=_blocks(scratch[1, : len(rows)]))
            offset = block_lse - total
            blocks.clamp_(min=_FLOOR).add_((offset + h).float()[..., None]).mul_(hc[..., None]).add_(factor[..., None])
            blocks.mul_(p.mul_(-offset.exp().float()[..., None]))
            at_label -= hc * logp.exp() * (logp.clamp(min=_FLOOR) + h)
        if (dead_blocks := block_lse == -torch.inf).any():
            blocks.masked_fill_(dead_blocks[..., None], 0)
        z.scatter_(1, column, torch.where(label == -1, z.gather(1, column), at_label))  # -1: on another shard
        if (nothing := ~(total > -torch.inf)).any():
            z.masked_fill_(nothing, torch.nan)
        if slope is not None:
            z.mul_(slope)
        if (target := _view(out, rows)) is not None:
            target.copy_(z)
        else:
            out[rows // inner, rows % inner] = z.to(out.dtype)


def _log_softmax_blocks(z: torch.Tensor, exponentiate: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-softmax (or softmax) within each block of columns, in place ``[rows, blocks, columns]``, and lse ``[rows, blocks]``."""
    blocks = _blocks(z)
    top = blocks.amax(2)
    if exponentiate:
        share = torch.softmax(blocks, 2, out=blocks).amax(2).double().log()
    else:
        share = torch.log_softmax(blocks, 2, out=blocks).amax(2).double()
    return blocks, torch.where(top == -torch.inf, -torch.inf, top.double() - share)


def _blocks(z: torch.Tensor) -> torch.Tensor:
    """Rows of a scratch buffer, padding included, as ``[rows, blocks, columns]``."""
    count = _block_count(z.shape[1])
    return z.as_strided((z.shape[0], count, z.stride(0) // count), (z.stride(0), z.stride(0) // count, 1), z.storage_offset())


def _block_count(V: int) -> int:
    return max(1, V // 1024)


def _scratch(logits: torch.Tensor, buffers: int) -> torch.Tensor:
    """``[buffers, rows, V]`` fp32, rows of a chunk; the padding that makes whole blocks holds -inf."""
    V = logits.shape[2]
    rows = min(_rows(V), logits.shape[0] * logits.shape[1])
    pitch = -(-V // _block_count(V)) * _block_count(V)
    return torch.full((buffers, rows, pitch), -torch.inf, dtype=torch.float32, device=logits.device)[..., :V]


def _rows(V: int) -> int:
    return max(1, CHUNK_BYTES // (4 * V))


def _softplus(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, x, torch.where(x.isnan(), x, 0)) + torch.log1p(torch.exp(-x.abs()))


def _transform(x: torch.Tensor, buffer: torch.Tensor, temperature: float, logit_scale: float, softcap: float) -> torch.Tensor:
    """The logits z in fp32, in the buffer."""
    z = buffer.copy_(x)
    V = x.shape[1]
    z.as_strided((len(z), z.stride(0) - V), (z.stride(0), 1), z.storage_offset() + V).fill_(-torch.inf)  # padding was overwritten
    scale = softcap / temperature if softcap > 0 else logit_scale / temperature
    if softcap > 0:
        z.mul_(logit_scale / softcap).tanh_()
    return z.mul_(scale) if scale != 1 else z


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
