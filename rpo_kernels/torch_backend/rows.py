"""Rows of logits in PyTorch, a chunk at a time: shared by the vocabulary passes.

A chunk of fp32 logits stays in the cache and is all that exists besides input and gradient. It goes
through PyTorch's fused (log_)softmax, which is several times faster than exp, sub and sum in
sequence. That sums a row naively in fp32, so long rows are split into blocks, whose sums are
combined in float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..inputs import LogitTransform

# bytes of fp32 logits: they fit the L3 cache, and chunks are few enough that waking threads is
# cheap
CHUNK_BYTES = 8 << 20
FLOOR = -1e4  # of log-probabilities, so that 0 log 0 is 0


def log_softmax_blocks(
    z: torch.Tensor, exponentiate: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log-softmax (or softmax) in place within each block of columns.

    Returns it as `[rows, blocks, columns]`, and the logsumexps `[rows, blocks]`.
    """
    blocks = as_blocks(z)
    top = blocks.amax(2)
    if exponentiate:
        share = torch.softmax(blocks, 2, out=blocks).amax(2).double().log()
    else:
        share = torch.log_softmax(blocks, 2, out=blocks).amax(2).double()
    return blocks, torch.where(top == -torch.inf, -torch.inf, top.double() - share)


def as_blocks(z: torch.Tensor) -> torch.Tensor:
    """View rows of a scratch buffer, with padding, as `[rows, blocks, columns]`."""
    count = _block_count(z.shape[1])
    return z.as_strided(
        (z.shape[0], count, z.stride(0) // count),
        (z.stride(0), z.stride(0) // count, 1),
        z.storage_offset(),
    )


def _block_count(V: int) -> int:
    return max(1, V // 1024)


def scratch_for(logits: torch.Tensor, buffers: int) -> torch.Tensor:
    """Allocate `[buffers, rows, V]` fp32 for a chunk of rows, padded with -inf to whole blocks."""
    V = logits.shape[2]
    rows = min(_rows(V), logits.shape[0] * logits.shape[1])
    pitch = -(-V // _block_count(V)) * _block_count(V)
    return torch.full(
        (buffers, rows, pitch), -torch.inf, dtype=torch.float32, device=logits.device
    )[..., :V]


def _rows(V: int) -> int:
    return max(1, CHUNK_BYTES // (4 * V))


def transformed(x: torch.Tensor, buffer: torch.Tensor, transform: LogitTransform) -> torch.Tensor:
    """Compute the logits z, fp32, in the buffer."""
    z = buffer.copy_(x)
    V = x.shape[1]
    # the copy has overwritten the padding
    z.as_strided((len(z), z.stride(0) - V), (z.stride(0), 1), z.storage_offset() + V).fill_(
        -torch.inf
    )
    pre, post = transform.factors
    if pre > 0:
        z.mul_(pre).tanh_()
    return z.mul_(post) if post != 1 else z


def chunks_of(
    logits: torch.Tensor, alive: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield flat indices and logits `[rows, V]` of live rows; a view if they are adjacent."""
    inner, V = logits.shape[1:]
    scored = alive.nonzero()[:, 0]
    for rows in scored.split(_rows(V)) if scored.numel() else ():
        view = view_of(logits, rows)
        yield rows, logits[rows // inner, rows % inner] if view is None else view


def view_of(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor | None:
    """Return rows of `[outer, inner, V]` as a view, if they are adjacent and one stride apart."""
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
