"""The three GEMMs of an lm_head, as the libraries of each device run them best.

Inputs share one dtype. Products are summed in fp32 and rounded once, to the dtype asked for.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

# Upcast weights of one CPU block: small beside the L3 cache, large enough for the GEMM.
_BLOCK_BYTES = 16 << 20


def project(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """out ``[n, V]`` = hidden ``[n, H]`` weight^T, weight ``[V, H]``; out in the inputs' dtype, or fp32."""
    if out.dtype == hidden.dtype:
        torch.mm(hidden, weight.t(), out=out)
    elif hidden.is_cuda:
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    else:  # no mixed GEMM on a CPU: upcast, a block of the vocabulary at a time
        exact_in_bf16 = hidden.dtype == torch.bfloat16
        hidden = hidden.to(out.dtype)
        with _bf16_products() if exact_in_bf16 else contextlib.nullcontext():
            for rows, columns in zip(*(x.split(_block(weight), dim) for x, dim in ((weight, 0), (out, 1)))):
                torch.mm(hidden, rows.to(out.dtype).t(), out=columns)


def backproject(dlogits: Tensor, weight: Tensor) -> Tensor:
    """dhidden ``[n, H]`` = dlogits ``[n, V]`` weight."""
    return torch.mm(dlogits, weight)


def weight_gradient(dlogits: Tensor, hidden: Tensor, total: Tensor | None) -> Tensor:
    """dweight ``[V, H]`` = dlogits^T hidden in the inputs' dtype, or added to an fp32 ``total``."""
    if total is None:
        return torch.mm(dlogits.t(), hidden)
    if total.dtype == hidden.dtype:
        return total.addmm_(dlogits.t(), hidden)
    if hidden.is_cuda and _mixed_addmm(hidden.device, hidden.dtype):
        return torch.addmm(total, dlogits.t(), hidden, out_dtype=total.dtype, out=total)
    for columns, rows in zip(dlogits.split(_block(total), 1), total.split(_block(total), 0)):
        if hidden.is_cuda:
            rows.add_(torch.mm(columns.t(), hidden, out_dtype=total.dtype))
        else:
            rows.add_(torch.mm(columns.t(), hidden))
    return total


@contextlib.contextmanager
def _bf16_products() -> Iterator[None]:
    """fp32 GEMMs that round their inputs to bf16 and sum in fp32: exact for inputs that came from bf16, and faster."""
    settings = getattr(torch.backends.mkldnn, "matmul", None)  # since torch 2.9
    if settings is None:
        yield
        return
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _block(x: Tensor) -> int:
    """Rows of ``[V, H]`` in one block."""
    return max(1, _BLOCK_BYTES // (4 * x.shape[1]))


@functools.cache
def _mixed_addmm(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this PyTorch adds a 16-bit product to an fp32 matrix in one GEMM (some releases refuse)."""
    total = torch.zeros(16, 16, device=device)
    half = torch.zeros(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(total, half, half, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return True
