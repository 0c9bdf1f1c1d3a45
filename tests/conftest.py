"""Setup for every machine: compiled kernels on a GPU, Triton's interpreter elsewhere."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is decorated, which reads it

import pytest

if not torch.cuda.is_available():
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def _fma(self, x, y, z):
        """Round once, as on a chip; the interpreter rounds the product, too."""
        with np.errstate(all="ignore"):
            exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(
                np.float64
            )
            return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    InterpreterBuilder.create_fma = _fma

torch.set_num_threads(
    max(1, (os.cpu_count() or 2) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(params=["torch", "triton"])
def backend(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
