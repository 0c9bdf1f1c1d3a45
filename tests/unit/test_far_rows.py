"""Rows beyond 2^31 elements, reached for real: three rows in a strided view over 4.3 GB, of which
only their pages are touched.
"""

from pathlib import Path

import pytest
import torch

from rpo_kernels import token_logps, token_logps_and_entropy

V, STRIDE = 33, 2**30 + 8  # the third row begins beyond 2^31
NEEDED = 5 << 30


def available(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


@pytest.mark.memory
def test_token_logps_of_rows_beyond_two_to_the_31_elements(backend, device):
    if available(device) < NEEDED:
        pytest.skip(
            f"needs {NEEDED >> 30} GiB of memory, {available(device) / 2**30:.1f} are available"
        )
    storage = torch.empty(2 * STRIDE + V, dtype=torch.float16, device=device)
    near = torch.randn(3, V, device=device).half()
    labels = torch.tensor([3, -100, 5], device=device)
    far = storage.as_strided((3, V), (STRIDE, 1))
    far.copy_(near)
    near.requires_grad_(), far.requires_grad_()
    expected = token_logps_and_entropy(near, labels, backend=backend)
    (expected_grad,) = torch.autograd.grad(sum(x.sum() for x in expected), near)
    found = token_logps_and_entropy(far, labels, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert torch.equal(torch.autograd.grad(sum(x.sum() for x in found), far)[0], expected_grad)
    # in place, the gradient is written there
    (expected_grad,) = torch.autograd.grad(token_logps(near, labels, backend=backend).sum(), near)
    logps = token_logps(far.view_as(far), labels, inplace_backward=True, backend=backend)
    (grad,) = torch.autograd.grad(logps.sum(), far)
    assert grad.data_ptr() == storage.data_ptr() and grad.stride() == (STRIDE, 1)
    assert torch.equal(far.detach(), expected_grad)
