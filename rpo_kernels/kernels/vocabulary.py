"""The vocabulary pass: rows of logits to token log-probabilities, and coefficients back to gradients of logits.

One program owns one row. A row is read in tiles of LANES x VEC elements; a lane is one 16-byte vector and keeps its own
running (max, sum), so the loop holds no reduction across threads and a lane rescales once per vector.

    z = post * y,   y = x                 (post = logit_scale / temperature)
                    y = tanh(pre * x)     (pre = logit_scale / softcap, post = softcap / temperature)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .primitives import LOG2E, expm1, softplus, tanh


@triton.jit
def _row_offset(row, inner, stride_outer, stride_inner):
    """Element offset of a flat row over two leading dimensions; int64 before any product, rows may lie beyond 2^31."""
    outer = row // inner
    return outer.to(tl.int64) * stride_outer + (row - outer * inner).to(tl.int64) * stride_inner


@triton.jit
def row_results(base, others, y_label, h_others, post):
    """(log p, peak, rest, entropy) of a row from the label's y and the other columns: sum of exp(z - post * base), entropy."""
    odds = (base - y_label) * post + tl.log(others)  # lse_others - z_label
    odds = tl.where(y_label == float("inf"), float("nan"), odds)
    logp = -softplus(odds)
    peak = tl.where(odds > 0.0, base, y_label)
    rest = tl.where(odds > 0.0, tl.log(others) + softplus(-odds), -logp)
    # H = H(label or not) + p(not) H(others), each term without cancellation.
    p_not = -expm1(logp)
    log_p_not = -softplus(-odds)
    h_label = tl.where(logp == float("-inf"), 0.0, -tl.exp(logp) * logp)
    h_not = tl.where(p_not == 0.0, 0.0, p_not * (h_others - log_p_not))
    return logp, peak, rest, h_label + h_not


