"""The vocabulary pass backward: gradients of logits from coefficients, element by element."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..inputs import LogitTransform
from .launch import MAX_PROGRAMS, arch_of, launch_settings, on_device_of, part_width, splits_rows
from .primitives import ANYWHERE, LN2, LOG2E, expm1
from .rows import (
    NOTHING,
    RUNTIME,
    Columns,
    RowFlags,
    ToExponents,
    exponents,
    row_offset,
    to_boundary,
)


class Gradient(NamedTuple):
    """Constants of a row, whose gradients are 2^t (factor + entropy_factor t)."""

    at_label: tl.tensor  # gradient at the label's column
    factor: tl.tensor
    entropy_factor: tl.tensor
    to: ToExponents


@triton.jit
def _gradients(x, is_label, of_row, FLAGS: tl.constexpr):
    y, t = exponents(x, of_row.to, FLAGS)
    factor = of_row.factor
    if FLAGS.has_entropy:
        factor = tl.fma(of_row.entropy_factor, tl.maximum(t, NOTHING), factor)
    d = tl.where(is_label, of_row.at_label, factor * tl.exp2(t))
    if FLAGS.has_softcap:
        d *= 1.0 - y * y
    return d


@triton.jit
def _gradient_tiles(
    columns, dptr, head, vectors, of_row, ALIGNED: tl.constexpr, FLAGS: tl.constexpr
):
    """Write whole vectors, 16 bytes at a time; reads are as wide if ALIGNED like the writes."""
    LANES: tl.constexpr = FLAGS.lanes
    VEC: tl.constexpr = FLAGS.vec
    ptr = columns.ptr + head
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    dptr = tl.multiple_of(dptr + head, 16)
    lanes = tl.arange(0, LANES)[:, None]
    in_vector = tl.arange(0, VEC)[None, :]
    slots = lanes * VEC + in_vector
    label = columns.label - head
    for lane in range(0, vectors, LANES):
        valid = lane + lanes < vectors  # constant over a vector
        at = lane * VEC + slots
        x = tl.load(ptr + at, mask=valid, other=0.0)
        # compares each register with a constant
        is_label = in_vector == label - (lane + lanes) * VEC
        d = _gradients(x, is_label, of_row, FLAGS)
        tl.store(dptr + at, d.to(dptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=[*RUNTIME, "pieces"], do_not_specialize_on_alignment=ANYWHERE)
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
    ignore_index,
    pre,
    post,
    FLAGS: tl.constexpr,
):
    """Cost: reads each row that has a gradient, writes every row, one exp2 per element."""
    LANES: tl.constexpr = FLAGS.lanes
    VEC: tl.constexpr = FLAGS.vec
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
        if FLAGS.has_upstream:
            coef *= tl.load(upstream_ptr)
        if FLAGS.has_entropy:
            entropy_coef = tl.load(entropy_coef_ptr + row)
        dptr = dlogits_ptr + row_offset(row, inner, dstride_outer, dstride_inner) + first
        head = to_boundary(dptr)
        vectors = tl.maximum(width - head, 0) // VEC
        edge_cols = tl.where(edge < VEC, head - VEC + edge, head + (vectors - 1) * VEC + edge)
        at_edge = (edge_cols >= 0) & (
            edge_cols < tl.where(edge < VEC, tl.minimum(head, width), width)
        )
        if (label == ignore_index) | ((coef == 0.0) & (entropy_coef == 0.0)):
            body = tl.multiple_of(dptr + head, 16)
            zeros = tl.zeros([LANES, VEC], dlogits_ptr.dtype.element_ty)
            for lane in range(0, vectors, LANES):
                tl.store(body + (lane * VEC + slots), zeros, mask=lane + lanes < vectors)
            tl.store(
                dptr + edge_cols, tl.zeros([2 * VEC], dlogits_ptr.dtype.element_ty), mask=at_edge
            )
        else:
            ptr = logits_ptr + row_offset(row, inner, stride_outer, stride_inner) + first
            logp = tl.load(logps_ptr + row)
            shift = tl.load(lse_ptr + row)
            fraction = tl.load(lse_ptr + N + row)
            chain = post
            if FLAGS.has_softcap:
                chain = post * pre
            # With p = 2^(t - fraction) and log p = (t - fraction) log 2, the gradient of a column
            # is 2^t (factor + entropy_factor t).
            factor = -coef * chain * tl.exp2(-fraction)
            at_label = -coef * chain * expm1(logp)
            entropy_factor = 0.0
            if FLAGS.has_entropy:
                entropy = tl.load(entropy_ptr + row)
                slope = -entropy_coef * chain
                entropy_factor = slope * tl.exp2(-fraction) * LN2
                factor += slope * tl.exp2(-fraction) * (entropy - fraction * LN2)
                at_label += tl.where(
                    logp == float("-inf"), 0.0, slope * tl.exp(logp) * (logp + entropy)
                )
            inside = (label >= first) & (label < first + width)
            columns = Columns(ptr, width, tl.where(inside, label - first, -1).to(tl.int32))
            of_row = Gradient(at_label, factor, entropy_factor, ToExponents(pre, scale2, shift))
            x = tl.load(ptr + edge_cols, mask=at_edge, other=0.0)
            d = _gradients(x, edge_cols == columns.label, of_row, FLAGS)
            tl.store(dptr + edge_cols, d.to(dlogits_ptr.dtype.element_ty), mask=at_edge)
            if FLAGS.in_place:
                _gradient_tiles(columns, dptr, head, vectors, of_row, True, FLAGS)
            elif to_boundary(ptr + head) == 0:
                _gradient_tiles(columns, dptr, head, vectors, of_row, True, FLAGS)
            else:
                _gradient_tiles(columns, dptr, head, vectors, of_row, False, FLAGS)


def vocabulary_backward(
    logits: torch.Tensor,
    labels: torch.Tensor,
    logps: torch.Tensor,
    lse: torch.Tensor,
    coef: torch.Tensor,
    transform: LogitTransform,
    out: torch.Tensor,
    *,
    entropies: torch.Tensor | None = None,
    entropy_coef: torch.Tensor | None = None,
    upstream: torch.Tensor | None = None,
) -> None:
    """Write dL/dlogits to `out` `[outer, inner, V]`, given coef = dL/dlogp `[N]`.

    `out` may be `logits`. `upstream` `[]` multiplies the coefficients.
    """
    outer, inner, V = logits.shape
    N = outer * inner
    if not N or not V:
        return
    settings = launch_settings("backward", V, out.element_size(), arch_of(logits.device))
    width = part_width(V, settings.tile) if splits_rows(N, logits.device) else V
    pieces = -(-V // width)
    flags = RowFlags(
        has_softcap=transform.softcap > 0,
        has_entropy=entropy_coef is not None,
        lanes=settings.lanes,
        vec=settings.vec,
        in_place=logits.data_ptr() == out.data_ptr() and logits.stride() == out.stride(),
        has_upstream=upstream is not None,
    )
    plain = not (flags.has_softcap or flags.has_entropy)
    with on_device_of(logits):
        _vocabulary_backward_kernel[(min(N * pieces, MAX_PROGRAMS),)](
            logits,
            labels,
            logps,
            lse,
            coef,
            entropies,
            entropy_coef,
            upstream,
            out,
            N,
            V,
            inner,
            *logits.stride()[:2],
            *out.stride()[:2],
            width,
            pieces,
            transform.ignore_index,
            *transform.factors,
            FLAGS=flags,
            **settings.compiler[plain],
        )
