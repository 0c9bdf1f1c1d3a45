"""From tokens to sequences and back: sums of log-probabilities, and coefficients."""

import triton
import triton.language as tl

from .batch import DLOGPS, IMPLICIT, LOGPS, MEAN, ROLES, SEQUENCE_REF, SLOPE, TOKEN_REF, TOKENS


@triton.jit
def group_of(i, p, n, FLAGS: tl.constexpr):
    """Group of sequence i: the last g with cu_groups[g] <= i, by bisection."""
    if FLAGS.ragged:
        low = tl.zeros_like(i)
        high = tl.zeros_like(i) + n.G
        for _ in range(n.group_steps):
            middle = (low + high) // 2
            right = tl.load(p.cu_groups + middle, mask=middle < n.G, other=2147483647) <= i
            low = tl.where(right & (high - low > 1), middle, low)
            high = tl.where(right | (high - low <= 1), high, middle)
        return low
    else:
        return i // n.K


@triton.jit
def bounds_of_group(g, p, n, FLAGS: tl.constexpr, mask):
    return _bounds_of(g, p.cu_groups, n.G, n.S, n.K, FLAGS.ragged, mask)


@triton.jit
def bounds_of_sequence(s, p, n, FLAGS: tl.constexpr, mask):
    return _bounds_of(s, p.cu_seqlens, n.S, n.N, n.T, FLAGS.packed, mask)


@triton.jit
def _bounds_of(i, cu_ptr, size, total, uniform, PACKED: tl.constexpr, mask):
    """[start, end) of segment i, and whether its offsets are invalid."""
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
def sum_sequences(p, n, o, FLAGS: tl.constexpr):
    """Phase 1: l_i, n_i and a_i (l_i - lref_i), summed in fp64.

    Returns the number of offsets that do not partition the tokens.
    """
    BLOCK_S: tl.constexpr = FLAGS.block_s
    BLOCK_T: tl.constexpr = FLAGS.block_t
    broken = 0
    for s0 in range(0, n.S, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        live = s < n.S
        if FLAGS.has_tokens:
            start, end, bad = bounds_of_sequence(s, p, n, FLAGS, live)
            broken += tl.sum(bad.to(tl.int32), axis=0)
            longest = tl.max(end - start, axis=0)
            count = tl.zeros([BLOCK_S], tl.int32)
            logp = tl.zeros([BLOCK_S], tl.float64)
        else:
            longest = 0
            start = s
            end = s
            count = tl.full([BLOCK_S], 1, tl.int32)
            if FLAGS.has_lengths:
                count = tl.load(p.lengths_in + s, mask=live, other=0).to(tl.int32)
            logp = tl.load(p.logps + s, mask=live, other=0.0).to(tl.float64)
        g = group_of(s, p, n, FLAGS)
        ratio = tl.zeros([BLOCK_S], tl.float64)
        top = tl.full([BLOCK_S], float("-inf"), tl.float64)  # of the harmonic logsumexp
        for r in range(n.R):
            delta = tl.zeros([BLOCK_S], tl.float64)
            if FLAGS.has_tokens:
                for t0 in range(0, longest, BLOCK_T):
                    token = (start[:, None] + t0 + tl.arange(0, BLOCK_T)[None, :]).to(tl.int64)
                    scored = token < end[:, None]
                    label = tl.load(p.labels + token, mask=scored, other=0)
                    scored = scored & (label != n.ignore_index)
                    lp = tl.load(p.logps + token, mask=scored, other=0.0).to(tl.float64)
                    if r == 0:
                        count += tl.sum(scored.to(tl.int32), axis=1)
                        logp += tl.sum(lp, axis=1)
                    if FLAGS.ref == TOKEN_REF:
                        ref_ptr = p.ref_logps + tl.cast(r, tl.int64) * n.N
                        lp -= tl.load(ref_ptr + token, mask=scored, other=0.0).to(tl.float64)
                    delta += tl.sum(lp, axis=1)
            else:
                delta += logp
            if FLAGS.ref == SEQUENCE_REF:
                delta -= tl.load(
                    p.ref_logps + tl.cast(r, tl.int64) * n.S + s, mask=live, other=0.0
                ).to(tl.float64)
            alpha = tl.full([BLOCK_S], 1.0, tl.float64)
            if FLAGS.has_weights:
                weight_ptr = p.ref_weights + r * n.weight_stride_r + g * n.weight_stride_g
                alpha = tl.load(weight_ptr, mask=live & (g < n.G), other=1.0).to(tl.float64)
            if FLAGS.harmonic:
                term = tl.where(alpha > 0.0, tl.log(alpha) + delta, float("-inf"))
                higher = tl.maximum(top, term)
                base = tl.where(higher == float("-inf"), 0.0, higher)
                ratio = ratio * tl.exp(top - base) + tl.exp(term - base)
                top = higher
            else:
                ratio += tl.where(alpha == 0.0, 0.0, alpha * delta)
        if FLAGS.harmonic:
            ratio = top + tl.log(ratio)
        unit = tl.full([BLOCK_S], 1.0, tl.float64) * o.beta
        if FLAGS.average:
            unit = unit / tl.maximum(count, 1)
        tl.store(
            p.sequence + IMPLICIT * n.S + s,
            tl.where(count > 0, unit * ratio, 0.0).to(tl.float32),
            mask=live,
        )
        tl.store(p.sequence + LOGPS * n.S + s, logp.to(tl.float32), mask=live)
        tl.store(p.lengths + s, count, mask=live)
    return broken


@triton.jit
def spread_coefficients(p, n, o, per_token, factor, FLAGS: tl.constexpr):
    """Phase 5: dL/dl_i, and the same for each scored token."""
    BLOCK_S: tl.constexpr = FLAGS.block_s
    BLOCK_T: tl.constexpr = FLAGS.block_t
    for s0 in range(0, n.S, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        live = s < n.S
        count = tl.load(p.lengths + s, mask=live, other=1)
        coef = tl.load(p.scratch + SLOPE * n.S + s, mask=live, other=0.0) * o.beta
        if FLAGS.average:
            coef = coef / tl.maximum(count, 1).to(tl.float32)
        if FLAGS.sft >= 0:
            pull = tl.where(
                tl.load(p.sequence + ROLES * n.S + s, mask=live, other=0.0) == 2.0,
                o.sft_weight,
                0.0,
            )
            if FLAGS.sft == MEAN:
                pull = pull / tl.maximum(count, 1).to(tl.float32)
            elif FLAGS.sft == TOKENS:
                pull = pull * per_token
            coef -= pull
        coef = coef * factor
        if FLAGS.has_group_weights:
            g = group_of(s, p, n, FLAGS)
            coef *= tl.load(p.group_weights + g, mask=live & (g < n.G), other=1.0)
        tl.store(p.sequence + DLOGPS * n.S + s, coef, mask=live)
        if FLAGS.has_tokens:
            start, end, _ = bounds_of_sequence(s, p, n, FLAGS, live)
            longest = tl.max(end - start, axis=0)
            for t0 in range(0, longest, BLOCK_T):
                token = (start[:, None] + t0 + tl.arange(0, BLOCK_T)[None, :]).to(tl.int64)
                inside = token < end[:, None]
                label = tl.load(p.labels + token, mask=inside, other=0)
                tl.store(
                    p.coef + token,
                    tl.where(label == n.ignore_index, 0.0, coef[:, None]),
                    mask=inside,
                )
