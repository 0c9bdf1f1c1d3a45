"""The vocabulary pass: rows of logits to token log-probabilities, and coefficients back to gradients of logits.

    z = post * y,   y = x                 (post = logit_scale / temperature)
                    y = tanh(pre * x)     (pre = logit_scale / softcap, post = softcap / temperature)

Exponentials are powers of two of one multiply-add, t = y * scale2 - shift, and shift is the label's own exponent, rounded to an
integer. It is known before the row is read: so there is no running maximum, the parts of a row that several programs read are
put together by addition, and log p keeps its digits whether p is near 1 or near 0. A part whose sum nears fp32's range (a label
70 nats below another) is read again, relative to its maximum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import MAX_PROGRAMS, all_aligned, arch_of, launch_settings, part_width, splits_rows
from .primitives import LN2, LOG2E, expm1, softplus, split_exponent, tanh
from .rows import NOTHING, exponents, largest_exponent, row_offset, sums_of_exponentials, to_boundary



@triton.jit
def _integer(t):
    """The integer next to t; 0 where there is none."""
    return tl.where(tl.abs(t) < float("inf"), tl.floor(t + 0.5), 0.0)


@triton.jit
def _merge(shift, total, moment, shift_b, total_b, moment_b):
    """Sums of two parts; their factors are powers of two, and 1 where both are relative to the label."""
    top = tl.maximum(shift, shift_b)
    a, b = tl.exp2(shift - top), tl.exp2(shift_b - top)
    moment = a * tl.fma(shift - top, total, moment) + b * tl.fma(shift_b - top, total_b, moment_b)
    return top, a * total + b * total_b, moment


@triton.jit
def _finish(shift, total, moment, y_label, scale2):
    """(log p, whole and fraction of log2 of the sum with the label's, entropy) of a row."""
    t_label = tl.fma(y_label, scale2, -shift)
    exponent, mantissa = split_exponent(total)
    log2_mantissa = tl.log2(mantissa)
    odds = LN2 * (exponent + log2_mantissa - t_label)  # lse of the others - z_label
    odds = tl.where(y_label == float("inf"), float("nan"), odds)
    logp = -softplus(odds)
    log_p_not = -softplus(-odds)
    whole = tl.where(odds > 0.0, exponent, 0.0)
    rest = tl.where(odds > 0.0, log2_mantissa - log_p_not * LOG2E, t_label - logp * LOG2E)
    carry = _integer(rest)
    # H = H(label or not) + p(not) H(others), each term without cancellation.
    h_others = LN2 * tl.where(total == 0.0, 0.0, exponent - moment / total + log2_mantissa)
    p_not = -expm1(logp)
    h_label = tl.where(logp == float("-inf"), 0.0, -tl.exp(logp) * logp)
    h_not = tl.where(p_not == 0.0, 0.0, p_not * (h_others - log_p_not))
    return logp, shift + whole + carry, rest - carry, h_label + h_not


@triton.jit
def _load_label(row_ptr, label, V, pre, HAS_SOFTCAP: tl.constexpr):
    """(column or -1, y there or NaN)."""
    inside = (label >= 0) & (label < V)
    y = tl.load(row_ptr + label, mask=inside, other=float("nan")).to(tl.float32)
    if HAS_SOFTCAP:
        y = tanh(pre * y)
    return tl.where(inside, label, -1).to(tl.int32), y


_RUNTIME = ["N", "V", "inner", "stride_outer", "stride_inner", "dstride_outer", "dstride_inner", "part_width"]


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=["logits_ptr"])
def _vocabulary_forward_kernel(
    logits_ptr,  # in   [N, V] any float, last stride 1
    labels_ptr,  # in   [N] int
    logps_ptr,  # out  [N] fp32, log p(label); 0 where ignored, NaN where the label is outside [0, V)
    lse_ptr,  # out  [2, N] fp32, log2 of the sum of e^z as an integer and a fraction; 0 where ignored
    entropy_ptr,  # out  [N] fp32, or unused
    parts_ptr,  # out  [N, parts, 3] fp32, (shift, total, moment) of each part, in place of the outputs; or unused
    N,
    V,
    inner,
    stride_outer,
    stride_inner,
    part_width,
    pre,
    post,
    ignore_index,
    SPLIT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Cost: one read of each scored row, one exp2 per element; nothing for an ignored row."""
    parts = (V + part_width - 1) // part_width
    scale2 = post * LOG2E
    for item in range(tl.program_id(0), N * parts if SPLIT else N, tl.num_programs(0)):
        row = item // parts if SPLIT else item
        label = tl.load(labels_ptr + row)
        if label != ignore_index:
            row_ptr = logits_ptr + row_offset(row, inner, stride_outer, stride_inner)
            column, y_label = _load_label(row_ptr, label, V, pre, HAS_SOFTCAP)
            shift = _integer(y_label * scale2)
            top = shift
            total = 0.0
            moment = 0.0
            part = item - row * parts if SPLIT else 0
            end = part + 1 if SPLIT else parts
            part_shift = shift
            retried = False
            while part < end:
                first = part * part_width
                stop = tl.minimum(first + part_width, V)
                part_total, part_moment = sums_of_exponentials(row_ptr, first, stop, column, part_shift, pre, scale2, HAS_SOFTCAP,
                                                               HAS_ENTROPY, POLYNOMIAL, LANES, VEC, STAGES)  # fmt: skip
                if (part_total != part_total) & (not retried):
                    peak = largest_exponent(row_ptr, first, stop, column, pre, scale2, HAS_SOFTCAP, LANES, VEC)
                    part_shift = _integer(peak)
                    retried = True
                else:
                    top, total, moment = _merge(top, total, moment, part_shift, part_total, part_moment)
                    part_shift = shift
                    retried = False
                    part += 1
            if SPLIT:
                tl.store(parts_ptr + item * 3, top)
                tl.store(parts_ptr + item * 3 + 1, total)
                tl.store(parts_ptr + item * 3 + 2, moment)
            else:
                _store(logps_ptr, lse_ptr, entropy_ptr, row, N, top, total, moment, y_label, scale2, HAS_ENTROPY)
        elif not SPLIT:
            _store_ignored(logps_ptr, lse_ptr, entropy_ptr, row, N, HAS_ENTROPY)


@triton.jit
def _store(logps_ptr, lse_ptr, entropy_ptr, row, N, top, total, moment, y_label, scale2, HAS_ENTROPY: tl.constexpr):
    logp, whole, fraction, entropy = _finish(top, total, moment, y_label, scale2)
    tl.store(logps_ptr + row, logp)
    tl.store(lse_ptr + row, whole)
    tl.store(lse_ptr + N + row, fraction)
    if HAS_ENTROPY:
        tl.store(entropy_ptr + row, entropy)


@triton.jit
def _store_ignored(logps_ptr, lse_ptr, entropy_ptr, row, N, HAS_ENTROPY: tl.constexpr):
    tl.store(logps_ptr + row, 0.0)
    tl.store(lse_ptr + row, 0.0)
    tl.store(lse_ptr + N + row, 0.0)
    if HAS_ENTROPY:
        tl.store(entropy_ptr + row, 0.0)


@triton.jit(do_not_specialize=[*_RUNTIME, "parts"], do_not_specialize_on_alignment=["logits_ptr"])
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
    pre,
    post,
    ignore_index,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
):
    """What the forward kernel does after its row, where several programs have read it. Cost: a few numbers per row."""
    row = tl.program_id(0)
    label = tl.load(labels_ptr + row)
    scale2 = post * LOG2E
    if label != ignore_index:
        row_ptr = logits_ptr + row_offset(row, inner, stride_outer, stride_inner)
        _, y_label = _load_label(row_ptr, label, V, pre, HAS_SOFTCAP)
        top = _integer(y_label * scale2)
        total = 0.0
        moment = 0.0
        for item in range(row * parts, row * parts + parts):
            part_ptr = parts_ptr + item * 3
            top, total, moment = _merge(top, total, moment, tl.load(part_ptr), tl.load(part_ptr + 1), tl.load(part_ptr + 2))
        _store(logps_ptr, lse_ptr, entropy_ptr, row, N, top, total, moment, y_label, scale2, HAS_ENTROPY)
    else:
        _store_ignored(logps_ptr, lse_ptr, entropy_ptr, row, N, HAS_ENTROPY)


@triton.jit
def _gradients(
    x, cols, label, at_label, shift, factor, entropy_factor, pre, scale2, HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr
):
    y, t = exponents(x, pre, scale2, shift, HAS_SOFTCAP)
    if HAS_ENTROPY:
        factor = tl.fma(entropy_factor, tl.maximum(t, NOTHING), factor)
    d = tl.where(cols == label, at_label, factor * tl.exp2(t))
    if HAS_SOFTCAP:
        d *= 1.0 - y * y
    return d


@triton.jit
def _gradient_tiles(
    ptr, dptr, head, vectors, label, at_label, shift, factor, entropy_factor, pre, scale2, ALIGNED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Whole vectors, written 16 bytes at a time, and read so if they are aligned alike."""
    ptr += head
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    dptr = tl.multiple_of(dptr + head, 16)
    lanes = tl.arange(0, LANES)[:, None]
    slots = lanes * VEC + tl.arange(0, VEC)[None, :]
    for lane in range(0, vectors, LANES):
        valid = lane + lanes < vectors  # constant over a vector
        at = lane * VEC + slots
        x = tl.load(ptr + at, mask=valid, other=0.0)
        d = _gradients(x, head + at, label, at_label, shift, factor, entropy_factor, pre, scale2, HAS_SOFTCAP, HAS_ENTROPY)
        tl.store(dptr + at, d.to(dptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=[*_RUNTIME, "pieces"], do_not_specialize_on_alignment=["logits_ptr", "dlogits_ptr"])
def _vocabulary_backward_kernel(
    logits_ptr,  # in   [N, V] any float, last stride 1
    labels_ptr,  # in   [N] int
    logps_ptr,  # in   [N] fp32
    lse_ptr,  # in   [2, N] fp32, (integer, fraction)
    coef_ptr,  # in   [N] fp32, dL / dlogp
    entropy_ptr,  # in   [N] fp32, or unused
    entropy_coef_ptr,  # in   [N] fp32, dL / dentropy, or unused
    upstream_ptr,  # in   [] fp32, factor on the coefficients, or unused
    dlogits_ptr,  # out  [N, V] any float; may be logits_ptr
    N,
    V,
    inner,
    stride_outer,
    stride_inner,
    dstride_outer,
    dstride_inner,
    part_width,
    pieces,
    pre,
    post,
    ignore_index,
    IN_PLACE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_UPSTREAM: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    """Cost: one read of each row with a gradient, one write of every row, one exp2 per element."""
    scale2 = post * LOG2E
    lanes = tl.arange(0, LANES)[:, None]
    slots = lanes * VEC + tl.arange(0, VEC)[None, :]
    edge = tl.arange(0, 2 * VEC)
    for item in range(tl.program_id(0), N * pieces, tl.num_programs(0)):
        row = item // pieces
        first = (item - row * pieces) * part_width
        width = tl.minimum(part_width, V - first)
        label = tl.load(labels_ptr + row)
        coef = tl.load(coef_ptr + row)
        entropy_coef = 0.0
        if HAS_UPSTREAM:
            coef *= tl.load(upstream_ptr)
        if HAS_ENTROPY:
            entropy_coef = tl.load(entropy_coef_ptr + row)
        dptr = dlogits_ptr + row_offset(row, inner, dstride_outer, dstride_inner) + first
        head = to_boundary(dptr)
        vectors = tl.maximum(width - head, 0) // VEC
        edge_cols = tl.where(edge < VEC, head - VEC + edge, head + (vectors - 1) * VEC + edge)
        at_edge = (edge_cols >= 0) & (edge_cols < tl.where(edge < VEC, tl.minimum(head, width), width))
        if (label == ignore_index) | ((coef == 0.0) & (entropy_coef == 0.0)):
            body = tl.multiple_of(dptr + head, 16)
            zeros = tl.zeros([LANES, VEC], dlogits_ptr.dtype.element_ty)
            for lane in range(0, vectors, LANES):
                tl.store(body + (lane * VEC + slots), zeros, mask=lane + lanes < vectors)
            tl.store(dptr + edge_cols, tl.zeros([2 * VEC], dlogits_ptr.dtype.element_ty), mask=at_edge)
        else:
            ptr = logits_ptr + row_offset(row, inner, stride_outer, stride_inner) + first
            logp = tl.load(logps_ptr + row)
            shift = tl.load(lse_ptr + row)
            fraction = tl.load(lse_ptr + N + row)
            chain = post
            if HAS_SOFTCAP:
                chain = post * pre
            # With p = 2^(t - fraction) and log p = (t - fraction) log 2, the gradient of a column is 2^t (factor + ... t).
            factor = -coef * chain * tl.exp2(-fraction)
            at_label = -coef * chain * expm1(logp)
            entropy_factor = 0.0
            if HAS_ENTROPY:
                entropy = tl.load(entropy_ptr + row)
                slope = -entropy_coef * chain
                entropy_factor = slope * tl.exp2(-fraction) * LN2
                factor += slope * tl.exp2(-fraction) * (entropy - fraction * LN2)
                at_label += tl.where(logp == float("-inf"), 0.0, slope * tl.exp(logp) * (logp + entropy))
            column = tl.where((label >= first) & (label < first + width), label - first, -1).to(tl.int32)
            x = tl.load(ptr + edge_cols, mask=at_edge, other=0.0)
            d = _gradients(x, edge_cols, column, at_label, shift, factor, entropy_factor, pre, scale2, HAS_SOFTCAP, HAS_ENTROPY)
            tl.store(dptr + edge_cols, d.to(dlogits_ptr.dtype.element_ty), mask=at_edge)
            if IN_PLACE:
                _gradient_tiles(ptr, dptr, head, vectors, column, at_label, shift, factor, entropy_factor, pre,
                                scale2, True, HAS_SOFTCAP, HAS_ENTROPY, LANES, VEC)  # fmt: skip
            elif to_boundary(ptr + head) == 0:
                _gradient_tiles(ptr, dptr, head, vectors, column, at_label, shift, factor, entropy_factor, pre,
                                scale2, True, HAS_SOFTCAP, HAS_ENTROPY, LANES, VEC)  # fmt: skip
            else:
                _gradient_tiles(ptr, dptr, head, vectors, column, at_label, shift, factor, entropy_factor, pre,
                                scale2, False, HAS_SOFTCAP, HAS_ENTROPY, LANES, VEC)  # fmt: skip


def _transform(temperature: float, logit_scale: float, softcap: float) -> tuple[float, float]:
    if softcap > 0:
        return logit_scale / softcap, softcap / temperature
    return 0.0, logit_scale / temperature


def vocabulary_forward(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log p(label) ``[N]``, logsumexp ``[2, N]`` and entropy ``[N]``, fp32, of rows ``[outer, inner, V]``; labels ``[N]``.

    The logsumexp of z comes as (integer, fraction), in units of log 2: their sum would round the digits of small logits away.
    """
    outer, inner, V = logits.shape
    N = outer * inner
    logps = torch.empty(N, dtype=torch.float32, device=logits.device)
    lse = torch.empty((2, N), dtype=torch.float32, device=logits.device)
    entropies = torch.empty(N if entropy else 0, dtype=torch.float32, device=logits.device)
    if not N:
        return logps, lse, entropies
    pre, post = _transform(temperature, logit_scale, softcap)
    settings = launch_settings("forward", V, logits.element_size(), arch_of(logits.device))
    width = part_width(V, settings.tile)
    parts = triton.cdiv(V, width)
    split = parts > 1 and splits_rows(N, logits.device)
    partial = torch.empty((N, parts, 3), dtype=torch.float32, device=logits.device) if split else None
    rows = (N, V, inner, logits.stride(0), logits.stride(1))
    _vocabulary_forward_kernel[(min(N * parts if split else N, MAX_PROGRAMS),)](
        logits, labels, logps, lse, entropies, partial, *rows, width, pre, post, ignore_index,
        SPLIT=split, HAS_SOFTCAP=softcap > 0, HAS_ENTROPY=entropy,
        POLYNOMIAL=settings.polynomial if all_aligned(logits) else 0,
        LANES=settings.lanes, VEC=settings.vec, STAGES=settings.num_stages,
        **settings.compiler(plain=softcap == 0 and not entropy),
    )  # fmt: skip
    if split:
        _vocabulary_merge_kernel[(N,)](
            logits, labels, partial, logps, lse, entropies, *rows, parts, pre, post, ignore_index,
            HAS_SOFTCAP=softcap > 0, HAS_ENTROPY=entropy, num_warps=1,
        )  # fmt: skip
    return logps, lse, entropies


def vocabulary_backward(
    logits: torch.Tensor,
    labels: torch.Tensor,
    logps: torch.Tensor,
    lse: torch.Tensor,
    coef: torch.Tensor,
    *,
    entropies: torch.Tensor | None,
    entropy_coef: torch.Tensor | None,
    upstream: torch.Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    out: torch.Tensor,
) -> None:
    """Write dL/dlogits into ``out`` ``[outer, inner, V]`` (``logits`` itself to work in place), given dL/dlogp ``[N]``."""
    outer, inner, V = logits.shape
    N = outer * inner
    if not N:
        return
    pre, post = _transform(temperature, logit_scale, softcap)
    settings = launch_settings("backward", V, out.element_size(), arch_of(logits.device))
    width = part_width(V, settings.tile) if splits_rows(N, logits.device) else V
    pieces = triton.cdiv(V, width)
    _vocabulary_backward_kernel[(min(N * pieces, MAX_PROGRAMS),)](
        logits, labels, logps, lse, coef, entropies, entropy_coef, upstream, out, N, V, inner,
        logits.stride(0), logits.stride(1), out.stride(0), out.stride(1), width, pieces,
        pre, post, ignore_index,
        IN_PLACE=logits.data_ptr() == out.data_ptr() and logits.stride() == out.stride(),
        HAS_SOFTCAP=softcap > 0, HAS_ENTROPY=entropy_coef is not None, HAS_UPSTREAM=upstream is not None,
        LANES=settings.lanes, VEC=settings.vec,
        **settings.compiler(plain=softcap == 0 and entropy_coef is None),
    )  # fmt: skip
