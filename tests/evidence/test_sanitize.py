"""What `make sanitize` covers, its hook, and, where ttsem is, that it finds faults."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ..helpers import compiling
from . import sanitize

KERNELS = Path(sanitize.rpo_kernels.__file__).parent / "kernels"


def test_sanitize_has_a_case_for_every_kernel():
    source = "\n".join(file.read_text() for file in KERNELS.glob("*.py"))
    kernels = set(re.findall(r"^def _(\w+)_kernel\(", source, re.M))
    launched = {name for kernels, *_ in sanitize.CASES.values() for name in kernels.split()}
    assert len(kernels) == len(launched) > 5
    assert all(kernel.endswith(tuple(launched)) for kernel in kernels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("odd", [False, True])
def test_sanitize_places_tensors_in_memory_of_their_own_size(odd, dtype):
    x = sanitize.placed(torch.arange(21).to(dtype).view(3, 7), odd)
    assert x.tolist() == torch.arange(21).view(3, 7).tolist()
    assert x.data_ptr() % 16 == odd * x.element_size()
    assert x.untyped_storage().nbytes() == 21 * x.element_size()


@pytest.mark.parametrize("fault", sanitize.PLANTED)
def test_sanitize_plants_its_faults_once(fault):
    """Or it would say that they are missed."""
    file, old, *_ = sanitize.PLANTED[fault]
    assert (KERNELS / file).read_text().count(old) == 1


@pytest.mark.parametrize("fault", sanitize.PLANTED)
def test_sanitize_finds_what_is_planted(fault):
    pytest.importorskip("ttsem")
    assert sanitize.missed(fault) == ""


@pytest.mark.parametrize("executed, error", [("1", ""), ("", "set TRITON_INTERPRET=1")])
def test_backend_compiles_for_a_cpu_only_where_something_executes_it(executed, error):
    code = """
import torch
from rpo_kernels.backend import module_of
print(module_of("scale", "triton", torch.device("cpu"), "scaling").__name__)
"""
    environment = compiling(RPO_KERNELS_ON_CPU=executed)
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert error in run.stderr if error else run.stdout == "rpo_kernels.kernels.scaling\n"
