"""Comparison of the responses of a group: shares of the loss, slopes in implicit rewards."""

import triton
import triton.language as tl

from .batch import (
    GAP,
    IMPLICIT,
    LABEL,
    LISTWISE,
    POINTWISE,
    REWARDS,
    ROLES,
    SHARE,
    SLOPE,
    SOFTMAX,
    TARGETS,
)
from .distances import distance_of_gap, distance_of_outcome, distance_pull, gap_of, labelled
from .primitives import softplus
from .sequences import bounds_of_group, group_of


@triton.jit
def _target(j, first, p, o, mask, FLAGS: tl.constexpr):
    """Target t_j of response j in the group that begins at `first`."""
    if FLAGS.target == REWARDS or FLAGS.target == SOFTMAX:
        return o.eta * tl.load(p.given + j, mask=mask, other=0.0)
    else:
        return tl.where(j == first, 0.5 * o.target, -0.5 * o.target)


@triton.jit
def _hardened(t, top):
    """Targets of a group whose largest is infinite: 0 for the largest, -inf for the others."""
    return tl.where(tl.abs(top) == float("inf"), tl.where(t == top, 0.0, float("-inf")), t)


@triton.jit
def compare_responses(p, n, o, FLAGS: tl.constexpr):
    """Phase 2: compare responses i with their partners j; write share of the loss, dL/ds_i, role.

    Returns the number of invalid groups.
    """
    BLOCK_I: tl.constexpr = FLAGS.block_i
    BLOCK_J: tl.constexpr = FLAGS.block_j
    broken = 0
    if FLAGS.ragged:  # counted by group: an invalid one may have no sequence
        for g0 in range(0, n.G, BLOCK_I):
            g = g0 + tl.arange(0, BLOCK_I)
            first, last, bad = bounds_of_group(g, p, n, FLAGS, g < n.G)
            broken += tl.sum(bad.to(tl.int32), axis=0)
    for i0 in range(0, n.S, BLOCK_I):
        i = i0 + tl.arange(0, BLOCK_I)
        live = i < n.S
        g = group_of(i, p, n, FLAGS)
        first, last, _ = bounds_of_group(g, p, n, FLAGS, live & (g < n.G))
        members = tl.max(last - first, axis=0)
        ti = _target(i, first, p, o, live, FLAGS)
        ni = tl.load(p.lengths + i, mask=live, other=0)

        count = tl.zeros([BLOCK_I], tl.int32)
        top_t = tl.full([BLOCK_I], float("-inf"), tl.float32)
        chosen = tl.full([BLOCK_I], 2147483647, tl.int32)
        nans = tl.zeros([BLOCK_I], tl.int32)
        for k0 in range(0, members, BLOCK_J):
            j = first[:, None] + k0 + tl.arange(0, BLOCK_J)[None, :]
            partner = j < last[:, None]
            partner = partner & (tl.load(p.lengths + j, mask=partner, other=0) > 0)
            count += tl.sum(partner.to(tl.int32), axis=1)
            if FLAGS.target != LABEL:
                t = _target(j, first[:, None], p, o, partner, FLAGS)
                nans += tl.sum((partner & (t != t)).to(tl.int32), axis=1)
                t = tl.where(t != t, float("inf"), t)  # chosen, so that the group counts
                t_block = tl.max(tl.where(partner, t, float("-inf")), axis=1)
                where_top = tl.min(
                    tl.where(partner & (t == t_block[:, None]), j, 2147483647), axis=1
                )
                chosen = tl.where((t_block > top_t) | (chosen == 2147483647), where_top, chosen)
                top_t = tl.maximum(top_t, t_block)
        top_t = tl.where(nans > 0, float("nan"), top_t)
        if FLAGS.target == GAP or FLAGS.target == LABEL:
            chosen = first
        chosen_length = tl.load(p.lengths + chosen, mask=live & (chosen < n.S), other=0)
        if FLAGS.comparison == POINTWISE:
            counted = count >= 1
        else:
            counted = count >= 2
        if FLAGS.target == LABEL:
            counted = counted & (count == 2)
        counted = live & counted & (chosen_length > 0) & (ni > 0)
        kf = tl.maximum(count, 2).to(tl.float32)

        si = tl.load(p.sequence + IMPLICIT * n.S + i, mask=live, other=0.0)
        si -= tl.where(i == chosen, o.margin, 0.0)
        tl.store(p.sequence + TARGETS * n.S + i, tl.where(ni > 0, ti, 0.0), mask=live)

        # log-softmaxes of s and t over the group, each entry from the sum over the others: accurate
        # near 0
        top_s = tl.full([BLOCK_I], float("-inf"), tl.float32)
        sum_s = tl.zeros([BLOCK_I], tl.float32)
        sum_t = tl.zeros([BLOCK_I], tl.float32)
        if FLAGS.lists or FLAGS.target == SOFTMAX:
            base_t = tl.where(tl.abs(top_t) == float("inf"), 0.0, top_t)
            for k0 in range(0, members, BLOCK_J):
                j = first[:, None] + k0 + tl.arange(0, BLOCK_J)[None, :]
                partner = j < last[:, None]
                partner = partner & (tl.load(p.lengths + j, mask=partner, other=0) > 0)
                s = tl.load(p.sequence + IMPLICIT * n.S + j, mask=partner, other=0.0) - tl.where(
                    j == chosen[:, None], o.margin, 0.0
                )
                t = _target(j, first[:, None], p, o, partner, FLAGS)
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
        if FLAGS.comparison == POINTWISE:
            kf = tl.maximum(count, 1).to(tl.float32)
            weight = tl.full([BLOCK_I], 1.0, tl.float32)
            if FLAGS.target == SOFTMAX:
                ti = tl.log(kf) + log_q
                weight += kf * tl.exp(log_q)
                tl.store(p.sequence + TARGETS * n.S + i, tl.where(ni > 0, ti, 0.0), mask=live)
            value, derivative = distance_of_gap(si, ti, FLAGS)
            share = weight * value / kf
            slope = weight * derivative / kf
        else:
            for k0 in range(0, members, BLOCK_J):
                j = first[:, None] + k0 + tl.arange(0, BLOCK_J)[None, :]
                partner = j < last[:, None]
                partner = (
                    partner
                    & (tl.load(p.lengths + j, mask=partner, other=0) > 0)
                    & (j != i[:, None])
                )
                s = tl.load(p.sequence + IMPLICIT * n.S + j, mask=partner, other=0.0) - tl.where(
                    j == chosen[:, None], o.margin, 0.0
                )
                t = _target(j, first[:, None], p, o, partner, FLAGS)
                d = si[:, None] - s
                tau = gap_of(ti[:, None] + tl.zeros_like(t), t)
                if FLAGS.target == LABEL:
                    label = tl.where(
                        i[:, None] == first[:, None], o.label_of_first, 1.0 - o.label_of_first
                    )
                    value, pull = labelled(d, label, FLAGS.cross_entropy)
                elif FLAGS.lists:
                    log_p_j = s - lse_s[:, None]
                    log_q_j = _hardened(t, top_t[:, None]) - lse_t[:, None]
                    value = tl.zeros_like(d)
                    pull = distance_pull(
                        log_p[:, None], log_q[:, None], log_p_j, log_q_j, d - tau, FLAGS
                    )
                else:
                    value, pull = distance_of_gap(d, tau, FLAGS)
                share += tl.sum(tl.where(partner, value, 0.0), axis=1)
                slope += tl.sum(tl.where(partner, pull, 0.0), axis=1)
            if FLAGS.target == LABEL:
                share *= 0.5
            elif FLAGS.lists:
                share = distance_of_outcome(log_p, log_q, FLAGS)
            elif FLAGS.comparison == LISTWISE:
                norm = 1.0 / ((kf - 1.0) * (kf - 1.0))
                if not FLAGS.leave_one_out:
                    norm *= (kf - 1.0) / kf
                share *= 0.5 * norm
                slope *= norm
            else:
                share *= 1.0 / (kf * (kf - 1.0))
                slope *= 2.0 / (kf * (kf - 1.0))
        tl.store(p.scratch + SHARE * n.S + i, tl.where(counted, o.scale * share, 0.0), mask=live)
        tl.store(p.scratch + SLOPE * n.S + i, tl.where(counted, o.scale * slope, 0.0), mask=live)
        role = tl.where(counted, tl.where(i == chosen, 2.0, 1.0), 0.0)
        tl.store(p.sequence + ROLES * n.S + i, role, mask=live)
    return broken
