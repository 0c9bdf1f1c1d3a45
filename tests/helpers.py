"""What several tests share."""

import contextlib
import itertools
import os
import shutil
from unittest import mock

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from rpo_kernels.ops.operator import Operator

HAS_GPU = torch.cuda.is_available()
# For what `benchmarks/host.py` does: without a GPU there is a libcuda to compile.
needs_a_driver = pytest.mark.skipif(
    not HAS_GPU and shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler"
)


def compiling(**more: str) -> dict[str, str]:
    """The environment of a process in which kernels are compiled, not interpreted."""
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | more


def kernel_dtypes(backend: str) -> list[torch.dtype]:
    """Dtypes whose outputs this backend rounds: Triton's interpreter truncates to bf16, so that is
    tested on a GPU.
    """
    interpreted = backend == "triton" and not HAS_GPU
    return [torch.float32, torch.float16] + ([] if interpreted else [torch.bfloat16])


def worst(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest absolute error; equal infinities and NaNs agree, any other non-finite difference is
    infinite.
    """
    a, b = ours.detach().double(), truth.detach().double()
    same = (a == b) | (a.isnan() & b.isnan())
    error = torch.where(same, 0, (a - b).abs()).nan_to_num(nan=float("inf"))
    return float(error.max()) if error.numel() else 0.0


@contextlib.contextmanager
def poisoned_memory():
    """New tensors hold NaN, so that an element that is not written shows."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def poison(x):
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(-(2**30))

    with (
        mock.patch.object(torch, "empty", lambda *a, **k: poison(empty(*a, **k))),
        mock.patch.object(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k))),
        mock.patch.object(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k))),
    ):
        yield


def peak_memory(step) -> int:
    """Largest number of bytes that PyTorch's allocator holds during a step, above what it held
    before.
    """
    if HAS_GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(
        itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())),
        default=0,
    )


@contextlib.contextmanager
def operator_calls():
    """Sends every call inside through torch.library, and lists (operator, arguments) as they
    came.
    """
    seen, inner = [], Operator._traced

    def recording(self, *args):
        kept = [
            x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
            for x in args
        ]
        seen.append((self, kept))
        return inner(self, *args)

    with (
        mock.patch.object(Operator, "_traced", recording),
        mock.patch.object(Operator, "on", lambda self, x: self._traced),
    ):
        yield seen
