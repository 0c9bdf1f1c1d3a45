"""Rows of logits in PyTorch, a chunk at a time: what the vocabulary pass does in both directions.

A chunk stays in the cache: one of fp32 logits for each thread is all that exists beside input and
gradient. The work is PyTorch's own fused (log_)softmax, several times as fast as its exp, sub and
sum one after the other; it sums a row naively in fp32, so long rows go through it in blocks whose
sums are combined in float64.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch

from ..inputs import LogitTransform
from .threads import run_on_threads

# of fp32 logits, for each thread: inside its share of the cache, and many operators long
CHUNK_BYTES = 4 << 20
FLOOR = -1e4  # of log-probabilities where 0 log 0 is to be 0


def log_softmax_blocks(
    z: torch.Tensor, exponentiate: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-softmax (or softmax) within each block of columns, in place ``[rows, blocks, columns]``,
    and lse ``[rows, blocks]``.
    """
    blocks = as_blocks(z)
    top = blocks.amax(2)
    if exponentiate:
        share = torch.softmax(blocks, 2, out=blocks).amax(2).double().log()
    else:
        share = torch.log_softmax(blocks, 2, out=blocks).amax(2).double()
    return blocks, torch.where(top == -torch.inf, -torch.inf, top.double() - share)


def as_blocks(z: torch.Tensor) -> torch.Tensor:
    """Rows of a scratch buffer, padding included, as ``[rows, blocks, columns]``."""
    count = _block_count(z.shape[1])
    return z.as_strided(
        (z.shape[0], count, z.stride(0) // count),
        (z.stride(0), z.stride(0) // count, 1),
        z.storage_offset(),
    )


def _block_count(V: int) -> int:
    return max(1, V // 1024)


Work = Callable[[torch.Tensor, torch.Tensor], None]  # of rows and scratch


def for_each_chunk(work: Work, alive: torch.Tensor, V: int, buffers: int) -> None:
    """``work(rows, scratch)`` for all rows ``[N]`` that are alive: their flat indices, and fp32
    ``[buffers, rows, V]`` to work in, whose rows are as long as :func:`as_blocks` needs.

    A chunk is one thread's from its first operator to its last (see ``threads``).
    """
    scored = alive.nonzero()[:, 0]
    if not scored.numel():
        return
    # threads of their own would not have the caller's CUDA stream
    threads = torch.get_num_threads() if alive.device.type == "cpu" else 1
    size = max(1, min(CHUNK_BYTES // (4 * V), -(-scored.numel() // threads)))
    chunks = deque((work, rows) for rows in scored.split(size))
    # here, not on the threads, whose memory PyTorch's profiler does not see
    pitch = -(-V // _block_count(V)) * _block_count(V)
    shape = (min(threads, len(chunks)), buffers, size, pitch)
    scratch = deque(torch.empty(shape, dtype=torch.float32, device=alive.device)[..., :V])
    if threads == 1:
        return _run(chunks, scratch)
    run_on_threads(len(scratch), _run, chunks, scratch)


def _run(chunks: deque[tuple[Work, torch.Tensor]], scratch: deque[torch.Tensor]) -> None:
    """Work through chunks until none is left, beside other threads that do the same.

    What it takes out of its arguments is gone before it returns: a thread lets go of the arguments
    themselves a moment later, when nobody waits for it any more.
    """
    mine = scratch.pop()
    with torch.inference_mode():  # threads begin with gradients enabled
        while True:
            try:
                work, rows = chunks.popleft()
            except IndexError:
                return
            work(rows, mine[:, : len(rows)])


def transformed(x: torch.Tensor, buffer: torch.Tensor, transform: LogitTransform) -> torch.Tensor:
    """The logits z in fp32, in the buffer."""
    z = buffer.copy_(x)
    V = x.shape[1]
    # padding was overwritten
    z.as_strided((len(z), z.stride(0) - V), (z.stride(0), 1), z.storage_offset() + V).fill_(
        -torch.inf
    )
    pre, post = transform.factors
    if pre > 0:
        z.mul_(pre).tanh_()
    return z.mul_(post) if post != 1 else z


def rows_of(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Logits ``[rows, V]``: a view where they are neighbours."""
    inner = logits.shape[1]
    view = view_of(logits, rows)
    return logits[rows // inner, rows % inner] if view is None else view


def view_of(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor | None:
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
