"""Multiplication of gradients that are ready by the upstream gradient, unless that is 1."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import on_device_of

_BLOCK = 4096
_PROGRAMS = 1024  # several per multiprocessor; an idle program costs nanoseconds


@triton.jit(do_not_specialize=["size"], do_not_specialize_on_alignment=["x_ptr", "factor_ptr"])
def _scale_kernel(
    x_ptr,  # inout [size] any float
    factor_ptr,  # in    [] fp32
    size,
    ALIGNED: tl.constexpr,  # x begins at a multiple of 16 bytes, and size is a multiple of 16
    BLOCK: tl.constexpr,
):
    """Cost: one read and write of x, or one load per program if the factor is 1."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, step):
            at = x_ptr + start
            left = size - start
            if ALIGNED:
                at = tl.multiple_of(at, 16)
                left = left // 16 * 16
            offsets = tl.arange(0, BLOCK)
            x = tl.load(at + offsets, mask=offsets < left, other=0.0).to(tl.float32)
            tl.store(at + offsets, (x * factor).to(x_ptr.dtype.element_ty), mask=offsets < left)


def scale(x: torch.Tensor, factor: torch.Tensor) -> None:
    """x *= factor in place; x is contiguous, factor fp32 `[]`."""
    size = x.numel()
    if size:
        aligned = x.data_ptr() % 16 == 0 and size % 16 == 0
        with on_device_of(x):
            _scale_kernel[(min(_PROGRAMS, -(-size // _BLOCK)),)](
                x, factor, size, ALIGNED=aligned, BLOCK=_BLOCK, num_warps=8
            )
