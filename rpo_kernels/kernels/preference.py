"""The group pass: token log-probabilities to loss, implicit rewards and one coefficient per token, in one launch.

A batch holds about ten floats per group, so one program does it all, in phases divided by barriers: sequence sums; per
sequence, its share of the loss and its coefficient; per group, the loss; then the coefficients spread over the tokens. Its
time is that of reading N log-probabilities, labels and references once, about 0.3 % of a vocabulary pass over N rows.

Under every distance the coefficient of response i is a sum over its partners j of an antisymmetric function, so that
coefficients cancel over a group by construction (u = s - t, p = softmax(s), q = softmax(t), d = s_i - s_j, tau = t_i - t_j):

    squared                  u_i - u_j
    backward KL, listwise    p_i q_j - q_i p_j
    forward KL, listwise     p_i p_j (u_i - u_j)
    pairwise                 sigma(d) - sigma(tau), or sigma'(d) (d - tau)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..objectives import RPOObjective
from .distances import BACKWARD_KL, FORWARD_KL, SQUARED, bernoulli, entropy_term, exp_difference, gap_of, kl_term, labelled
from .primitives import softplus

LISTWISE, PAIRWISE, POINTWISE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
REWARDS, GAP, LABEL, SOFTMAX = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
SUM, MEAN, TOKENS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SEQUENCE_REF, TOKEN_REF = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _group_of(i, cu_groups_ptr, G, GROUP_SIZE, group_steps, RAGGED: tl.constexpr):
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
def _bounds(i, cu_ptr, size, total, uniform, PACKED: tl.constexpr, mask):
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
def _target(j, first, rewards_ptr, eta, target, mask, TARGET: tl.constexpr):
    """t_j of response j in the group that begins at first."""
    if TARGET == REWARDS or TARGET == SOFTMAX:
        return eta * tl.load(rewards_ptr + j, mask=mask, other=0.0)
    else:
        return tl.where(j == first, 0.5 * target, -0.5 * target)


@triton.jit
def _hardened(t, top):
    """Targets of a group whose largest is infinite: 0 for the largest, -inf for the others."""
    return tl.where(tl.abs(top) == float("inf"), tl.where(t == top, 0.0, float("-inf")), t)


@triton.jit(do_not_specialize=["N", "S", "G", "T", "K", "group_steps", "ignore_index"])
def _preference_kernel(
    logps_ptr,  # in   [N] fp32 of tokens, or [S] of sequences
    labels_ptr,  # in   [N] int (tokens), or unused
    lengths_in_ptr,  # in   [S] int (sequences), or unused
    cu_seqlens_ptr,  # in   [S+1] int32 (packed tokens), or unused
    cu_groups_ptr,  # in   [G+1] int32 (ragged groups), or unused
    ref_logps_ptr,  # in   [R, N] or [R, S] fp32, or unused
    ref_weights_ptr,  # in   [R] or [R, G] fp32, or unused (R = 1)
    rewards_ptr,  # in   [S] fp32, or unused
    normalizer_ptr,  # in   [] fp32, or unused
    sft_share_ptr,  # in   [] fp32, counted groups / tokens of their chosen responses, or unused
    loss_ptr,  # out  [] fp32
    losses_ptr,  # out  [G] fp32
    sequence_ptr,  # out  [5, S] fp32: implicit rewards, log-probs, targets, dL/dlogps, role (0 dropped, 1 counted, 2 chosen)
    lengths_ptr,  # out  [S] int32 (tokens), or unused
    coef_ptr,  # out  [N] fp32 (tokens), or unused
    scratch_ptr,  # tmp  [3, S] fp32: a (l - lref), loss share, dL/ds
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
    eta,
    margin,
    scale,
    target,
    label_of_first,
    sft_weight,
    DISTANCE: tl.constexpr,
    COMPARISON: tl.constexpr,
    TARGET: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    LEAVE_ONE_OUT: tl.constexpr,
    AVERAGE: tl.constexpr,
    REF: tl.constexpr,
    HARMONIC: tl.constexpr,
    SFT: tl.constexpr,
    HAS_TOKENS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    PACKED: tl.constexpr,
    RAGGED: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_NORMALIZER: tl.constexpr,
    HAS_SFT_SHARE: tl.constexpr,
    IS_MEAN: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Cost: logps, labels and references read once (lp again per further reference), coefficients written once."""
    broken = 0  # offsets that do not partition their total

    # 1. Sequence sums, in fp64: l_i, n_i and a_i (l_i - lref_i).
    for s0 in range(0, S, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        live = s < S
        if HAS_TOKENS:
            start, end, bad = _bounds(s, cu_seqlens_ptr, S, N, T, PACKED, live)
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
        g = _group_of(s, cu_groups_ptr, G, K, group_steps, RAGGED)
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
                delta -= tl.load(ref_logps_ptr + tl.cast(r, tl.int64) * S + s, mask=live, other=0.0).to(tl.float64)
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
        tl.store(scratch_ptr + s, tl.where(count > 0, unit * ratio, 0.0).to(tl.float32), mask=live)
        tl.store(sequence_ptr + S + s, logp.to(tl.float32), mask=live)
        tl.store(lengths_ptr + s, count, mask=live)
    tl.debug_barrier()

    # 2. Sequences i against their partners j: share of the group's loss, dL/ds_i, role.
    for i0 in range(0, S, BLOCK_I):
        i = i0 + tl.arange(0, BLOCK_I)
        live = i < S
        g = _group_of(i, cu_groups_ptr, G, K, group_steps, RAGGED)
        first, last, bad = _bounds(g, cu_groups_ptr, G, S, K, RAGGED, live & (g < G))
        broken += tl.sum((bad & (i == first)).to(tl.int32), axis=0)
        members = tl.max(last - first, axis=0)
        ti = _target(i, first, rewards_ptr, eta, target, live, TARGET)
        ni = tl.load(lengths_ptr + i, mask=live, other=0)

        count = tl.zeros([BLOCK_I], tl.int32)
        top_t = tl.full([BLOCK_I], float("-inf"), tl.float32)
        chosen = tl.full([BLOCK_I], 2147483647, tl.int32)
        for k0 in range(0, members, BLOCK_J):
            j = first[:, None] + k0 + tl.arange(0, BLOCK_J)[None, :]
            partner = j < last[:, None]
            partner = partner & (tl.load(lengths_ptr + j, mask=partner, other=0) > 0)
            count += tl.sum(partner.to(tl.int32), axis=1)
            if TARGET != LABEL:
                t = _target(j, first[:, None], rewards_ptr, eta, target, partner, TARGET)
                t_block = tl.max(tl.where(partner, t, float("-inf")), axis=1)
                where_top = tl.min(tl.where(partner & (t == t_block[:, None]), j, 2147483647), axis=1)
                chosen = tl.where((t_block > top_t) | (chosen == 2147483647), where_top, chosen)
                top_t = tl.maximum(top_t, t_block)
        if TARGET == GAP or TARGET == LABEL:
            chosen = first
        chosen_length = tl.load(lengths_ptr + chosen, mask=live & (chosen < S), other=0)
        if COMPARISON == POINTWISE:
            counted = count >= 1
        else:
            counted = count >= 2
        if TARGET == LABEL:
            counted = counted & (count == 2)
        counted = live & counted & (chosen_length > 0) & (ni > 0)
        kf = tl.maximum(count, 2).to(tl.float32)

        si = tl.load(scratch_ptr + i, mask=live, other=0.0) - tl.where(i == chosen, margin, 0.0)
        tl.store(sequence_ptr + i, tl.where(ni > 0, si, 0.0), mask=live)
        tl.store(sequence_ptr + 2 * S + i, tl.where(ni > 0, ti, 0.0), mask=live)

        # Log-softmaxes of s and t over the group, each own entry by the sum over the others: full digits near 0.
        top_s = tl.full([BLOCK_I], float("-inf"), tl.float32)
        sum_s = tl.zeros([BLOCK_I], tl.float32)
        sum_t = tl.zeros([BLOCK_I], tl.float32)
        if (COMPARISON == LISTWISE and DISTANCE != SQUARED and TARGET != LABEL) or TARGET == SOFTMAX:
            base_t = tl.where(tl.abs(top_t) == float("inf"), 0.0, top_t)
            for k0 in range(0, members, BLOCK_J):
                j = first[:, None] + k0 + tl.arange(0, BLOCK_J)[None, :]
                partner = j < last[:, None]
                partner = partner & (tl.load(lengths_ptr + j, mask=partner, other=0) > 0)
                s = tl.load(scratch_ptr + j, mask=partner, other=0.0) - tl.where(j == chosen[:, None], margin, 0.0)
                t = _target(j, first[:, None], rewards_ptr, eta, target, partner, TARGET)
                t = _hardened(t, top_t[:, None])
                other = partner & (j != i[:, None])
                higher = tl.maximum(top_s, tl.max(tl.where(other, s, float("-inf")), axis=1))
                base = tl.where(higher == float("-inf"), 0.0, higher)
                added = tl.sum(tl.where(other, tl.exp(s - base[:, None]), 0.0), axis=1)
                sum_s = sum_s * tl.exp(top_s - base) + added
                top_s = higher
                sum_t += tl.sum(tl.where(other, tl.exp(t - base_t[:, None]), 0.0), axis=1)
            odds_s = tl.where(top_s == float("-inf"), float("-inf"), top_s - si + tl.log(sum_s))
            log_p = -softplus(odds_s)
            lse_s = tl.maximum(si, tl.where(odds_s > 0.0, top_s + tl.log(sum_s), si)) + softplus(-tl.abs(odds_s))
            ti_hard = _hardened(ti, top_t)
            odds_t = tl.where(sum_t == 0.0, float("-inf"), base_t - ti_hard + tl.log(sum_t))
            log_q = -softplus(odds_t)
            log_sum_t = tl.where(odds_t > 0.0, base_t + tl.log(sum_t), ti_hard)
            lse_t = log_sum_t + softplus(-tl.abs(odds_t))

        share = tl.zeros([BLOCK_I], tl.float32)
        slope = tl.zeros([BLOCK_I], tl.float32)
        if COMPARISON == POINTWISE:
            kf = tl.maximum(count, 1).to(tl.float32)
            weight = tl.full([BLOCK_I], 1.0, tl.float32)
            if TARGET == SOFTMAX:
                ti = tl.log(kf) + log_q
                weight += kf * tl.exp(log_q)
                tl.store(sequence_ptr + 2 * S + i, tl.where(ni > 0, ti, 0.0), mask=live)
            value, derivative = bernoulli(si, ti, DISTANCE, CROSS_ENTROPY)
            share = weight * value / kf
            slope = weight * derivative / kf
        else:
            for k0 in range(0, members, BLOCK_J):
                j = first[:, None] + k0 + tl.arange(0, BLOCK_J)[None, :]
                partner = j < last[:, None]
                partner = partner & (tl.load(lengths_ptr + j, mask=partner, other=0) > 0) & (j != i[:, None])
                s = tl.load(scratch_ptr + j, mask=partner, other=0.0) - tl.where(j == chosen[:, None], margin, 0.0)
                t = _target(j, first[:, None], rewards_ptr, eta, target, partner, TARGET)
                d = si[:, None] - s
                tau = gap_of(ti[:, None] + tl.zeros_like(t), t)
                if TARGET == LABEL:
                    label = tl.where(i[:, None] == first[:, None], label_of_first, 1.0 - label_of_first)
                    value, pull = labelled(d, label, CROSS_ENTROPY)
                elif COMPARISON == LISTWISE and DISTANCE == BACKWARD_KL:
                    t = _hardened(t, top_t[:, None])
                    a = log_p[:, None] + (t - lse_t[:, None])
                    b = log_q[:, None] + (s - lse_s[:, None])
                    value = tl.zeros_like(d)
                    pull = exp_difference(a, b, d - tau)
                elif COMPARISON == LISTWISE and DISTANCE == FORWARD_KL:
                    value = tl.zeros_like(d)
                    pull = tl.exp(log_p[:, None] + (s - lse_s[:, None])) * (d - tau)
                else:
                    value, pull = bernoulli(d, tau, DISTANCE, CROSS_ENTROPY)
                share += tl.sum(tl.where(partner, value, 0.0), axis=1)
                slope += tl.sum(tl.where(partner, pull, 0.0), axis=1)
            if TARGET == LABEL:
                share *= 0.5
            elif COMPARISON == LISTWISE and DISTANCE != SQUARED:
                if DISTANCE == BACKWARD_KL:
                    share = kl_term(log_q, log_p)
                    if CROSS_ENTROPY:
                        share += entropy_term(log_q)
                else:
                    share = kl_term(log_p, log_q)
            elif COMPARISON == LISTWISE:
                norm = 1.0 / ((kf - 1.0) * (kf - 1.0))
                if not LEAVE_ONE_OUT:
                    norm *= (kf - 1.0) / kf
                share *= 0.5 * norm
                slope *= norm
            else:
                share *= 1.0 / (kf * (kf - 1.0))
                slope *= 2.0 / (kf * (kf - 1.0))
        tl.store(scratch_ptr + S + i, tl.where(counted, scale * share, 0.0), mask=live)
        tl.store(scratch_ptr + 2 * S + i, tl.where(counted, scale * slope, 0.0), mask=live)
        role = tl.where(counted, tl.where(i == chosen, 2.0, 1.0), 0.0)
        tl.store(sequence_ptr + 4 * S + i, role, mask=live)
    tl.debug_barrier()

    # 3. Groups that count, and the scored tokens of their chosen responses.
    groups = 0
    tokens = 0
    for i0 in range(0, S, BLOCK_I * BLOCK_J):
        i = i0 + tl.arange(0, BLOCK_I * BLOCK_J)
        is_chosen = tl.load(sequence_ptr + 4 * S + i, mask=i < S, other=0.0) == 2.0
        groups += tl.sum(is_chosen.to(tl.int32), axis=0)
        tokens += tl.sum(tl.load(lengths_ptr + i, mask=is_chosen, other=0), axis=0)
    factor = 1.0
    if HAS_NORMALIZER:
        factor = 1.0 / tl.load(normalizer_ptr)
    elif IS_MEAN:
        factor = tl.where(groups > 0, 1.0 / tl.maximum(groups, 1).to(tl.float32), 0.0)
    if broken > 0:
        factor = float("nan")
    if HAS_SFT_SHARE:
        per_token = tl.load(sft_share_ptr)
    else:
        per_token = groups.to(tl.float32) / tl.maximum(tokens, 1).to(tl.float32)

    # 4. Group losses and their sum.
    loss = 0.0
    for g0 in range(0, G, BLOCK_I):
        g = g0 + tl.arange(0, BLOCK_I)
        live = g < G
        first, last, bad = _bounds(g, cu_groups_ptr, G, S, K, RAGGED, live)
        members = tl.max(last - first, axis=0)
        group_loss = tl.zeros([BLOCK_I], tl.float32)
        for k0 in range(0, members, BLOCK_J):
            j = first[:, None] + k0 + tl.arange(0, BLOCK_J)[None, :]
            member = j < last[:, None]
            share = tl.load(scratch_ptr + S + j, mask=member, other=0.0)
            if SFT >= 0:
                is_chosen = tl.load(sequence_ptr + 4 * S + j, mask=member, other=0.0) == 2.0
                nll = -tl.load(sequence_ptr + S + j, mask=is_chosen, other=0.0)
                if SFT == MEAN:
                    nll = nll / tl.maximum(tl.load(lengths_ptr + j, mask=is_chosen, other=1), 1).to(tl.float32)
                elif SFT == TOKENS:
                    nll = nll * per_token
                share += sft_weight * nll
            group_loss += tl.sum(share, axis=1)
        tl.store(losses_ptr + g, group_loss, mask=live)
        loss += tl.sum(tl.where(live, group_loss, 0.0), axis=0)
    tl.store(loss_ptr, loss * factor)
    if HAS_TOKENS and broken > 0:  # no sequence covers the tokens: no coefficient may pass for a number
        for t0 in range(0, N, BLOCK_S * BLOCK_T):
            token = t0 + tl.arange(0, BLOCK_S * BLOCK_T)
            tl.store(coef_ptr + token, float("nan"), mask=token < N)
        tl.debug_barrier()

    # 5. dL/dl_i, spread over the scored tokens.
    for s0 in range(0, S, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        live = s < S
        count = tl.load(lengths_ptr + s, mask=live, other=1)
        coef = tl.load(scratch_ptr + 2 * S + s, mask=live, other=0.0) * beta
        if AVERAGE:
            coef = coef / tl.maximum(count, 1).to(tl.float32)
        if SFT >= 0:
            pull = tl.where(tl.load(sequence_ptr + 4 * S + s, mask=live, other=0.0) == 2.0, sft_weight, 0.0)
            if SFT == MEAN:
                pull = pull / tl.maximum(count, 1).to(tl.float32)
            elif SFT == TOKENS:
                pull = pull * per_token
            coef -= pull
        coef = coef * factor
        tl.store(sequence_ptr + 3 * S + s, coef, mask=live)
        if HAS_TOKENS:
            start, end, bad = _bounds(s, cu_seqlens_ptr, S, N, T, PACKED, live)
            longest = tl.max(end - start, axis=0)
            for t0 in range(0, longest, BLOCK_T):
                token = (start[:, None] + t0 + tl.arange(0, BLOCK_T)[None, :]).to(tl.int64)
                inside = token < end[:, None]
                label = tl.load(labels_ptr + token, mask=inside, other=0)
                tl.store(coef_ptr + token, tl.where(label == ignore_index, 0.0, coef[:, None]), mask=inside)


_DISTANCES = {"squared": 0, "backward_kl": 1, "forward_kl": 2}
_COMPARISONS = {"listwise": 0, "pairwise": 1, "pointwise": 2}
_SFT = {"sum": 0, "mean": 1, "tokens": 2}


def _target_settings(objective: RPOObjective) -> dict[str, float]:
    """The kind of target, its gap and the label of the first response."""
    if objective.label is not None:
        return {"TARGET": 2, "target": objective.label_gap, "label_of_first": float(objective.label)}
    if isinstance(objective.target, str):
        return {"TARGET": 0 if objective.target == "rewards" else 3, "target": 0.0, "label_of_first": 0.0}
    return {"TARGET": 1, "target": float(objective.target), "label_of_first": 0.0}


def preference_forward(
    logps: torch.Tensor,
    objective: RPOObjective,
    *,
    labels: torch.Tensor | None,
    ignore_index: int,
    sequences: int,
    group_size: int,
    lengths: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    cu_groups: torch.Tensor | None,
    ref_logps: torch.Tensor | None,
    ref_per_token: bool,
    ref_weights: torch.Tensor | None,
    rewards: torch.Tensor | None,
    normalizer: torch.Tensor | None,
    sft_share: torch.Tensor | None,
    mean: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The group pass over log-probabilities of tokens ``[N]`` (``labels`` given) or of sequences ``[S]``, all fp32.

    Returns the loss ``[]``, losses ``[G]``, ``[5, S]`` (implicit rewards, log-probabilities, targets, dL/dlogps and roles of
    sequences: 0 dropped, 1 counted, 2 counted and chosen), lengths int32 ``[S]`` and dL/dlogps of tokens ``[N]`` (empty
    without labels). ``ref_logps`` is ``[R, N]`` if ``ref_per_token``, else ``[R, S]``; ``ref_weights`` ``[R]`` or ``[R, G]``. ``normalizer`` divides
    the sum of losses in place of the mean, and ``sft_share`` is (counted groups) / (tokens of their chosen responses) of a
    batch of which this call sees a part.
    """
    S, has_tokens = sequences, labels is not None
    N = logps.numel() if has_tokens else 0
    G = S // group_size if cu_groups is None else cu_groups.numel() - 1
    device = logps.device
    loss = torch.empty((), dtype=torch.float32, device=device)
    losses = torch.empty(G, dtype=torch.float32, device=device)
    by_sequence = torch.empty((5, S), dtype=torch.float32, device=device)
    counts = torch.empty(S, dtype=torch.int32, device=device)
    coef = torch.empty(N, dtype=torch.float32, device=device)
    scratch = torch.empty((3, S), dtype=torch.float32, device=device)

    weight_strides = (0, 0)
    if ref_weights is not None:
        weight_strides = (ref_weights.stride(0), ref_weights.stride(1) if ref_weights.dim() == 2 else 0)
    block_t = min(1024, max(16, triton.next_power_of_2(triton.cdiv(N, S)))) if has_tokens else 1
    block_j = 8 if cu_groups is not None else min(8, triton.next_power_of_2(group_size))
    _preference_kernel[(1,)](
        logps, labels, lengths, cu_seqlens, cu_groups, ref_logps, ref_weights, rewards, normalizer, sft_share,
        loss, losses, by_sequence, counts, coef, scratch,
        N, S, G, N // S, group_size, 1 if ref_logps is None else ref_logps.shape[0],
        *weight_strides, G.bit_length(), ignore_index,
        objective.beta, objective.eta, objective.margin, objective.scale,
        sft_weight=objective.sft_weight,
        **_target_settings(objective),
        DISTANCE=_DISTANCES[objective.distance],
        COMPARISON=_COMPARISONS[objective.comparison],
        CROSS_ENTROPY=objective.cross_entropy,
        LEAVE_ONE_OUT=objective.leave_one_out,
        AVERAGE=objective.average,
        REF=0 if ref_logps is None else 2 if ref_per_token else 1,
        HARMONIC=objective.reference == "harmonic",
        SFT=_SFT[objective.sft_normalizer] if objective.sft_weight > 0 else -1,
        HAS_TOKENS=has_tokens,
        HAS_LENGTHS=lengths is not None,
        PACKED=cu_seqlens is not None,
        RAGGED=cu_groups is not None,
        HAS_WEIGHTS=ref_weights is not None,
        HAS_NORMALIZER=normalizer is not None,
        HAS_SFT_SHARE=sft_share is not None,
        IS_MEAN=mean,
        BLOCK_S=max(1, 4096 // block_t) if has_tokens else 512,
        BLOCK_T=block_t,
        BLOCK_I=1024 // block_j,
        BLOCK_J=block_j,
        num_warps=8,
    )  # fmt: skip
    return loss, losses, by_sequence, counts, coef
