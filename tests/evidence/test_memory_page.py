"""docs/memory.md: the terms beside the workspace are there, and no others."""

import contextlib

import pytest
import torch

from rpo_kernels import RPOObjective, linear_rpo_loss

from ..helpers import HAS_GPU, peak_memory

V, H, S, T, W = 20_000, 256, 4, 32, 4 << 20
MIB, VH, NH = 1 << 20, V * H, S * T * H
BLOCKS = 0 if HAS_GPU else 16 * MIB + 16 * MIB * S * T // H  # of 16-bit GEMMs on a CPU
ROW_PASS = 0 if HAS_GPU else W


@pytest.mark.parametrize(
    ("dtype", "autocast", "options", "at_least", "more"),
    [
        ("float32", False, {}, 4 * VH + W * 9 // 10, 4 * NH),
        ("float32", False, {"weight_grad": True}, W * 9 // 10, 4 * NH),
        ("float32", True, {}, 4 * VH + 2 * VH, 4 * NH + 2 * NH + BLOCKS),
        ("bfloat16", False, {}, 4 * VH + 2 * VH, 2 * NH + BLOCKS),
        ("bfloat16", False, {"weight_grad": True}, W // 2, 2 * NH + BLOCKS),
    ],
    ids=["fp32", "fp32 into a buffer", "autocast", "bf16", "bf16 into a buffer"],
)
def test_memory_page_has_the_terms_of_the_measured_peak(
    dtype, autocast, options, at_least, more, device
):
    """``more``: what is not there for sure at the peak.

    Small vectors have a tenth of the workspace.
    """
    dtype = getattr(torch, dtype)
    hidden, weight = (
        torch.randn(*shape, H, device=device).to(dtype).requires_grad_() for shape in ((S, T), (V,))
    )
    labels, rewards = torch.randint(V, (S, T), device=device), torch.randn(S, device=device)
    if options:
        options = {"weight_grad": torch.zeros(V, H, device=device)}
    objective = RPOObjective("squared", 0.1, reference="none")

    def step():
        hidden.grad = weight.grad = None
        with torch.autocast(device, torch.bfloat16) if autocast else contextlib.nullcontext():
            loss = linear_rpo_loss(
                hidden, weight, labels, rewards, objective, workspace_bytes=W, **options
            ).loss
        loss.backward()

    step()  # loads code
    hidden.grad = weight.grad = None
    peak = peak_memory(step)
    most = 0 if options else 4 * VH + (0 if dtype == torch.float32 and not autocast else 2 * VH)
    assert at_least <= peak <= most + W + ROW_PASS + more + W // 10, f"{peak / MIB:.1f} MiB"
