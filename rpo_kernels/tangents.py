"""Forward-mode derivatives, which are not implemented."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def check_tangents(op: str, *tensors: Tensor | None) -> None:
    """Raise for forward-mode derivatives: otherwise tangents would be dropped silently."""
    if forward_ad._current_level >= 0:  # of `dual_level`, which torch.func.jvp enters too
        if torch.compiler.is_compiling():  # here functions lose their jvp
            raise NotImplementedError(f"{op}: forward-mode derivatives are not implemented")
        for x in tensors:
            if x is not None and x.is_floating_point():
                _Tangentless.apply(x, op)


class _Tangentless(torch.autograd.Function):
    """Identity that raises in its jvp; it sees tangents below other transforms of torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, op: str) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.op = inputs[1]

    @staticmethod
    def jvp(ctx: Any, *_: Tensor) -> None:
        raise NotImplementedError(f"{ctx.op}: forward-mode derivatives are not implemented")
