"""Tokens to sequences and back: sums of log-probabilities forward, coefficients backward."""

import triton
import triton.language as tl

from .distances import MEAN, SEQUENCE_REF, TOKEN_REF, TOKENS


@triton.jit
def group_of(i, cu_groups_ptr, G, GROUP_SIZE, group_steps, RAGGED: tl.constexpr):
    """Group of sequence i: the last g with cu_groups[g] <= i, by bisection."""
    if RAGGED:
        low = tl.zeros_like(i)
        high = tl.zeros_like(i) + G
        for _ in range(group_steps):
            middle = (low + high) // 2
            right = tl.load(cu_groups_ptr + middle, mask=middle < G, other=2147483647) <= i
            low = tl.where(right & (high - low > 1), middle, low)
            high = tl.where(right | (high - low <= 1), high, middle)
        return low
    else:
        return i // GROUP_SIZE


@triton.jit
def bounds_of(i, cu_ptr, size, total, uniform, PACKED: tl.constexpr, mask):
    """[start, end) of segment i of a total, and whether its offsets are unusable."""
    if PACKED:
        start = tl.load(cu_ptr + i, mask=mask, other=0)
        end = tl.load(cu_ptr + i + 1, mask=mask, other=0)
        bad = (start < 0) | (end < start) | (end > total)
        bad |= mask & (i == 0) & (start != 0)
        bad |= mask & (i == size - 1) & (end != total)
        return tl.where(bad, 0, start), tl.where(bad, 0, end), bad
    else:
        start = tl.where(mask, i * uniform, 0)
        return start, tl.where(mask, start + uniform, 0), start < 0


