"""What several tests share."""

import contextlib
from unittest import mock

import torch

HAS_GPU = torch.cuda.is_available()


def kernel_dtypes(backend: str) -> list[torch.dtype]:
    """Dtypes whose outputs this engine rounds: Triton's interpreter truncates to bf16, so that is tested on a GPU."""
    interpreted = backend == "triton" and not HAS_GPU
    return [torch.float32, torch.float16] + ([] if interpreted else [torch.bfloat16])


def worst(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest absolute error; equal infinities and NaNs agree, any other non-finite difference is infinite."""
    a, b = ours.detach().double(), truth.detach().double()
    same = (a == b) | (a.isnan() & b.isnan())
    error = torch.where(same, 0, (a - b).abs()).nan_to_num(nan=float("inf"))
    return float(error.max()) if error.numel() else 0.0


@contextlib.contextmanager
def poisoned_memory():
    """New tensors hold NaN, so that an element that is not written shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(x):
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(-(2**30))

    with (
        mock.patch.object(torch, "empty", lambda *a, **k: poison(empty(*a, **k))),
        mock.patch.object(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k))),
    ):
        yield
