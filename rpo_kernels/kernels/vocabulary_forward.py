"""The vocabulary pass forward: one program per row, or per part of a row.

    z = post * y,   y = x               (post = logit_scale / temperature)
                    y = tanh(pre * x)   (pre = logit_scale / softcap, post = softcap / temperature)

Exponentials are powers of two of a single multiply-add, t = y * scale2 - shift, where shift is the
label's exponent, rounded to an integer. It is known before the row is read, so there is no running
maximum; parts of a row that several programs read are combined by addition; and log p keeps its
digits whether p is close to 1 or to 0. If the sum of a part is too large for that (another logit
exceeds the label's by 33 nats), the part is read twice more: for its maximum, and relative to it.

A shard (one rank's columns of a row) stores its sums; `shards` combines them as parts are combined.
If the label is on another shard, or at -inf, shift is 0, and a part whose sum is close to 0 is read
again, too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..inputs import LogitTransform
from .launch import MAX_PROGRAMS, arch_of, launch_settings, on_device_of, part_width, splits_rows
from .primitives import ANYWHERE, LN2, LOG2E, expm1, softplus, split_exponent, tanh
from .rows import (
    RUNTIME,
    Columns,
    RowFlags,
    ToExponents,
    largest_exponent,
    row_offset,
    sums_of_exponentials,
)

LEAST = tl.constexpr(-1e30)  # below any exponent: that of an empty sum


class Sum(NamedTuple):
    """A sum of e^z over columns: total * 2^shift."""

    shift: tl.tensor
    total: tl.tensor
    moment: tl.tensor  # sum of the terms of `total`, times their log2


class Outputs(NamedTuple):
    """The pointers that `_vocabulary_forward_kernel` documents."""

    logps: tl.tensor
    lse: tl.tensor
    entropy: tl.tensor
    N: tl.tensor


@triton.jit
def _integer(t):
    """Round t to an integer; 0 for NaN and infinities.

    At most 2^23 in magnitude: beyond it, a fused y * scale2 - shift is the rounding error of the
    product, up to half an ulp, for which a logsumexp has no digits.
    """
    near = tl.minimum(tl.maximum(tl.floor(t + 0.5), -8388608.0), 8388608.0)
    return tl.where(tl.abs(t) < float("inf"), near, 0.0)


@triton.jit
def merge(a, b):
    """Add two sums; their factors are powers of two, and 1 if both are relative to the label.

    An empty sum (all columns at -inf) leaves the exponent of the other one.
    """
    shift_b = tl.where(b.total == 0.0, a.shift, b.shift)
    top = tl.maximum(a.shift, shift_b)
    of_a, of_b = a.shift - top, shift_b - top
    moment = tl.exp2(of_a) * tl.fma(of_a, a.total, a.moment)
    moment += tl.exp2(of_b) * tl.fma(of_b, b.total, b.moment)
    return Sum(top, tl.exp2(of_a) * a.total + tl.exp2(of_b) * b.total, moment)


@triton.jit
def finish(others, y_label, scale2):
    """Return (log p, integer and fraction of log2 of the sum including the label's, entropy)."""
    shift, total, moment = others
    t_label = tl.fma(y_label, scale2, -shift)
    exponent, mantissa = split_exponent(total)
    log2_mantissa = tl.log2(mantissa)
    odds = LN2 * (exponent + log2_mantissa - t_label)  # logsumexp of the other columns - z_label
    # the other columns are all below -2^23
    lost = (total == 0.0) & (t_label < -1.0) & (t_label > float("-inf"))
    odds = tl.where((y_label == float("inf")) | lost, float("nan"), odds)
    logp = -softplus(odds)
    log_p_not = -softplus(-odds)
    whole = tl.where(odds > 0.0, exponent, 0.0)
    rest = tl.where(odds > 0.0, log2_mantissa - log_p_not * LOG2E, t_label - logp * LOG2E)
    carry = _integer(rest)
    # H = H(label or not) + p(not) H(others), each term without cancellation
    rest_moment = tl.fma(-exponent, total, moment)  # relative to the sum, not to the label
    h_others = LN2 * tl.where(total == 0.0, 0.0, log2_mantissa - rest_moment / total)
    p_not = -expm1(logp)
    h_label = tl.where(logp == float("-inf"), 0.0, -tl.exp(logp) * logp)
    h_not = tl.where(p_not == 0.0, 0.0, p_not * (h_others - log_p_not))
    return logp, shift + whole + carry, rest - carry, h_label + h_not


@triton.jit
def label_exponent(y_label, scale2):
    """Return the exponent that the sums of a row are relative to at first.

    It is LEAST if the label is at -inf or on another shard.
    """
    t = y_label * scale2
    return tl.where(t == float("-inf"), LEAST, _integer(t))


@triton.jit
def _load_label(row_ptr, label, V, pre, FLAGS: tl.constexpr):
    """Return (column or -1, y): y is NaN for an invalid label, -inf for one on another shard."""
    inside = (label >= 0) & (label < V)
    y = tl.load(row_ptr + label, mask=inside, other=float("nan")).to(tl.float32)
    if FLAGS.has_softcap:
        y = tanh(pre * y)
    if FLAGS.is_shard:
        y = tl.where(label == -1, float("-inf"), y)
    return tl.where(inside, label, -1).to(tl.int32), y


@triton.jit(do_not_specialize=[*RUNTIME, "pieces"], do_not_specialize_on_alignment=ANYWHERE)
def _vocabulary_forward_kernel(
    logits_ptr,  # in   [N, V] any float, last stride 1
    labels_ptr,  # in   [N] int
    logps_ptr,  # out  [N] fp32, log p(label); 0 where ignored, NaN for a label outside [0, V)
    lse_ptr,  # out  [2, N] fp32, log2 of the sum of e^z as (integer, fraction); 0 where ignored
    entropy_ptr,  # out  [N] fp32, or unused
    parts_ptr,  # out  [N, parts, 3] fp32, (shift, total, moment), in place of these if pieces > 1
    N,
    V,
    inner,
    stride_outer,
    stride_inner,
    part_width,
    pieces,  # programs of a row: 1, or one for each part
    ignore_index,
    pre,
    post,
    FLAGS: tl.constexpr,
):
    """Cost: one read of each scored row, one exp2 per element; nothing for an ignored row.

    A shard's outputs are y of the label (-inf if elsewhere), (shift, total), and moment.
    """
    out = Outputs(logps_ptr, lse_ptr, entropy_ptr, N)
    parts = (V + part_width - 1) // part_width
    scale2 = post * LOG2E
    for item in range(tl.program_id(0), N * pieces, tl.num_programs(0)):
        row = item // pieces
        label = tl.load(labels_ptr + row)
        if label != ignore_index:
            row_ptr = logits_ptr + row_offset(row, inner, stride_outer, stride_inner)
            column, y_label = _load_label(row_ptr, label, V, pre, FLAGS)
            exponent = label_exponent(y_label, scale2)
            alone = exponent == LEAST  # the label has no exponent
            shift = tl.where(alone, 0.0, exponent)
            others = Sum(exponent, 0.0, 0.0)
            part = item - row * pieces
            end = parts if pieces == 1 else part + 1
            part_shift = shift
            retried = False
            while part < end:
                first = part * part_width
                width = tl.minimum(part_width, V - first)
                columns = Columns(row_ptr + first, width, column - first)
                total, moment = sums_of_exponentials(
                    columns, ToExponents(pre, scale2, part_shift), FLAGS
                )
                out_of_range = (total != total) | (alone & (total < 2.0**-80))
                if out_of_range & (not retried):
                    peak = largest_exponent(columns, ToExponents(pre, scale2, 0.0), FLAGS)
                    part_shift = _integer(peak)
                    retried = True
                else:
                    others = merge(others, Sum(part_shift, total, moment))
                    part_shift = shift
                    retried = False
                    part += 1
            if pieces == 1:
                _store(out, row, others, y_label, scale2, FLAGS)
            else:
                tl.store(parts_ptr + item * 3, others.shift)
                tl.store(parts_ptr + item * 3 + 1, others.total)
                tl.store(parts_ptr + item * 3 + 2, others.moment)
        elif pieces == 1:
            _store_ignored(out, row, FLAGS)


@triton.jit
def _store(out, row, others, y_label, scale2, FLAGS: tl.constexpr):
    if FLAGS.is_shard:
        logp = y_label
        whole, fraction, entropy = others
    else:
        logp, whole, fraction, entropy = finish(others, y_label, scale2)
    tl.store(out.logps + row, logp)
    tl.store(out.lse + row, whole)
    tl.store(out.lse + out.N + row, fraction)
    if FLAGS.has_entropy:
        tl.store(out.entropy + row, entropy)


@triton.jit
def _store_ignored(out, row, FLAGS: tl.constexpr):
    tl.store(out.logps + row, 0.0)
    tl.store(out.lse + row, 0.0)
    tl.store(out.lse + out.N + row, 0.0)
    if FLAGS.has_entropy:
        tl.store(out.entropy + row, 0.0)


@triton.jit(do_not_specialize=[*RUNTIME, "parts"], do_not_specialize_on_alignment=ANYWHERE)
def _vocabulary_merge_kernel(
    logits_ptr,  # in   [N, V] any float, last stride 1: the label's column
    labels_ptr,  # in   [N] int
    parts_ptr,  # in   [N, parts, 3] fp32
    logps_ptr,  # out  [N] fp32
    lse_ptr,  # out  [2, N] fp32
    entropy_ptr,  # out  [N] fp32, or unused
    N,
    V,
    inner,
    stride_outer,
    stride_inner,
    parts,
    ignore_index,
    pre,
    post,
    FLAGS: tl.constexpr,
):
    """Finish rows that several programs have read in parts.

    Cost: a few numbers per row.
    """
    out = Outputs(logps_ptr, lse_ptr, entropy_ptr, N)
    row = tl.program_id(0)
    label = tl.load(labels_ptr + row)
    scale2 = post * LOG2E
    if label != ignore_index:
        row_ptr = logits_ptr + row_offset(row, inner, stride_outer, stride_inner)
        _, y_label = _load_label(row_ptr, label, V, pre, FLAGS)
        others = Sum(label_exponent(y_label, scale2), 0.0, 0.0)
        for item in range(row * parts, row * parts + parts):
            ptr = parts_ptr + item * 3
            others = merge(others, Sum(tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2)))
        _store(out, row, others, y_label, scale2, FLAGS)
    else:
        _store_ignored(out, row, FLAGS)