@triton.jit
def sum_sequences(
    logps_ptr,
    labels_ptr,
    lengths_in_ptr,
    cu_seqlens_ptr,
    cu_groups_ptr,
    ref_logps_ptr,
    ref_weights_ptr,
    sequence_ptr,
    lengths_ptr,
    N,
    S,
    G,
    T,
    K,
    R,
    weight_stride_r,
    weight_stride_g,
    group_steps,
    ignore_index,
    beta,
    AVERAGE: tl.constexpr,
    REF: tl.constexpr,
    HARMONIC: tl.constexpr,
    HAS_TOKENS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    PACKED: tl.constexpr,
    RAGGED: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Phase 1: l_i, n_i and a_i (l_i - lref_i), summed in fp64.

    Returns how many offsets do not partition the tokens.
    """
    broken = 0
    for s0 in range(0, S, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        live = s < S
        if HAS_TOKENS:
            start, end, bad = bounds_of(s, cu_seqlens_ptr, S, N, T, PACKED, live)
            broken += tl.sum(bad.to(tl.int32), axis=0)
            longest = tl.max(end - start, axis=0)
            count = tl.zeros([BLOCK_S], tl.int32)
            logp = tl.zeros([BLOCK_S], tl.float64)
        else:
            longest = 0
            start = s
            end = s
            count = tl.full([BLOCK_S], 1, tl.int32)
            if HAS_LENGTHS:
                count = tl.load(lengths_in_ptr + s, mask=live, other=0).to(tl.int32)
            logp = tl.load(logps_ptr + s, mask=live, other=0.0).to(tl.float64)
        g = group_of(s, cu_groups_ptr, G, K, group_steps, RAGGED)
        ratio = tl.zeros([BLOCK_S], tl.float64)
        top = tl.full([BLOCK_S], float("-inf"), tl.float64)  # of the harmonic logsumexp
        for r in range(R):
            delta = tl.zeros([BLOCK_S], tl.float64)
            if HAS_TOKENS:
                for t0 in range(0, longest, BLOCK_T):
                    token = (start[:, None] + t0 + tl.arange(0, BLOCK_T)[None, :]).to(tl.int64)
                    scored = token < end[:, None]
                    label = tl.load(labels_ptr + token, mask=scored, other=0)
                    scored = scored & (label != ignore_index)
                    lp = tl.load(logps_ptr + token, mask=scored, other=0.0).to(tl.float64)
                    if r == 0:
                        count += tl.sum(scored.to(tl.int32), axis=1)
                        logp += tl.sum(lp, axis=1)
                    if REF == TOKEN_REF:
                        ref_ptr = ref_logps_ptr + tl.cast(r, tl.int64) * N
                        lp -= tl.load(ref_ptr + token, mask=scored, other=0.0).to(tl.float64)
                    delta += tl.sum(lp, axis=1)
            else:
                delta += logp
            if REF == SEQUENCE_REF:
                delta -= tl.load(
                    ref_logps_ptr + tl.cast(r, tl.int64) * S + s, mask=live, other=0.0
                ).to(tl.float64)
            alpha = tl.full([BLOCK_S], 1.0, tl.float64)
            if HAS_WEIGHTS:
                weight_ptr = ref_weights_ptr + r * weight_stride_r + g * weight_stride_g
                alpha = tl.load(weight_ptr, mask=live & (g < G), other=1.0).to(tl.float64)
            if HARMONIC:
                term = tl.where(alpha > 0.0, tl.log(alpha) + delta, float("-inf"))
                higher = tl.maximum(top, term)
                base = tl.where(higher == float("-inf"), 0.0, higher)
                ratio = ratio * tl.exp(top - base) + tl.exp(term - base)
                top = higher
            else:
                ratio += tl.where(alpha == 0.0, 0.0, alpha * delta)
        if HARMONIC:
            ratio = top + tl.log(ratio)
        unit = tl.full([BLOCK_S], 1.0, tl.float64) * beta
        if AVERAGE:
            unit = unit / tl.maximum(count, 1)
        tl.store(sequence_ptr + s, tl.where(count > 0, unit * ratio, 0.0).to(tl.float32), mask=live)
        tl.store(sequence_ptr + S + s, logp.to(tl.float32), mask=live)
        tl.store(lengths_ptr + s, count, mask=live)
    return broken


@triton.jit
def spread_coefficients(
    labels_ptr,
    cu_seqlens_ptr,
    sequence_ptr,
    lengths_ptr,
    coef_ptr,
    scratch_ptr,
    N,
    S,
    T,
    ignore_index,
    beta,
    sft_weight,
    per_token,
    factor,
    AVERAGE: tl.constexpr,
    SFT: tl.constexpr,
    HAS_TOKENS: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Phase 5: dL/dl_i, and the same for each scored token."""
    for s0 in range(0, S, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        live = s < S
        count = tl.load(lengths_ptr + s, mask=live, other=1)
        coef = tl.load(scratch_ptr + S + s, mask=live, other=0.0) * beta
        if AVERAGE:
            coef = coef / tl.maximum(count, 1).to(tl.float32)
        if SFT >= 0:
            pull = tl.where(
                tl.load(sequence_ptr + 4 * S + s, mask=live, other=0.0) == 2.0, sft_weight, 0.0
            )
            if SFT == MEAN:
                pull = pull / tl.maximum(count, 1).to(tl.float32)
            elif SFT == TOKENS:
                pull = pull * per_token
            coef -= pull
        coef = coef * factor
        tl.store(sequence_ptr + 3 * S + s, coef, mask=live)
        if HAS_TOKENS:
            start, end, _ = bounds_of(s, cu_seqlens_ptr, S, N, T, PACKED, live)
            longest = tl.max(end - start, axis=0)
            for t0 in range(0, longest, BLOCK_T):
                token = (start[:, None] + t0 + tl.arange(0, BLOCK_T)[None, :]).to(tl.int64)
                inside = token < end[:, None]
                label = tl.load(labels_ptr + token, mask=inside, other=0)
                tl.store(
                    coef_ptr + token,
                    tl.where(label == ignore_index, 0.0, coef[:, None]),
                    mask=inside,
                )
