"""In-place scaling of gradients by a scalar on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import engine


@torch.library.custom_op("rpo_kernels::scale_", mutates_args=("x",))
def scale_(x: Tensor, factor: Tensor, backend: str) -> None:
    engine("scale", backend, x.device, "scaling").scale(x, factor.detach().float())


@scale_.register_fake
def _(x, factor, backend):
    return None


@torch.library.custom_op("rpo_kernels::require_one", mutates_args=())
def require_one(upstream: Tensor) -> Tensor:
    """The upstream gradient of a loss whose weight gradient has been added to ``weight_grad``: 1, or NaN where none may look."""
    if upstream.device.type == "cpu" and float(upstream) != 1:
        raise ValueError(
            "linear_rpo_loss: with `weight_grad` the upstream gradient of the loss must be 1, got "
            f"{float(upstream):g}: that buffer has taken in its gradient already; scale by `normalizer` instead of the loss"
        )
    return torch.where(upstream == 1, upstream, torch.nan)


@require_one.register_fake
def _(upstream):
    return torch.empty_like(upstream)
