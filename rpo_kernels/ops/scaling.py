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
