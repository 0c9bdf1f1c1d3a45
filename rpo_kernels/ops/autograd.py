"""What the backward passes share."""

from __future__ import annotations

import torch
from torch import Tensor


def once_differentiable(gradient: Tensor, *sources: object) -> Tensor:
    """The gradient; to differentiate it again in one of its sources raises, instead of leaving that term out."""
    return _OnceDifferentiable.apply(gradient, *sources) if torch.is_grad_enabled() else gradient


class _OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradient: Tensor, *sources: object) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *_: Tensor) -> None:
        raise NotImplementedError("rpo_kernels: second derivatives are not implemented")
