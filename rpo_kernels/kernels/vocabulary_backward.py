"""The vocabulary pass backward: gradients of logits from coefficients, element by element."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..inputs import LogitTransform
from .launch import MAX_PROGRAMS, arch_of, launch_settings, on_device_of, part_width, splits_rows
from .primitives import ANYWHERE, LN2, LOG2E, expm1
from .rows import NOTHING, RUNTIME, exponents, row_offset, to_boundary


class Row(NamedTuple):
    """Constants of a row, whose gradients are 2^t (factor + entropy_factor t)."""

    at_label: tl.tensor  # gradient at the label's column
    shift: tl.tensor  # t = y * scale2 - shift
    factor: tl.tensor
    entropy_factor: tl.tensor
    pre: tl.tensor
    scale2: tl.tensor


@triton.jit
def _gradients(x, is_label, row, HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr):
    y, t = exponents(x, row.pre, row.scale2, row.shift, HAS_SOFTCAP)
    factor = row.factor
    if HAS_ENTROPY:
        factor = tl.fma(row.entropy_factor, tl.maximum(t, NOTHING), factor)
    d = tl.where(is_label, row.at_label, factor * tl.exp2(t))
    if HAS_SOFTCAP:
        d *= 1.0 - y * y
    return d


@triton.jit
def _gradient_tiles(
    ptr,
    dptr,
    head,
    vectors,
    label,
    row,
    ALIGNED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    """Write whole vectors, 16 bytes at a time; reads are as wide if ALIGNED like the writes."""
    ptr += head
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    dptr = tl.multiple_of(dptr + head, 16)
    lanes = tl.arange(0, LANES)[:, None]
    in_vector = tl.arange(0, VEC)[None, :]
    slots = lanes * VEC + in_vector
    label -= head
    for lane in range(0, vectors, LANES):
        valid = lane + lanes < vectors  # constant over a vector
        at = lane * VEC + slots
        x = tl.load(ptr + at, mask=valid, other=0.0)
        # compares each register with a constant
        is_label = in_vector == label - (lane + lanes) * VEC
        d = _gradients(x, is_label, row, HAS_SOFTCAP, HAS_ENTROPY)
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
    IN_PLACE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_UPSTREAM: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    """Cost: reads each row that has a gradient, writes every row, one exp2 per element."""
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
            if HAS_SOFTCAP:
                chain = post * pre
            # With p = 2^(t - fraction) and log p = (t - fraction) log 2, the gradient of a column
            # is 2^t (factor + entropy_factor t).
            factor = -coef * chain * tl.exp2(-fraction)
            at_label = -coef * chain * expm1(logp)
            entropy_factor = 0.0
            if HAS_ENTROPY:
                entropy = tl.load(entropy_ptr + row)
                slope = -entropy_coef * chain
                entropy_factor = slope * tl.exp2(-fraction) * LN2
                factor += slope * tl.exp2(-fraction) * (entropy - fraction * LN2)
                at_label += tl.where(
                    logp == float("-inf"), 0.0, slope * tl.exp(logp) * (logp + entropy)
                )
            column = tl.where((label >= first) & (label < first + width), label - first, -1).to(
                tl.int32
            )
            of_row = Row(at_label, shift, factor, entropy_factor, pre, scale2)
            x = tl.load(ptr + edge_cols, mask=at_edge, other=0.0)
            d = _gradients(x, edge_cols == column, of_row, HAS_SOFTCAP, HAS_ENTROPY)
            tl.store(dptr + edge_cols, d.to(dlogits_ptr.dtype.element_ty), mask=at_edge)
            if IN_PLACE:
                _gradient_tiles(
                    ptr,
                    dptr,
                    head,
                    vectors,
                    column,
                    of_row,
                    True,
                    HAS_SOFTCAP,
                    HAS_ENTROPY,
                    LANES,
                    VEC,
                )
            elif to_boundary(ptr + head) == 0:
                _gradient_tiles(
                    ptr,
                    dptr,
                    head,
                    vectors,
                    column,
                    of_row,
                    True,
                    HAS_SOFTCAP,
                    HAS_ENTROPY,
                    LANES,
                    VEC,
                )
            else:
                _gradient_tiles(
                    ptr,
                    dptr,
                    head,
                    vectors,
                    column,
                    of_row,
                    False,
                    HAS_SOFTCAP,
                    HAS_ENTROPY,
                    LANES,
                    VEC,
                )


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
    plain = not (transform.softcap > 0 or entropy_coef is not None)
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
            IN_PLACE=logits.data_ptr() == out.data_ptr() and logits.stride() == out.stride(),
            HAS_SOFTCAP=transform.softcap > 0,
            HAS_ENTROPY=entropy_coef is not None,
            HAS_UPSTREAM=upstream is not None,
            LANES=settings.lanes,
            VEC=settings.vec,
            **settings.compiler[plain],
        )
