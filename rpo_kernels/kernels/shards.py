"""Combination of statistics for rows whose columns are spread over ranks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..inputs import LogitTransform
from .launch import on_device_of
from .primitives import ANYWHERE, LOG2E
from .vocabulary_forward import LEAST, Sum, finish, label_exponent, merge

BLOCK = 128


@triton.jit(do_not_specialize=["N", "R", "ignore_index"], do_not_specialize_on_alignment=ANYWHERE)
def _shards_combine_kernel(
    statistics_ptr,  # in   [R, 3 or 4, N] fp32, from vocabulary_forward.shard_statistics
    labels_ptr,  # in   [N] int
    logps_ptr,  # out  [N] fp32; 0 where ignored, NaN if two shards hold the label
    lse_ptr,  # out  [2, N] fp32, (integer, fraction)
    entropy_ptr,  # out  [N] fp32, or unused
    N,
    R,
    ignore_index,
    post,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Cost: one read of the statistics, about R x 16 bytes per row."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = rows < N
    label = tl.load(labels_ptr + rows, mask=valid, other=0)
    fields = 3
    if HAS_ENTROPY:
        fields = 4
    pitch = (tl.zeros([], tl.int64) + N) * fields
    y_label = tl.full([BLOCK], float("-inf"), tl.float32)
    owners = tl.zeros([BLOCK], tl.int32)
    zeros = tl.zeros([BLOCK], tl.float32)
    others = Sum(tl.full([BLOCK], LEAST, tl.float32), zeros, zeros)
    for r in range(R):
        shard_ptr = statistics_ptr + r * pitch + rows
        y = tl.load(shard_ptr, mask=valid, other=0.0)
        owners += tl.where(y == float("-inf"), 0, 1)
        y_label = tl.where(y == float("-inf"), y_label, y)
        shift = tl.load(shard_ptr + N, mask=valid, other=0.0)
        total = tl.load(shard_ptr + 2 * N, mask=valid, other=0.0)
        moment = zeros
        if HAS_ENTROPY:
            moment = tl.load(shard_ptr + 3 * N, mask=valid, other=0.0)
        others = merge(others, Sum(shift, total, moment))
    y_label = tl.where(owners > 1, float("nan"), y_label)
    # the label's exponent counts even if its shard has no other finite column
    others = merge(Sum(label_exponent(y_label, post * LOG2E), zeros, zeros), others)
    logp, whole, fraction, entropy = finish(others, y_label, post * LOG2E)
    ignored = label == ignore_index
    tl.store(logps_ptr + rows, tl.where(ignored, 0.0, logp), mask=valid)
    tl.store(lse_ptr + rows, tl.where(ignored, 0.0, whole), mask=valid)
    tl.store(lse_ptr + N + rows, tl.where(ignored, 0.0, fraction), mask=valid)
    if HAS_ENTROPY:
        tl.store(entropy_ptr + rows, tl.where(ignored, 0.0, entropy), mask=valid)


def combine(
    statistics: torch.Tensor, labels: torch.Tensor, transform: LogitTransform, entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return what `vocabulary_forward` returns for whole rows, given the statistics of R shards.

    statistics are `[R, 3 or 4, N]`, from `shard_statistics`.
    """
    R, _, N = statistics.shape
    logps = torch.empty(N, dtype=torch.float32, device=statistics.device)
    lse = torch.empty((2, N), dtype=torch.float32, device=statistics.device)
    entropies = torch.empty_like(logps) if entropy else None
    if N:
        with on_device_of(statistics):
            _shards_combine_kernel[(-(-N // BLOCK),)](
                statistics,
                labels,
                logps,
                lse,
                entropies,
                N,
                R,
                transform.ignore_index,
                transform.factors[1],
                HAS_ENTROPY=entropy,
                BLOCK=BLOCK,
                num_warps=4,
            )
    return logps, lse, entropies
