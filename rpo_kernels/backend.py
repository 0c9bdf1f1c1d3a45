"""Which engine runs a row function: Triton kernels or their PyTorch counterparts."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch

BACKENDS = ("auto", "triton", "torch")


@functools.cache
def engine(op: str, backend: str, device: torch.device, module: str) -> ModuleType:
    """``kernels.<module>`` or ``torch_engine.<module>``; an explicit choice that cannot run
    raises.
    """
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return importlib.import_module(f".torch_engine.{module}", __package__)
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(
            f"{op}: backend {backend!r} on a {device.type} tensor needs the package triton, which "
            "is not installed; "
            "install it or pass backend='torch'"
        )
    kernels = importlib.import_module(f".kernels.{module}", __package__)
    if device.type == "cpu" and not interpreted():
        raise RuntimeError(
            f"{op}: backend 'triton' on a CPU tensor runs in Triton's interpreter: set "
            "TRITON_INTERPRET=1 in the environment "
            "before the first kernel is imported, or pass backend='torch'"
        )
    return kernels


def interpreted() -> bool:
    """Whether the kernels were decorated for Triton's interpreter."""
    import triton

    from .kernels.vocabulary_forward import _vocabulary_forward_kernel

    return not isinstance(_vocabulary_forward_kernel, triton.JITFunction)
