"""Gradients that are ready before the backward, times its upstream gradient; nothing is touched
when that is 1.
"""

import torch


def scale(x: torch.Tensor, factor: torch.Tensor) -> None:
    """x *= factor in place; on a CPU reading the factor costs no synchronisation."""
    if x.device.type == "cpu":
        if float(factor) != 1.0:
            x.mul_(factor)
    elif x.dtype == torch.float32:
        x.mul_(factor)
    else:  # a GPU would round the factor to the dtype of x
        x.copy_(x.float().mul_(factor))
