"""Gradients that are ready before the backward, times its upstream gradient; nothing is touched when that is 1."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import on_its_device

_BLOCK = 4096
_PROGRAMS = 1024  # several per multiprocessor; a program that has nothing to do costs nanoseconds


@triton.jit
def _scale_kernel(
    x_ptr,  # inout [size] any float
    factor_ptr,  # in    [] fp32
    size,
    BLOCK: tl.constexpr,
):
    """Cost: one read and write of x, or one load per program when the factor is 1."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, step):
            offsets = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + offsets, mask=offsets < size, other=0.0).to(tl.float32)
            tl.store(x_ptr + offsets, (x * factor).to(x_ptr.dtype.element_ty), mask=offsets < size)


@on_its_device
def scale(x: torch.Tensor, factor: torch.Tensor) -> None:
    """x *= factor in place; x contiguous, factor fp32 ``[]``."""
    if x.numel():
        _scale_kernel[(min(_PROGRAMS, -(-x.numel() // _BLOCK)),)](x, factor, x.numel(), BLOCK=_BLOCK, num_warps=8)
