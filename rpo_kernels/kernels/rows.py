"""How one program walks over a row: aligned 16-byte vectors, and two edges.

A row of 2-byte logits may start at any even address. Its columns from `first` on are

    head | tiles of LANES x VEC columns | fewer vectors than a tile | tail

where head and tail have fewer than VEC columns, and only these are accessed element by element.
"""

from __future__ import annotations

from typing import NamedTuple

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


class RowFlags(NamedTuple):
    """What a row pass is compiled for."""

    has_softcap: bool
    has_entropy: bool
    lanes: int  # vectors in a tile
    vec: int  # elements in a vector
    stages: int = 1
    is_shard: bool = False  # forward
    in_place: bool = False  # backward
    has_upstream: bool = False  # backward


class Columns(NamedTuple):
    """Columns of a row that are read together."""

    ptr: tl.tensor  # of the first
    width: tl.tensor
    label: tl.tensor  # the label's column, counted from the first; < 0 or >= width if elsewhere


class ToExponents(NamedTuple):
    """How the exponent t = log2(exp(z)) - shift of a logit x is computed.

    y = x, or tanh(pre x) with a softcap; t = y * scale2 - shift.
    """

    pre: tl.tensor
    scale2: tl.tensor
    shift: tl.tensor


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
def exponents(x, to, FLAGS: tl.constexpr):
    """(y, t) of logits x."""
    y = x.to(tl.float32)
    if FLAGS.has_softcap:
        y = tanh(to.pre * y)
    return y, tl.fma(y, to.scale2, -to.shift)


@triton.jit
def _exponents_of_words(words, dtype: tl.constexpr, to, FLAGS: tl.constexpr):
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
    return exponents(x, to, FLAGS)[1]


@triton.jit
def _add(sums, moments, t, FLAGS: tl.constexpr):
    """Add the powers 2^t of a tile elementwise, and 2^t t."""
    weights = tl.exp2(t)
    if FLAGS.has_entropy:
        moments = tl.fma(weights, tl.maximum(t, NOTHING), moments)
    return sums + weights, moments


@triton.jit
def _add_edge(sums, moments, columns, start, lane, to, FLAGS: tl.constexpr):
    """Add the vector at column `start`, as far as it is one of the columns, to one lane."""
    cols = start + tl.arange(0, sums.shape[1])[None, :]
    valid = (cols >= 0) & (cols < columns.width)
    _, t = exponents(tl.load(columns.ptr + cols, mask=valid, other=0.0), to, FLAGS)
    here = valid & (cols != columns.label) & (tl.arange(0, sums.shape[0])[:, None] == lane)
    return _add(sums, moments, tl.where(here, t, float("-inf")), FLAGS)


@triton.jit
def _add_tiles(sums, moments, body, vectors, label, to, FLAGS: tl.constexpr):
    """Add whole vectors from an aligned address on; `label` is relative to it."""
    LANES: tl.constexpr = FLAGS.lanes
    VEC: tl.constexpr = FLAGS.vec
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
        pairs = (until - tile) // 2 if FLAGS.stages > 1 else 0
        if pairs > 0:  # two tiles are loaded while one is processed
            at = words + tile * (LANES * 4)
            x = tl.load(at)
            x1 = tl.load(at + LANES * 4)
            for _ in range(1, pairs):
                at += 2 * LANES * 4
                t = _exponents_of_words(x, dtype, to, FLAGS)
                x = tl.load(at)
                sums, moments = _add(sums, moments, t, FLAGS)
                t = _exponents_of_words(x1, dtype, to, FLAGS)
                x1 = tl.load(at + LANES * 4)
                sums, moments = _add(sums, moments, t, FLAGS)
            sums, moments = _add(sums, moments, _exponents_of_words(x, dtype, to, FLAGS), FLAGS)
            sums, moments = _add(sums, moments, _exponents_of_words(x1, dtype, to, FLAGS), FLAGS)
            tile += 2 * pairs
        for i in range(tile, tl.minimum(until + 1, tiles)):
            valid = i * LANES + lanes < vectors  # constant over a vector
            x = tl.load(body + (i * LANES * VEC + lanes * VEC + in_vector), mask=valid, other=0.0)
            _, t = exponents(x, to, FLAGS)
            at = label - i * LANES * VEC
            t = tl.where(valid & ((lanes != at // VEC) | (in_vector != at % VEC)), t, float("-inf"))
            sums, moments = _add(sums, moments, t, FLAGS)
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
def sums_of_exponentials(columns, to, FLAGS: tl.constexpr):
    """Return (sum of 2^t, sum of 2^t t) over columns without the label's.

    Columns that are a whole number of tiles apart share a partial sum, in order; the partial sums
    are added exactly. The result therefore has the same bits wherever the row lies in memory. The
    width is a multiple of the tile, except in the last part of a row.
    """
    LANES: tl.constexpr = FLAGS.lanes
    VEC: tl.constexpr = FLAGS.vec
    head = to_boundary(columns.ptr)
    body = tl.multiple_of(columns.ptr + head, 16)
    vectors = tl.maximum(columns.width - head, 0) // VEC
    sums = tl.zeros([LANES, VEC], tl.float32)
    moments = tl.zeros([LANES, VEC], tl.float32)
    if head > 0:
        sums, moments = _add_edge(sums, moments, columns, head - VEC, LANES - 1, to, FLAGS)
    sums, moments = _add_tiles(sums, moments, body, vectors, columns.label - head, to, FLAGS)
    tail = head + vectors * VEC
    if tail < columns.width:
        sums, moments = _add_edge(sums, moments, columns, tail, vectors % LANES, to, FLAGS)
    moment = 0.0
    if FLAGS.has_entropy:
        moment = _exact_sum(moments, 100)
    return _exact_sum(sums, LARGEST), moment


@triton.jit
def largest_exponent(columns, to, FLAGS: tl.constexpr):
    """Return the largest t over columns without the label's.

    Rarely needed, so it is kept simple.
    """
    LANES: tl.constexpr = FLAGS.lanes
    VEC: tl.constexpr = FLAGS.vec
    peak = tl.full([LANES, VEC], float("-inf"), tl.float32)
    for start in range(0, columns.width, LANES * VEC):
        cols = start + tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
        valid = cols < columns.width
        _, t = exponents(tl.load(columns.ptr + cols, mask=valid, other=0.0), to, FLAGS)
        peak = tl.where(valid & (cols != columns.label), tl.maximum(peak, t), peak)
    return tl.max(tl.max(peak, axis=1), axis=0)
