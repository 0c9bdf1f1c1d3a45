"""Rows whose columns lie on several ranks: their statistics put together."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .vocabulary import row_results, transform_factors

BLOCK = 128


@triton.jit(do_not_specialize=["N", "R"])
def _shards_combine_kernel(
    statistics_ptr,  # in   [R, 3 or 4, N] fp32, of ``vocabulary.shard_statistics``
    labels_ptr,  # in   [N] int
    logps_ptr,  # out  [N] fp32; 0 where ignored, NaN where two shards hold the label
    lse_ptr,  # out  [2, N] fp32, (peak, rest)
    entropy_ptr,  # out  [N] fp32, or unused
    N,
    R,
    post,
    ignore_index,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Cost: two reads of the statistics' maxima, one of the rest; about R x 16 bytes a row."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = rows < N
    label = tl.load(labels_ptr + rows, mask=valid, other=0)
    fields = 3
    if HAS_ENTROPY:
        fields = 4
    pitch = (tl.zeros([], tl.int64) + N) * fields
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    for r in range(R):
        top = tl.maximum(top, tl.load(statistics_ptr + r * pitch + N + rows, mask=valid, other=0.0))
    base = tl.where(top == float("-inf"), 0.0, top)
    y_label = tl.full([BLOCK], float("-inf"), tl.float32)
    owners = tl.zeros([BLOCK], tl.int32)
    others = tl.zeros([BLOCK], tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)  # sum over shards of s (H - log s), s their share of others
    for r in range(R):
        shard_ptr = statistics_ptr + r * pitch + rows
        y = tl.load(shard_ptr, mask=valid, other=0.0)
        owners += tl.where(y == float("-inf"), 0, 1)
        y_label = tl.where(y == float("-inf"), y_label, y)
        peak = tl.load(shard_ptr + N, mask=valid, other=0.0)
        share = tl.load(shard_ptr + 2 * N, mask=valid, other=0.0) * tl.exp((peak - base) * post)
        others += share
        if HAS_ENTROPY:
            h = tl.load(shard_ptr + 3 * N, mask=valid, other=0.0)
            moment += tl.where(share == 0.0, 0.0, share * (h - tl.log(share)))
    y_label = tl.where(owners > 1, float("nan"), y_label)
    h_others = tl.where(others == 0.0, 0.0, moment / others + tl.log(others))
    logp, peak, rest, entropy = row_results(base, others, y_label, h_others, post)
    ignored = label == ignore_index
    tl.store(logps_ptr + rows, tl.where(ignored, 0.0, logp), mask=valid)
    tl.store(lse_ptr + rows, tl.where(ignored, 0.0, peak), mask=valid)
    tl.store(lse_ptr + N + rows, tl.where(ignored, 0.0, rest), mask=valid)
    if HAS_ENTROPY:
        tl.store(entropy_ptr + rows, tl.where(ignored, 0.0, entropy), mask=valid)


def combine(
    statistics: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What ``vocabulary.vocabulary_forward`` returns of whole rows, from the statistics ``[R, 3 or 4, N]`` of their R shards."""
    R, _, N = statistics.shape
    logps = torch.empty(N, dtype=torch.float32, device=statistics.device)
    lse = torch.empty((2, N), dtype=torch.float32, device=statistics.device)
    entropies = torch.empty(N if entropy else 0, dtype=torch.float32, device=statistics.device)
    if N:
        _shards_combine_kernel[(triton.cdiv(N, BLOCK),)](
            statistics, labels, logps, lse, entropies, N, R, transform_factors(temperature, logit_scale, softcap)[1], ignore_index,
            HAS_ENTROPY=entropy, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return logps, lse, entropies
