"""Choice of the backend: Triton kernels or their PyTorch counterparts."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch

BACKENDS = ("auto", "triton", "torch")
ON_CPU = "RPO_KERNELS_ON_CPU"


@functools.cache
def module_of(op: str, backend: str, device: torch.device, module: str) -> ModuleType:
    """Import `kernels.<module>` or `torch_backend.<module>`; raise if the choice cannot run."""
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return importlib.import_module(f".torch_backend.{module}", __package__)
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(
            f"{op}: backend {backend!r} on a {device.type} tensor needs the package triton, which "
            "is not installed; install it or pass backend='torch'"
        )
    kernels = importlib.import_module(f".kernels.{module}", __package__)
    if device.type == "cpu" and not runs_on_cpu():
        raise RuntimeError(
            f"{op}: backend 'triton' on a CPU tensor runs in Triton's interpreter: set "
            "TRITON_INTERPRET=1 in the environment before the first kernel is imported, or pass "
            "backend='torch'"
        )
    return kernels


def runs_on_cpu() -> bool:
    """Return whether kernels may be launched on CPU tensors.

    They may in Triton's interpreter, or if the environment variable RPO_KERNELS_ON_CPU=1 says that
    something replaces Triton's launcher (a sanitizer, an emulator).
    """
    return os.environ.get(ON_CPU) == "1" or interpreted()


def interpreted() -> bool:
    """Return whether the kernels were decorated for Triton's interpreter."""
    import triton

    from .kernels.vocabulary_forward import _vocabulary_forward_kernel

    return not isinstance(_vocabulary_forward_kernel, triton.JITFunction)
