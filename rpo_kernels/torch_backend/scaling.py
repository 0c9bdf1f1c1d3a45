"""Multiplication of gradients that are ready by the upstream gradient, unless that is 1."""

import torch


def scale(x: torch.Tensor, factor: torch.Tensor) -> None:
    """x *= factor in place; on a CPU reading the factor needs no synchronisation."""
    if x.device.type == "cpu":
        if float(factor) != 1.0:
            x.mul_(factor)
    elif x.dtype == torch.float32:
        x.mul_(factor)
    else:  # a GPU would round the factor to the dtype of x
        x.copy_(x.float().mul_(factor))
