"""The GEMMs of an lm_head, in the form that is fastest on each device.

Inputs share one dtype. Products are summed in fp32 and rounded once, to the output's dtype. On a
CPU without instructions for a 16-bit dtype, PyTorch's GEMMs of that dtype run at a small fraction
of the fp32 rate. There, and wherever a GEMM of 16-bit inputs cannot write fp32, the inputs are
upcast, one block of the vocabulary at a time.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

# Upcast weights of one block on a CPU: small against the L3 cache, large enough for a GEMM.
_BLOCK_BYTES = 16 << 20


_P = ParamSpec("_P")
_R = TypeVar("_R")


def _as_given(
    function: Callable[Concatenate[Tensor, _P], _R],
) -> Callable[Concatenate[Tensor, _P], _R]:
    """Decorate a function to run without autocast, which would cast its inputs again."""

    @functools.wraps(function)
    def call(first: Tensor, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args, **kwargs)

    return call


@_as_given
def project(hidden: Tensor, weight: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """Compute out `[n, V]` (+)= hidden `[n, H]` weight^T, weight `[V, H]`.

    out has the inputs' dtype or fp32.
    """
    if hidden.is_cuda or (out.dtype == hidden.dtype and not is_emulated(hidden)):
        return _multiply(out, hidden, weight.t(), accumulate)
    with _bf16_products() if hidden.dtype == torch.bfloat16 else contextlib.nullcontext():
        hidden = hidden.float()
        for rows, columns in blocks(weight, out.t()):
            _multiply(columns.t(), hidden, rows.float().t(), accumulate)


@_as_given
def backproject(p: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """Compute out `[n, H]` fp32 = p `[n, V]` weight `[V, H]`, without rounding to 16 bits."""
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
    """Compute out `[V, H]` (+)= p^T x for p `[n, V]` and x `[n, H]`; out has any float dtype."""
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
    """Compute total `[V]` fp32 += p^T coef for p `[n, V]` and coef `[n]`, which stays fp32."""
    for out, columns in blocks(total[:, None], p.t()):
        out[:, 0].addmv_(columns.float(), coef)


def _multiply(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    """Compute out (+)= a b."""
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
    """Yield blocks of rows of `[V, H]` and `[V, n]` whose fp32 copies stay in the cache."""
    rows = max(1, _BLOCK_BYTES // (4 * max(1, weight.shape[1], other.shape[1])))
    return zip(weight.split(rows), other.split(rows))


def is_emulated(x: Tensor) -> bool:
    """Return whether this machine lacks instructions for GEMMs of a CPU tensor's dtype."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.bfloat16, torch.float16)
        and not _has_instructions(x.dtype)
    )


@functools.cache
def _has_instructions(dtype: torch.dtype) -> bool:
    """Return whether PyTorch knows instructions of this CPU for a 16-bit dtype.

    Some builds of PyTorch have no oneDNN.
    """
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    supported = getattr(torch.ops.mkldnn, name, None)
    return supported is not None and supported()


@contextlib.contextmanager
def _bf16_products() -> Iterator[None]:
    """Let fp32 GEMMs round their inputs to bf16: faster, and exact for inputs that came from bf16.

    The setting is process-wide: it also affects fp32 GEMMs of other threads in the meantime.
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
    """Return whether this PyTorch adds a 16-bit product to an fp32 matrix in one GEMM.

    Some releases refuse.
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
