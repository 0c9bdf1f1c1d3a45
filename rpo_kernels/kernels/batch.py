"""Data shared by the phases of the group pass: pointers, sizes, an objective, and flags."""

from typing import NamedTuple

import triton.language as tl

# codes of flags
LISTWISE, PAIRWISE, POINTWISE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
REWARDS, GAP, LABEL, SOFTMAX = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
SUM, MEAN, TOKENS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SEQUENCE_REF, TOKEN_REF = tl.constexpr(1), tl.constexpr(2)
# Rows of [5, S] (`inputs.PerSequence`) and of [2, S]. Their addresses are computed from the first
# row's where they are used, which takes fewer registers than one pointer each.
IMPLICIT, LOGPS, TARGETS, DLOGPS, ROLES = (tl.constexpr(row) for row in range(5))
SHARE, SLOPE = tl.constexpr(0), tl.constexpr(1)  # share of the loss; dL/ds


class Flags(NamedTuple):
    distance: int  # code of the distance
    lists: bool  # whether softmaxes over the group are compared
    comparison: int
    target: int
    cross_entropy: bool
    leave_one_out: bool
    average: bool
    ref: int  # 0: no reference
    harmonic: bool
    sft: int  # -1: none
    has_tokens: bool
    has_lengths: bool
    packed: bool
    ragged: bool
    has_weights: bool
    has_normalizer: bool
    has_sft_share: bool
    has_group_weights: bool
    is_mean: bool
    block_s: int  # tile of sequences, and of their tokens
    block_t: int
    block_i: int  # tile of responses, and of their partners
    block_j: int


class Pointers(NamedTuple):
    """The pointers that `_group_pass_kernel` documents."""

    logps: tl.tensor
    labels: tl.tensor
    lengths_in: tl.tensor
    cu_seqlens: tl.tensor
    cu_groups: tl.tensor
    ref_logps: tl.tensor
    ref_weights: tl.tensor
    group_weights: tl.tensor
    given: tl.tensor  # explicit rewards
    lengths: tl.tensor
    coef: tl.tensor
    sequence: tl.tensor  # [5, S]
    scratch: tl.tensor  # [2, S]


class Sizes(NamedTuple):
    N: tl.tensor  # tokens
    S: tl.tensor  # sequences
    G: tl.tensor  # groups
    T: tl.tensor  # tokens per sequence, if sequences are rows
    K: tl.tensor  # responses per group, if all groups have the same
    R: tl.tensor  # references
    weight_stride_r: tl.tensor
    weight_stride_g: tl.tensor
    group_steps: tl.tensor  # steps of a bisection over the groups
    ignore_index: tl.tensor


class Numbers(NamedTuple):
    """The numbers of an objective."""

    beta: tl.tensor
    eta: tl.tensor
    margin: tl.tensor
    scale: tl.tensor
    target: tl.tensor
    label_of_first: tl.tensor
    sft_weight: tl.tensor
