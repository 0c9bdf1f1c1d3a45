"""Setup for every machine: compiled kernels on a GPU, Triton's interpreter elsewhere."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    from . import interpreter  # noqa: F401

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
