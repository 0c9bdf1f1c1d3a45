"""Rows of logits in PyTorch, chunk by chunk: shared by the vocabulary passes.

A chunk of fp32 logits per thread stays in the cache and is all that exists besides input and
gradient. It goes through PyTorch's fused (log_)softmax, which is several times faster than exp, sub
and sum in sequence. That sums a row naively in fp32, so long rows are split into blocks, whose sums
are combined in float64.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch

from ..inputs import LogitTransform
from .threads import run_on_threads

# bytes of fp32 logits per thread: they fit its share of the cache
CHUNK_BYTES = 4 << 20
FLOOR = -1e4  # of log-probabilities, so that 0 log 0 is 0


def as_blocks(z: torch.Tensor) -> torch.Tensor:
    """View rows of a scratch buffer, with padding, as `[rows, blocks, columns]`."""
    count = block_count(z.shape[1])
    return z.as_strided(
        (z.shape[0], count, z.stride(0) // count),
        (z.stride(0), z.stride(0) // count, 1),
        z.storage_offset(),
    )


def block_count(V: int) -> int:
    return max(1, V // 1024)


Work = Callable[[slice, torch.Tensor], None]  # of some of the rows, and scratch


def for_each_chunk(work: Work, N: int, V: int, device: torch.device, buffers: int) -> None:
    """Call `work(rows, scratch)` for chunks of N rows.

    scratch is fp32 `[buffers, rows, V]`, padded in memory as `as_blocks` needs it. Each chunk
    belongs to one thread from its first operator to its last (see `threads`). What can be done for
    all rows at once is not for `work`: small operators cost as much as those on the columns.
    """
    if not N:
        return
    # other threads would not use the caller's CUDA stream
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    size = max(1, min(CHUNK_BYTES // (4 * V), -(-N // threads)))
    chunks = deque((work, slice(i, min(i + size, N))) for i in range(0, N, size))
    # allocated here: PyTorch's profiler does not see the memory of other threads
    pitch = -(-V // block_count(V)) * block_count(V)
    shape = (min(threads, len(chunks)), buffers, size, pitch)
    scratch = deque(torch.empty(shape, dtype=torch.float32, device=device)[..., :V])
    if threads == 1:
        return _run(chunks, scratch)
    run_on_threads(len(scratch), _run, chunks, scratch)


def _run(chunks: deque[tuple[Work, slice]], scratch: deque[torch.Tensor]) -> None:
    """Process chunks until none is left; other threads do the same at the same time.

    Takes chunks and memory out of its arguments, so that they are freed before it returns: the
    executor releases the arguments themselves a moment later.
    """
    mine = scratch.pop()
    with torch.no_grad():  # threads begin with gradients enabled
        while True:
            try:
                work, rows = chunks.popleft()
            except IndexError:
                return
            work(rows, mine[:, : rows.stop - rows.start])


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


def rows_of(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return logits `[rows, V]`, as a view if the rows are adjacent."""
    inner = logits.shape[1]
    view = view_of(logits, rows)
    return logits[rows // inner, rows % inner] if view is None else view


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
