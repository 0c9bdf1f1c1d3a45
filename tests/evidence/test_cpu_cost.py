"""The CPU backend against naive PyTorch: memory, and processor time on one thread (wall time
depends on the neighbours).
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rpo_kernels import gemm

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "cpu.py"


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="resident memory is read from /proc"
)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "memory"), [("logits fp32", 0.35), ("linear bf16", 0.25), ("linear fp32", 0.25)]
)
def test_torch_backend_takes_a_fraction_of_the_memory_and_from_logits_no_more_time(
    case, memory, tmp_path
):
    """At half the rows of the benchmark; fixed costs such as the weight's gradient weigh more
    there.
    """
    if case == "linear bf16" and gemm.is_emulated(torch.empty(0, dtype=torch.bfloat16)):
        pytest.skip("without instructions for bf16, naive PyTorch takes minutes here")
    scale = "1.0" if case.startswith("logits") else "0.5"
    row = measured(tmp_path, case, "--threads", "1", "--only", "idle", "--scale", scale)
    naive, ours = row["peak_mb"].values()
    assert ours <= (memory if scale == "1.0" else 1.5 * memory) * naive
    naive, ours = row["loss"].values()
    assert ours == pytest.approx(naive, rel=2e-2)
    if case.startswith(
        "logits"
    ):  # measured at half of naive; the linear path is too near to hold on a busy machine
        assert row["idle"]["cpu_s"]["ratio"][0] <= 1


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the benchmark reads /proc")
@pytest.mark.slow
def test_torch_backend_takes_no_more_time_than_naive_on_a_busy_machine(tmp_path):
    """Measured at 0.55 of naive; 3.7 when threads shared every operator and spun at its end."""
    row = measured(tmp_path, "logits bf16", "--threads", "2", "--only", "busy", "--scale", "0.1")
    assert row["busy"]["cpu_s"]["ratio"][0] <= 1


def measured(folder: Path, case: str, *options: str) -> dict:
    """The row that benchmarks/cpu.py writes of one case."""
    out = folder / "rows.json"
    command = [sys.executable, BENCHMARK, "--rounds", "3", "--json", out, *options, case]
    subprocess.run(command, check=True, capture_output=True)
    (row,) = json.loads(out.read_text())["rows"]
    return row
