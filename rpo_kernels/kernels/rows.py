"""How one program walks over a row: aligned 16-byte vectors, and two edges.

A row of 2-byte logits may start at any even address. Its columns from `first` on are

    head | tiles of LANES x VEC columns | fewer vectors than a tile | tail

where head and tail have fewer than VEC columns, and only these are accessed element by element.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import tanh

# Arguments that kernels are not specialised on: other batches and vocabularies need no new kernel.
RUNTIME = [
    "N",
    "V",
    "inner",
    "stride_outer",
    "stride_inner",
    "dstride_outer",
    "dstride_inner",
    "part_width",
    "ignore_index",
]
# log2 of the largest sum relative to the label. Above it, t becomes so large that the entropy loses
# digits.
LARGEST = tl.constexpr(48)
# an exponent whose power of two is 0 in fp32, and whose product with 0 is not NaN
NOTHING = tl.constexpr(-200.0)


@triton.jit
def row_offset(row, inner, stride_outer, stride_inner):
    """Element offset of a flat row over two leading dimensions.

    int64 before any product: rows may lie beyond 2^31.
    """
    outer = row // inner
    return outer.to(tl.int64) * stride_outer + (row - outer * inner).to(tl.int64) * stride_inner


@triton.jit
def to_boundary(ptr):
    """Number of elements up to the next address that is a multiple of 16."""
    return ((0 - ptr.to(tl.int64)) & 15).to(tl.int32) // (
        ptr.dtype.element_ty.primitive_bitwidth // 8
    )


@triton.jit
def exponents(x, pre, scale2, shift, HAS_SOFTCAP: tl.constexpr):
    """(y, t) of logits x, where t = log2(exp(z)) - shift."""
    y = x.to(tl.float32)
    if HAS_SOFTCAP:
        y = tanh(pre * y)
    return y, tl.fma(y, scale2, -shift)


@triton.jit
def _exponents_of_words(words, pre, scale2, shift, dtype: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Exponents `[LANES, VEC]` of vectors `[LANES, 4]` of 32-bit words.

    One instruction extracts a bf16 from a word.
    """
    if dtype.primitive_bitwidth == 32:
        x = words.to(dtype, bitcast=True)
    else:
        if dtype == tl.bfloat16:
            low, high = (
                (words << 16).to(tl.float32, bitcast=True),
                (words & -65536).to(tl.float32, bitcast=True),
            )
        else:
            low = words.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
            high = (words >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        x = tl.reshape(tl.join(low, high), [words.shape[0], words.shape[1] * 2])
    return exponents(x, pre, scale2, shift, HAS_SOFTCAP)[1]


@triton.jit
def _add(sums, moments, t, HAS_ENTROPY: tl.constexpr):
    """Add the powers 2^t of a tile elementwise, and 2^t t."""
    weights = tl.exp2(t)
    if HAS_ENTROPY:
        moments = tl.fma(weights, tl.maximum(t, NOTHING), moments)
    return sums + weights, moments


@triton.jit
def _add_edge(
    sums,
    moments,
    ptr,
    column,
    lane,
    label,
    width,
    pre,
    scale2,
    shift,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
):
    """Add the vector at `column`, as far as it lies in [0, width), to one lane."""
    cols = column + tl.arange(0, sums.shape[1])[None, :]
    valid = (cols >= 0) & (cols < width)
    _, t = exponents(tl.load(ptr + cols, mask=valid, other=0.0), pre, scale2, shift, HAS_SOFTCAP)
    here = valid & (cols != label) & (tl.arange(0, sums.shape[0])[:, None] == lane)
    return _add(sums, moments, tl.where(here, t, float("-inf")), HAS_ENTROPY)


@triton.jit
def _add_tiles(
    sums,
    moments,
    body,
    vectors,
    label,
    pre,
    scale2,
    shift,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Add whole vectors from an aligned address on; `label` is relative to it."""
    LANES: tl.constexpr = sums.shape[0]
    VEC: tl.constexpr = sums.shape[1]
    dtype: tl.constexpr = body.dtype.element_ty
    lanes = tl.arange(0, LANES)[:, None]
    in_vector = tl.arange(0, VEC)[None, :]
    words = tl.multiple_of(body.to(tl.pointer_type(tl.int32), bitcast=True), 16) + (
        lanes * 4 + tl.arange(0, 4)[None, :]
    )
    full = vectors // LANES
    tiles = (vectors + LANES - 1) // LANES
    tile = 0
    while tile < tiles:  # at most twice: up to the label's tile, and the rest
        until = full
        if (label >= tile * LANES * VEC) & (label < full * LANES * VEC):
            until = label // (LANES * VEC)
        pairs = (until - tile) // 2 if STAGES > 1 else 0
        if pairs > 0:  # two tiles are loaded while one is processed
            at = words + tile * (LANES * 4)
            x = tl.load(at)
            x1 = tl.load(at + LANES * 4)
            for _ in range(1, pairs):
                at += 2 * LANES * 4
                t = _exponents_of_words(x, pre, scale2, shift, dtype, HAS_SOFTCAP)
                x = tl.load(at)
                sums, moments = _add(sums, moments, t, HAS_ENTROPY)
                t = _exponents_of_words(x1, pre, scale2, shift, dtype, HAS_SOFTCAP)
                x1 = tl.load(at + LANES * 4)
                sums, moments = _add(sums, moments, t, HAS_ENTROPY)
            t = _exponents_of_words(x, pre, scale2, shift, dtype, HAS_SOFTCAP)
            sums, moments = _add(sums, moments, t, HAS_ENTROPY)
            t = _exponents_of_words(x1, pre, scale2, shift, dtype, HAS_SOFTCAP)
            sums, moments = _add(sums, moments, t, HAS_ENTROPY)
            tile += 2 * pairs
        for i in range(tile, tl.minimum(until + 1, tiles)):
            valid = i * LANES + lanes < vectors  # constant over a vector
            x = tl.load(body + (i * LANES * VEC + lanes * VEC + in_vector), mask=valid, other=0.0)
            _, t = exponents(x, pre, scale2, shift, HAS_SOFTCAP)
            at = label - i * LANES * VEC
            t = tl.where(valid & ((lanes != at // VEC) | (in_vector != at % VEC)), t, float("-inf"))
            sums, moments = _add(sums, moments, t, HAS_ENTROPY)
        tile = until + 1
    return sums, moments


@triton.jit
def _power_of_two(n):
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _exact_sum(x, LIMIT: tl.constexpr):
    """Sum a tile in fixed point, with 40 bits below its largest element.

    The sum is exact, so the order of its terms does not matter. NaN if the largest element is
    beyond 2^LIMIT, infinite or NaN.
    """
    magnitudes = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    top = tl.maximum((tl.max(tl.max(magnitudes, axis=1), axis=0) >> 23) - 127, -80)
    fixed = (x * _power_of_two(40 - top)).to(tl.int64)
    total = tl.sum(tl.sum(fixed, axis=1), axis=0).to(tl.float32) * _power_of_two(top - 40)
    return tl.where(top < LIMIT, total, float("nan"))


@triton.jit
def sums_of_exponentials(
    row_ptr,
    first,
    stop,
    label,
    shift,
    pre,
    scale2,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Return (sum of 2^t, sum of 2^t t) over columns [first, stop), without the label's.

    Columns that are a whole number of tiles apart share a partial sum, in order; the partial sums
    are added exactly. The result therefore has the same bits wherever the row lies in memory. The
    width stop - first is a multiple of the tile, except in the last part of a row.
    """
    width = stop - first
    label -= first
    ptr = row_ptr + first
    head = to_boundary(ptr)
    body = tl.multiple_of(ptr + head, 16)
    vectors = tl.maximum(width - head, 0) // VEC
    sums = tl.zeros([LANES, VEC], tl.float32)
    moments = tl.zeros([LANES, VEC], tl.float32)
    if head > 0:
        sums, moments = _add_edge(
            sums,
            moments,
            ptr,
            head - VEC,
            LANES - 1,
            label,
            width,
            pre,
            scale2,
            shift,
            HAS_SOFTCAP,
            HAS_ENTROPY,
        )
    sums, moments = _add_tiles(
        sums,
        moments,
        body,
        vectors,
        label - head,
        pre,
        scale2,
        shift,
        HAS_SOFTCAP,
        HAS_ENTROPY,
        STAGES,
    )
    if vectors * VEC < width - head:
        sums, moments = _add_edge(
            sums,
            moments,
            ptr,
            head + vectors * VEC,
            vectors % LANES,
            label,
            width,
            pre,
            scale2,
            shift,
            HAS_SOFTCAP,
            HAS_ENTROPY,
        )
    moment = 0.0
    if HAS_ENTROPY:
        moment = _exact_sum(moments, 100)
    return _exact_sum(sums, LARGEST), moment


@triton.jit
def largest_exponent(
    row_ptr,
    first,
    stop,
    label,
    pre,
    scale2,
    HAS_SOFTCAP: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    """Return the largest t, for shift 0, over columns [first, stop) without the label's.

    Rarely needed, so it is kept simple.
    """
    peak = tl.full([LANES, VEC], float("-inf"), tl.float32)
    for start in range(first, stop, LANES * VEC):
        cols = start + tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
        _, t = exponents(
            tl.load(row_ptr + cols, mask=cols < stop, other=0.0), pre, scale2, 0.0, HAS_SOFTCAP
        )
        peak = tl.where((cols < stop) & (cols != label), tl.maximum(peak, t), peak)
    return tl.max(tl.max(peak, axis=1), axis=0)