@triton.jit(do_not_specialize=["N", "inner"])
def _vocabulary_forward_kernel(
    logits_ptr,  # in   [N, V] any float, last stride 1
    labels_ptr,  # in   [N] int
    logps_ptr,  # out  [N] fp32, log p(label); 0 where ignored, NaN where the label is outside [0, V)
    lse_ptr,  # out  [2, N] fp32, logsumexp of z as (peak, rest): post * peak + rest; 0 where ignored
    entropy_ptr,  # out  [N] fp32, or unused
    N,
    V,
    inner,
    stride_outer,
    stride_inner,
    pre,
    post,
    ignore_index,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    IS_SHARD: tl.constexpr,  # the row is a part of one: what is stored is statistics, for _shards_combine_kernel
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    """Cost: one read of each scored row, one exp per element and one per vector; nothing for an ignored row."""
    row = tl.program_id(0)
    label = tl.load(labels_ptr + row)
    if label == ignore_index:
        tl.store(logps_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        tl.store(lse_ptr + N + row, 0.0)
        if HAS_ENTROPY:
            tl.store(entropy_ptr + row, 0.0)
        return
    row_ptr = logits_ptr + _row_offset(row, inner, stride_outer, stride_inner)
    scale2 = post * LOG2E

    # Statistics run over the *other* columns: log p = -softplus(lse_others - z_label) keeps its digits when p is near 1.
    peak = tl.full([LANES], float("-inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    moment = tl.zeros([LANES], tl.float32)  # sum of exp(z - peak) (y - peak)
    in_tile = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    for start in range(0, V, LANES * VEC):
        cols = start + in_tile
        y = tl.load(row_ptr + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
        if HAS_SOFTCAP:
            y = tl.where(cols < V, tanh(pre * y), float("-inf"))
        y = tl.where(cols == label, float("-inf"), y)
        new_peak = tl.maximum(peak, tl.max(y, axis=1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp2((y - base[:, None]) * scale2)
        decay = tl.exp2((peak - base) * scale2)
        if HAS_ENTROPY:
            lost = tl.where(peak == float("-inf"), 0.0, peak - base)
            product = tl.where(y == float("-inf"), 0.0, weight * (y - base[:, None]))
            moment = decay * (moment + total * lost) + tl.sum(product, axis=1)
        total = total * decay + tl.sum(weight, axis=1)
        peak = new_peak

    top = tl.max(peak, axis=0)
    base = tl.where(top == float("-inf"), 0.0, top)
    decay = tl.exp2((peak - base) * scale2)
    others = tl.sum(total * decay, axis=0)
    inside = (label >= 0) & (label < V)
    y_label = tl.load(row_ptr + label, mask=inside, other=float("nan")).to(tl.float32)
    if HAS_SOFTCAP:
        y_label = tanh(pre * y_label)
    h_others = 0.0
    if HAS_ENTROPY:
        lost = tl.where(peak == float("-inf"), 0.0, peak - base)
        moments = tl.sum(decay * (moment + total * lost), axis=0)
        h_others = tl.where(others == 0.0, 0.0, tl.log(others) - moments * post / others)
    if IS_SHARD:
        tl.store(logps_ptr + row, tl.where(label == -1, float("-inf"), y_label))
        tl.store(lse_ptr + row, top)
        tl.store(lse_ptr + N + row, others)
        if HAS_ENTROPY:
            tl.store(entropy_ptr + row, h_others)
    else:
        logp, peak_of_all, rest, entropy = row_results(base, others, y_label, h_others, post)
        tl.store(logps_ptr + row, logp)
        tl.store(lse_ptr + row, peak_of_all)
        tl.store(lse_ptr + N + row, rest)
        if HAS_ENTROPY:
            tl.store(entropy_ptr + row, entropy)


@triton.jit(do_not_specialize=["N", "inner"])
def _vocabulary_backward_kernel(
    logits_ptr,  # in   [N, V] any float, last stride 1
    labels_ptr,  # in   [N] int
    logps_ptr,  # in   [N] fp32
    lse_ptr,  # in   [2, N] fp32, (peak, rest)
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
    pre,
    post,
    ignore_index,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_UPSTREAM: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    """Cost: one read of each row with a gradient, one write of every row, one exp per element."""
    row = tl.program_id(0)
    label = tl.load(labels_ptr + row)
    coef = tl.load(coef_ptr + row)
    entropy_coef = 0.0
    if HAS_UPSTREAM:
        coef *= tl.load(upstream_ptr)
    if HAS_ENTROPY:
        entropy_coef = tl.load(entropy_coef_ptr + row)
    drow_ptr = dlogits_ptr + _row_offset(row, inner, dstride_outer, dstride_inner)
    in_tile = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    if (label == ignore_index) | ((coef == 0.0) & (entropy_coef == 0.0)):
        zeros = tl.zeros([LANES, VEC], dlogits_ptr.dtype.element_ty)
        for start in range(0, V, LANES * VEC):
            tl.store(drow_ptr + start + in_tile, zeros, mask=start + in_tile < V)
        return
    row_ptr = logits_ptr + _row_offset(row, inner, stride_outer, stride_inner)
    logp = tl.load(logps_ptr + row)
    peak = tl.load(lse_ptr + row)
    rest = tl.load(lse_ptr + N + row)
    entropy = 0.0
    if HAS_ENTROPY:
        entropy = tl.load(entropy_ptr + row)
    chain = post
    if HAS_SOFTCAP:
        chain = post * pre
    scale2 = post * LOG2E
    factor = -coef * chain * tl.exp(-rest)  # of exp(z - peak) in the gradient
    at_label = -coef * chain * expm1(logp)
    for start in range(0, V, LANES * VEC):
        cols = start + in_tile
        y = tl.load(row_ptr + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
        if HAS_SOFTCAP:
            y = tanh(pre * y)
        weight = tl.exp2((y - peak) * scale2)
        d = tl.where(cols == label, at_label, factor * weight)
        if HAS_ENTROPY:
            log_p = tl.where(cols == label, logp, (y - peak) * post - rest)
            p = tl.exp2(log_p * LOG2E)
            d -= entropy_coef * chain * tl.where(p == 0.0, 0.0, p * (log_p + entropy))
        if HAS_SOFTCAP:
            d *= 1.0 - y * y
        tl.store(drow_ptr + cols, d.to(dlogits_ptr.dtype.element_ty), mask=cols < V)


def launch_settings(V: int, element_size: int) -> dict[str, int]:
    """Tile and warps of a row pass.

    VEC is one 16-byte access. Two vectors in flight per thread and eight warps keep the loop free of spills on every
    offline target (tests/test_compile.py); not yet measured on a GPU.
    """
    vec = 16 // element_size
    num_warps = min(8, max(1, triton.next_power_of_2(triton.cdiv(V, 32 * vec * 2))))
    return {"VEC": vec, "LANES": 64 * num_warps, "num_warps": num_warps}


def transform_factors(temperature: float, logit_scale: float, softcap: float) -> tuple[float, float]:
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

    The logsumexp of z comes as (peak, rest), z units of y and nats: their sum would round the digits of small logits away.
    """
    N = labels.numel()
    logps = torch.empty(N, dtype=torch.float32, device=logits.device)
    lse = torch.empty((2, N), dtype=torch.float32, device=logits.device)
    entropies = torch.empty(N if entropy else 0, dtype=torch.float32, device=logits.device)
    _forward(logits, labels, logps, lse, entropies, temperature, logit_scale, softcap, ignore_index, entropy, False)
    return logps, lse, entropies


def shard_statistics(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    entropy: bool,
) -> torch.Tensor:
    """What ``shards.combine`` needs of one shard of the columns, fp32 ``[3 or 4, N]``; labels count from its first column.

    The label's y (-inf for label -1, which lies on another shard); of the other columns the maximum of y, the sum of
    exp(z - maximum), and if asked the entropy.
    """
    statistics = torch.empty((4 if entropy else 3, labels.numel()), dtype=torch.float32, device=logits.device)
    _forward(
        logits, labels, statistics[0], statistics[1:3], statistics[3:], temperature, logit_scale, softcap, ignore_index, entropy,
        is_shard=True,
    )  # fmt: skip
    return statistics


def _forward(logits, labels, logps, lse, entropies, temperature, logit_scale, softcap, ignore_index, entropy, is_shard) -> None:
    V, N = logits.shape[2], labels.numel()
    pre, post = transform_factors(temperature, logit_scale, softcap)
    if N:
        _vocabulary_forward_kernel[(N,)](
            logits, labels, logps, lse, entropies, N, V, logits.shape[1], logits.stride(0), logits.stride(1), pre, post,
            ignore_index, HAS_SOFTCAP=softcap > 0, HAS_ENTROPY=entropy, IS_SHARD=is_shard,
            **launch_settings(V, logits.element_size()),
        )  # fmt: skip


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
    pre, post = transform_factors(temperature, logit_scale, softcap)
    if N and V:
        _vocabulary_backward_kernel[(N,)](
            logits, labels, logps, lse, coef, entropies, entropy_coef, upstream, out, N, V, inner,
            logits.stride(0), logits.stride(1), out.stride(0), out.stride(1), pre, post, ignore_index,
            HAS_SOFTCAP=softcap > 0, HAS_ENTROPY=entropy_coef is not None, HAS_UPSTREAM=upstream is not None,
            **launch_settings(V, logits.element_size()),
        )  # fmt: skip
