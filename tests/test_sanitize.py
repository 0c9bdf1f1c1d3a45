"""What `make sanitize` covers, and, where ttsem is installed, that it finds planted faults; the hook that it needs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from . import sanitize
from .helpers import compiling

KERNELS = Path(sanitize.rpo_kernels.__file__).parent / "kernels"


def test_sanitize_has_a_case_for_every_kernel():
    source = "\n".join(file.read_text() for file in KERNELS.glob("*.py"))
    kernels = set(re.findall(r"^def _(\w+)_kernel\(", source, re.M))
    launched = {name for kernels, *_ in sanitize.CASES.values() for name in kernels.split()}
    assert len(kernels) == len(launched) > 5
    assert all(kernel.endswith(tuple(launched)) for kernel in kernels)


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
def test_compiled_kernels_run_on_a_cpu_only_where_something_executes_them(executed, error):
    code = """
import torch
from rpo_kernels.backend import engine
print(engine("scale", "triton", torch.device("cpu"), "scaling").__name__)
"""
    environment = compiling(RPO_KERNELS_ON_CPU=executed)
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert error in run.stderr if error else run.stdout == "rpo_kernels.kernels.scaling\n"
