"""The GEMMs of an lm_head, as the libraries of each device run them best.

Inputs share one dtype. Products are summed in fp32 and rounded once, to the dtype asked for. Where
a CPU lacks instructions for a 16-bit dtype, PyTorch's GEMMs of it run many times below the rate of
fp32: there, and wherever a GEMM of 16-bit inputs has no fp32 output, the inputs are upcast, a block
of the vocabulary at a time.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

# Upcast weights of one CPU block: small beside the L3 cache, large enough for the GEMM.
_BLOCK_BYTES = 16 << 20


_P = ParamSpec("_P")
_R = TypeVar("_R")


def _as_given(
    function: Callable[Concatenate[Tensor, _P], _R],
) -> Callable[Concatenate[Tensor, _P], _R]:
    """Decorator: autocast, which would cast inputs once more, is off."""

    @functools.wraps(function)
    def call(first: Tensor, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args, **kwargs)

    return call


@_as_given
def project(hidden: Tensor, weight: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out ``[n, V]`` = hidden ``[n, H]`` weight^T, or added to it; weight ``[V, H]``, out in the
    inputs' dtype or fp32.
    """
    if hidden.is_cuda or (out.dtype == hidden.dtype and not is_emulated(hidden)):
        return _multiply(out, hidden, weight.t(), accumulate)
    with _bf16_products() if hidden.dtype == torch.bfloat16 else contextlib.nullcontext():
        hidden = hidden.float()
        for rows, columns in blocks(weight, out.t()):
            _multiply(columns.t(), hidden, rows.float().t(), accumulate)


@_as_given
def backproject(p: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """out ``[n, H]`` fp32 = p ``[n, V]`` weight ``[V, H]``, never rounded to the 16 bits of its
    inputs on the way.
    """
    if p.is_cuda or p.dtype == torch.float32:
        _multiply(out, p, weight, accumulate=False)
        return out
    out.zero_()
    with _bf16_products() if p.dtype == torch.bfloat16 else contextlib.nullcontext():
        for rows, columns in blocks(weight, p.t()):
            _multiply(out, columns.t().float(), rows.float(), accumulate=True)
    return out


@_as_given
def weight_gradient(p: Tensor, x: Tensor, out: Tensor, accumulate: bool) -> None:
    """out ``[V, H]`` of any float dtype = p^T x, of p ``[n, V]`` and x ``[n, H]``, or added to
    it.
    """
    direct = out.dtype == x.dtype and not is_emulated(x)
    if direct or (x.is_cuda and (not accumulate or _mixed_addmm(x.device, x.dtype, out.dtype))):
        return _multiply(out, p.t(), x, accumulate)
    exact = (
        _bf16_products()
        if x.dtype == torch.bfloat16 and not x.is_cuda
        else contextlib.nullcontext()
    )
    x = x if x.is_cuda else x.float()
    with exact:
        for rows, columns in blocks(out, p.t()):
            _multiply(rows, columns.to(x.dtype), x, accumulate)


def bias_gradient(p: Tensor, coef: Tensor, total: Tensor) -> None:
    """total ``[V]`` fp32 += p^T coef, of p ``[n, V]`` and coef ``[n]`` fp32, which is not rounded
    to the dtype of p.
    """
    for out, columns in blocks(total[:, None], p.t()):
        out[:, 0].addmv_(columns.float(), coef)


def _multiply(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    """out = a b, or added to it."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=int(accumulate), out=out)
    elif _mixed_addmm(a.device, a.dtype, out.dtype) and accumulate:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    elif a.is_cuda and not accumulate:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        product = torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.mm(a, b)
        out.add_(product) if accumulate else out.copy_(product)


def blocks(weight: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of ``[V, H]`` and of ``[V, n]`` side by side, such that an fp32 copy of either stays in
    the cache.
    """
    rows = max(1, _BLOCK_BYTES // (4 * max(1, weight.shape[1], other.shape[1])))
    return zip(weight.split(rows), other.split(rows))


def is_emulated(x: Tensor) -> bool:
    """Whether this machine has no instructions for GEMMs of a tensor of the CPU."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.bfloat16, torch.float16)
        and not _has_instructions(x.dtype)
    )


@functools.cache
def _has_instructions(dtype: torch.dtype) -> bool:
    """Of this CPU for a 16-bit dtype, as far as PyTorch knows: some builds come without oneDNN."""
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    supported = getattr(torch.ops.mkldnn, name, None)
    return supported is not None and supported()


@contextlib.contextmanager
def _bf16_products() -> Iterator[None]:
    """fp32 GEMMs that round their inputs to bf16 and sum in fp32: exact for inputs that came from
    bf16, and faster.

    The setting belongs to the process, so fp32 GEMMs that other threads start meanwhile are rounded
    too.
    """
    settings = getattr(torch.backends.mkldnn, "matmul", None)  # since torch 2.9
    if settings is None or not _has_instructions(torch.bfloat16):
        yield
        return
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


@functools.cache
def _mixed_addmm(device: torch.device, dtype: torch.dtype, out_dtype: torch.dtype) -> bool:
    """Whether this PyTorch adds a 16-bit product to an fp32 matrix in one GEMM (some releases
    refuse).
    """
    if device.type != "cuda" or out_dtype != torch.float32:
        return False
    total = torch.zeros(16, 16, device=device)
    half = torch.zeros(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(total, half, half, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return True