def vocabulary_forward(
    logits: torch.Tensor,
    labels: torch.Tensor,
    transform: LogitTransform,
    entropy: bool = False,
    out: tuple | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return log p(label) `[N]`, logsumexp `[2, N]` and, on request, entropy `[N]`, fp32.

    Args:
        logits: `[outer, inner, V]`, N = outer * inner rows.
        labels: `[N]`.
        transform: the map from logits to z.
        entropy: whether to compute entropies.
        out: for a shard of the columns, what the three are written to (see `shard_statistics`).

    The logsumexp of z is (integer, fraction) in units of log 2, because their sum would round away
    the digits of small logits.
    """
    V, N = logits.shape[2], labels.numel()
    is_shard = out is not None
    if out is None:
        logps = logits.new_empty(N, dtype=torch.float32)
        out = logps, logps.new_empty((2, N)), torch.empty_like(logps) if entropy else None
    if not N:
        return out
    pre, post = transform.factors
    settings = launch_settings("forward", V, logits.element_size(), arch_of(logits.device))
    width = part_width(V, settings.tile)
    parts = -(-V // width)
    pieces = parts if splits_rows(N, logits.device) else 1
    # a tensor in any case: without one, Triton would compile another kernel
    partial = out[0] if pieces == 1 else out[0].new_empty((N, parts, 3))
    rows = N, V, logits.shape[1], *logits.stride()[:2]
    flags = RowFlags(
        has_softcap=transform.softcap > 0,
        has_entropy=entropy,
        lanes=settings.lanes,
        vec=settings.vec,
        stages=settings.num_stages,
        is_shard=is_shard,
    )
    plain = not (flags.has_softcap or entropy)
    with on_device_of(logits):
        _vocabulary_forward_kernel[(min(N * pieces, MAX_PROGRAMS),)](
            logits,
            labels,
            *out,
            partial,
            *rows,
            width,
            pieces,
            transform.ignore_index,
            pre,
            post,
            FLAGS=flags,
            **settings.compiler[plain],
        )
        if pieces > 1:
            _vocabulary_merge_kernel[(N,)](
                logits,
                labels,
                partial,
                *out,
                *rows,
                parts,
                transform.ignore_index,
                pre,
                post,
                FLAGS=flags,
                num_warps=1,
            )
    return out


def shard_statistics(
    logits: torch.Tensor, labels: torch.Tensor, transform: LogitTransform, entropy: bool = False
) -> torch.Tensor:
    """Compute what `shards.combine` needs of one shard of the columns, fp32 `[3 or 4, N]`.

    The rows are the label's y (-inf for label -1, which is on another shard); and of the other
    columns an exponent, the sum of e^z relative to two to that power, and, with entropy, the sum of
    these terms times their log2. Labels are relative to the shard's first column.
    """
    statistics = torch.empty(
        (4 if entropy else 3, labels.numel()), dtype=torch.float32, device=logits.device
    )
    if logits.shape[2]:
        vocabulary_forward(
            logits, labels, transform, entropy, (statistics[0], statistics[1:3], statistics[3:])
        )
    else:
        statistics[1], statistics[2:] = LEAST.value, 0
        statistics[0] = torch.where(
            (labels == -1) | (labels == transform.ignore_index), -torch.inf, torch.nan
        )
    return statistics
