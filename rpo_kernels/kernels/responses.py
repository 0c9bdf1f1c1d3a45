"""Responses of a group against each other: their share of the loss, and its derivative in their
implicit rewards.
"""

import triton
import triton.language as tl

from .distances import (
    BACKWARD_KL,
    FORWARD_KL,
    GAP,
    LABEL,
    LISTWISE,
    POINTWISE,
    REWARDS,
    SOFTMAX,
    SQUARED,
    bernoulli,
    entropy_term,
    exp_difference,
    gap_of,
    kl_term,
    labelled,
)
from .primitives import softplus
from .sequences import bounds_of, group_of


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


@triton.jit
def compare_responses(
    cu_groups_ptr,
    rewards_ptr,
    sequence_ptr,
    lengths_ptr,
    scratch_ptr,
    S,
    G,
    K,
    group_steps,
    eta,
    margin,
    scale,
    target,
    label_of_first,
    DISTANCE: tl.constexpr,
    COMPARISON: tl.constexpr,
    TARGET: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    LEAVE_ONE_OUT: tl.constexpr,
    RAGGED: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Phase 2: responses i against their partners j: share of the loss, dL/ds_i, role.

    Returns how many groups are unusable.
    """
    broken = 0
    if RAGGED:  # counted by group: no sequence may belong to a broken one
        for g0 in range(0, G, BLOCK_I):
            g = g0 + tl.arange(0, BLOCK_I)
            first, last, bad = bounds_of(g, cu_groups_ptr, G, S, K, RAGGED, g < G)
            broken += tl.sum(bad.to(tl.int32), axis=0)
    for i0 in range(0, S, BLOCK_I):
        i = i0 + tl.arange(0, BLOCK_I)
        live = i < S
        g = group_of(i, cu_groups_ptr, G, K, group_steps, RAGGED)
        first, last, _ = bounds_of(g, cu_groups_ptr, G, S, K, RAGGED, live & (g < G))
        members = tl.max(last - first, axis=0)
        ti = _target(i, first, rewards_ptr, eta, target, live, TARGET)
        ni = tl.load(lengths_ptr + i, mask=live, other=0)

        count = tl.zeros([BLOCK_I], tl.int32)
        top_t = tl.full([BLOCK_I], float("-inf"), tl.float32)
        chosen = tl.full([BLOCK_I], 2147483647, tl.int32)
        nans = tl.zeros([BLOCK_I], tl.int32)
        for k0 in range(0, members, BLOCK_J):
            j = first[:, None] + k0 + tl.arange(0, BLOCK_J)[None, :]
            partner = j < last[:, None]
            partner = partner & (tl.load(lengths_ptr + j, mask=partner, other=0) > 0)
            count += tl.sum(partner.to(tl.int32), axis=1)
            if TARGET != LABEL:
                t = _target(j, first[:, None], rewards_ptr, eta, target, partner, TARGET)
                nans += tl.sum((partner & (t != t)).to(tl.int32), axis=1)
                t = tl.where(t != t, float("inf"), t)  # the chosen one, so that the group counts
                t_block = tl.max(tl.where(partner, t, float("-inf")), axis=1)
                where_top = tl.min(
                    tl.where(partner & (t == t_block[:, None]), j, 2147483647), axis=1
                )
                chosen = tl.where((t_block > top_t) | (chosen == 2147483647), where_top, chosen)
                top_t = tl.maximum(top_t, t_block)
        top_t = tl.where(nans > 0, float("nan"), top_t)
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

        si = tl.load(sequence_ptr + i, mask=live, other=0.0)
        si -= tl.where(i == chosen, margin, 0.0)
        tl.store(sequence_ptr + 2 * S + i, tl.where(ni > 0, ti, 0.0), mask=live)

        # Log-softmaxes of s and t over the group, each own entry by the sum over the others: full
        # digits near 0.
        top_s = tl.full([BLOCK_I], float("-inf"), tl.float32)
        sum_s = tl.zeros([BLOCK_I], tl.float32)
        sum_t = tl.zeros([BLOCK_I], tl.float32)
        if (
            COMPARISON == LISTWISE and DISTANCE != SQUARED and TARGET != LABEL
        ) or TARGET == SOFTMAX:
            base_t = tl.where(tl.abs(top_t) == float("inf"), 0.0, top_t)
            for k0 in range(0, members, BLOCK_J):
                j = first[:, None] + k0 + tl.arange(0, BLOCK_J)[None, :]
                partner = j < last[:, None]
                partner = partner & (tl.load(lengths_ptr + j, mask=partner, other=0) > 0)
                s = tl.load(sequence_ptr + j, mask=partner, other=0.0) - tl.where(
                    j == chosen[:, None], margin, 0.0
                )
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
            lse_s = tl.maximum(si, tl.where(odds_s > 0.0, top_s + tl.log(sum_s), si)) + softplus(
                -tl.abs(odds_s)
            )
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
                partner = (
                    partner
                    & (tl.load(lengths_ptr + j, mask=partner, other=0) > 0)
                    & (j != i[:, None])
                )
                s = tl.load(sequence_ptr + j, mask=partner, other=0.0) - tl.where(
                    j == chosen[:, None], margin, 0.0
                )
                t = _target(j, first[:, None], rewards_ptr, eta, target, partner, TARGET)
                d = si[:, None] - s
                tau = gap_of(ti[:, None] + tl.zeros_like(t), t)
                if TARGET == LABEL:
                    label = tl.where(
                        i[:, None] == first[:, None], label_of_first, 1.0 - label_of_first
                    )
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
        tl.store(scratch_ptr + i, tl.where(counted, scale * share, 0.0), mask=live)
        tl.store(scratch_ptr + S + i, tl.where(counted, scale * slope, 0.0), mask=live)
        role = tl.where(counted, tl.where(i == chosen, 2.0, 1.0), 0.0)
        tl.store(sequence_ptr + 4 * S + i, role, mask=live)
    return broken
