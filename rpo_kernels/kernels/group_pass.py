"""The group pass: from token log-probabilities to the loss and one coefficient per token.

A batch has about ten floats per group, so one program does all of it in one launch, in phases
separated by barriers: sums over sequences; each sequence's share of the loss and its coefficient;
the loss of each group; the coefficients of the tokens. Its time is that of reading N
log-probabilities, labels and references once: about 0.3 % of a vocabulary pass over N rows.

For every distance, the coefficient of response i is a sum over its partners j of an antisymmetric
function, so coefficients cancel over a group by construction:

    squared                  u_i - u_j
    backward KL, listwise    p_i q_j - q_i p_j
    forward KL, listwise     p_i p_j (u_i - u_j)
    Hellinger, listwise      2 sqrt(p_i p_j) (sqrt(p_i q_j) - sqrt(q_i p_j))
    pairwise                 dD[d || tau] / dd

with u = s - t, p = softmax(s), q = softmax(t), d = s_i - s_j, tau = t_i - t_j.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from ..inputs import Groups, Sequences
from ..objectives import RPOObjective
from . import batch
from .batch import (
    LOGPS,
    MEAN,
    ROLES,
    SEQUENCE_REF,
    SHARE,
    TOKEN_REF,
    TOKENS,
    Flags,
    Numbers,
    Pointers,
    Sizes,
)
from .launch import on_device_of
from .primitives import ANYWHERE
from .responses import compare_responses
from .sequences import bounds_of_group, spread_coefficients, sum_sequences


@triton.jit(
    do_not_specialize=[
        "N",
        "S",
        "G",
        "T",
        "K",
        "R",
        "weight_stride_r",
        "weight_stride_g",
        "group_steps",
        "ignore_index",
    ],
    do_not_specialize_on_alignment=ANYWHERE,
)
def _group_pass_kernel(
    logps_ptr,  # in   [N] fp32 of tokens, or [S] of sequences
    labels_ptr,  # in   [N] int (tokens), or unused
    lengths_in_ptr,  # in   [S] int (sequences), or unused
    cu_seqlens_ptr,  # in   [S+1] int32 (packed tokens), or unused
    cu_groups_ptr,  # in   [G+1] int32 (ragged groups), or unused
    ref_logps_ptr,  # in   [R, N] or [R, S] fp32, or unused
    ref_weights_ptr,  # in   [R] or [R, G] fp32, or unused (R = 1)
    group_weights_ptr,  # in   [G] fp32, or unused
    rewards_ptr,  # in   [S] fp32, or unused
    normalizer_ptr,  # in   [] fp32, or unused
    sft_share_ptr,  # in   [] fp32, counted groups / tokens of their chosen responses, or unused
    loss_ptr,  # out  [] fp32
    losses_ptr,  # out  [G] fp32
    sequence_ptr,  # out  [5, S] fp32, the rows of PerSequence
    lengths_ptr,  # out  [S] int32 (tokens), or unused
    coef_ptr,  # out  [N] fp32 (tokens), or unused
    scratch_ptr,  # tmp  [2, S] fp32: loss share, dL/ds
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
    FLAGS: tl.constexpr,
):
    """Cost: one read of logps and labels per reference, of references, and of labels again."""
    BLOCK_S: tl.constexpr = FLAGS.block_s
    BLOCK_T: tl.constexpr = FLAGS.block_t
    BLOCK_I: tl.constexpr = FLAGS.block_i
    BLOCK_J: tl.constexpr = FLAGS.block_j
    p = Pointers(
        logps_ptr,
        labels_ptr,
        lengths_in_ptr,
        cu_seqlens_ptr,
        cu_groups_ptr,
        ref_logps_ptr,
        ref_weights_ptr,
        group_weights_ptr,
        rewards_ptr,
        lengths_ptr,
        coef_ptr,
        sequence_ptr,
        scratch_ptr,
    )
    n = Sizes(N, S, G, T, K, R, weight_stride_r, weight_stride_g, group_steps, ignore_index)
    o = Numbers(beta, eta, margin, scale, target, label_of_first, sft_weight)
    broken = sum_sequences(p, n, o, FLAGS)
    tl.debug_barrier()
    broken += compare_responses(p, n, o, FLAGS)
    tl.debug_barrier()

    # counted groups, and scored tokens of their chosen responses
    groups = 0
    tokens = 0
    for i0 in range(0, S, BLOCK_I * BLOCK_J):
        i = i0 + tl.arange(0, BLOCK_I * BLOCK_J)
        is_chosen = tl.load(p.sequence + ROLES * n.S + i, mask=i < S, other=0.0) == 2.0
        groups += tl.sum(is_chosen.to(tl.int32), axis=0)
        tokens += tl.sum(tl.load(p.lengths + i, mask=is_chosen, other=0), axis=0)
    factor = 1.0
    if FLAGS.has_normalizer:
        factor = 1.0 / tl.load(normalizer_ptr)
    elif FLAGS.is_mean:
        factor = tl.where(groups > 0, 1.0 / tl.maximum(groups, 1).to(tl.float32), 0.0)
    if broken > 0:
        factor = float("nan")
    if FLAGS.has_sft_share:
        per_token = tl.load(sft_share_ptr)
    else:
        counted = groups.to(tl.float32)  # type: ignore[attr-defined]  # a tensor of the language
        per_token = counted / tl.maximum(tokens, 1).to(tl.float32)

    # losses of groups, and their sum
    loss = 0.0
    for g0 in range(0, G, BLOCK_I):
        g = g0 + tl.arange(0, BLOCK_I)
        live = g < G
        first, last, _ = bounds_of_group(g, p, n, FLAGS, live)
        members = tl.max(last - first, axis=0)
        group_loss = tl.zeros([BLOCK_I], tl.float32)
        for k0 in range(0, members, BLOCK_J):
            j = first[:, None] + k0 + tl.arange(0, BLOCK_J)[None, :]
            member = j < last[:, None]
            share = tl.load(p.scratch + SHARE * n.S + j, mask=member, other=0.0)
            if FLAGS.sft >= 0:
                is_chosen = tl.load(p.sequence + ROLES * n.S + j, mask=member, other=0.0) == 2.0
                nll = -tl.load(p.sequence + LOGPS * n.S + j, mask=is_chosen, other=0.0)
                if FLAGS.sft == MEAN:
                    nll = nll / tl.maximum(tl.load(p.lengths + j, mask=is_chosen, other=1), 1).to(
                        tl.float32
                    )
                elif FLAGS.sft == TOKENS:
                    nll = nll * per_token
                share += sft_weight * nll
            group_loss += tl.sum(share, axis=1)
        if FLAGS.has_group_weights:
            group_loss *= tl.load(p.group_weights + g, mask=live, other=0.0)
        tl.store(losses_ptr + g, group_loss, mask=live)
        loss += tl.sum(tl.where(live, group_loss, 0.0), axis=0)
    tl.store(loss_ptr, loss * factor)
    # tokens outside of all sequences get no valid coefficient
    if FLAGS.has_tokens and broken > 0:
        for t0 in range(0, N, BLOCK_S * BLOCK_T):
            token = t0 + tl.arange(0, BLOCK_S * BLOCK_T)
            tl.store(coef_ptr + token, float("nan"), mask=token < N)
        tl.debug_barrier()

    spread_coefficients(p, n, o, per_token, factor, FLAGS)


@lru_cache
def _floats(objective: RPOObjective) -> tuple[float, ...]:
    """Return the numbers that the kernel takes of an objective, from beta to sft_weight."""
    target = objective.label_gap if objective.label is not None else objective.target
    numbers = (
        objective.beta,
        objective.eta,
        objective.margin,
        objective.scale,
        0.0 if isinstance(target, str) else target,
        objective.label or 0.0,
        objective.sft_weight,
    )
    return tuple(map(float, numbers))


@lru_cache
def _flags(objective: RPOObjective, ref: int, group_size: int, short: bool, **has: bool) -> Flags:
    """Return what the kernel is compiled for.

    `group_size` is 0 for ragged groups; `short` is for sequences of few tokens.
    """
    code = lambda name: getattr(batch, name.upper()).value
    kind = objective.target if isinstance(objective.target, str) else "gap"
    # two kernels for all lengths of sequences
    block_t = (64 if short else 1024) if has["has_tokens"] else 1
    # next power of two
    block_j = min(8, 1 << (group_size - 1).bit_length()) if group_size else 8
    is_listwise = objective.comparison == "listwise" and objective.label is None
    return Flags(
        distance=objective.rules.code,
        lists=is_listwise and objective.rules.softmax,
        comparison=code(objective.comparison),
        target=code(kind if objective.label is None else "label"),
        cross_entropy=objective.cross_entropy,
        leave_one_out=objective.leave_one_out,
        average=objective.average,
        ref=ref,
        harmonic=objective.reference == "harmonic",
        sft=code(objective.sft_normalizer) if objective.sft_weight > 0 else -1,
        ragged=not group_size,
        block_s=max(1, 4096 // block_t) if has["has_tokens"] else 512,
        block_t=block_t,
        block_i=1024 // block_j,
        block_j=block_j,
        **has,
    )


def group_pass(
    logps: torch.Tensor,
    labels: torch.Tensor | None,
    lengths: torch.Tensor | None,
    sequences: Sequences,
    groups: Groups,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the group pass over log-probabilities, fp32, of tokens `[N]` or of sequences `[S]`.

    Args:
        logps: `[N]` with labels, else `[S]`.
        labels: `[N]`, or None.
        lengths: `[S]`, scored tokens of sequences, if logps are those of sequences.
        sequences: the sequences of the tokens.
        groups: the groups of the sequences, their rewards and references.
        ignore_index: label of tokens that are not scored.

    Returns:
        loss `[]`, losses `[G]`, the rows `[5, S]` of `PerSequence`, lengths int32 `[S]`, and
        dL/dlogps of tokens `[N]` (empty without labels).
    """
    S, has_tokens, (objective,) = sequences.number, labels is not None, groups.objective.parts
    # the kernel takes no strides of these
    lengths, cu_seqlens, cu_groups = (
        None if x is None else x.contiguous()
        for x in (lengths, sequences.cu_seqlens, groups.cu_groups)
    )
    ref_logps, ref_weights = groups.ref_logps, groups.ref_weights
    N, G = logps.numel() if has_tokens else 0, groups.number(S)
    loss, losses, coef = logps.new_empty(()), logps.new_empty(G), logps.new_empty(N)
    by_sequence, scratch = logps.new_empty((5, S)), logps.new_empty((2, S))
    counts = logps.new_empty(S, dtype=torch.int32)

    weight_strides = (0, 0)
    if ref_weights is not None:
        weight_strides = (
            ref_weights.stride(0),
            ref_weights.stride(1) if ref_weights.dim() == 2 else 0,
        )
    R = 1 if ref_logps is None else ref_logps.shape[0]
    flags = _flags(
        objective,
        0 if ref_logps is None else (TOKEN_REF if groups.ref_per_token else SEQUENCE_REF).value,
        groups.group_size if cu_groups is None else 0,
        N <= 64 * S,
        has_tokens=has_tokens,
        has_lengths=lengths is not None,
        packed=cu_seqlens is not None,
        has_weights=ref_weights is not None,
        has_normalizer=groups.normalizer is not None,
        has_sft_share=groups.sft_share is not None,
        has_group_weights=groups.group_weights is not None,
        is_mean=groups.mean,
    )
    with on_device_of(logps):
        _group_pass_kernel[(1,)](
            logps,
            labels,
            lengths,
            cu_seqlens,
            cu_groups,
            ref_logps,
            ref_weights,
            groups.group_weights,
            groups.rewards,
            groups.normalizer,
            groups.sft_share,
            loss,
            losses,
            by_sequence,
            counts,
            coef,
            scratch,
            N,
            S,
            G,
            N // S,
            groups.group_size,
            R,
            *weight_strides,
            G.bit_length(),
            ignore_index,
            *_floats(objective),
            FLAGS=flags,
            num_warps=8,
            # fused, t_i - t_j and t_j - t_i could round differently, and coefficients would not
            # cancel
            enable_fp_fusion=False,
        )
    return loss, losses, by_sequence, counts, coef
