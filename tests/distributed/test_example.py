"""examples/tensor_parallel.py as its page starts it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_tensor_parallel_example_trains_and_agrees_with_one_rank():
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
    }
    environment.pop("TRITON_INTERPRET", None)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    program = [
        str(ROOT / "examples" / "tensor_parallel.py"),
        "--steps",
        "11",
        "--vocabulary",
        "101",
    ]
    done = subprocess.run(
        [*launch, *program], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    losses = [float(x) for x in re.findall(r"loss (\S+),", done.stdout)]
    assert len(losses) == 2 and losses[1] < losses[0] / 2, done.stdout
    assert (
        float(re.search(r"2 ranks of 50 rows on cpu: .* by (\S+) at most", done.stdout)[1]) < 1e-5
    ), done.stdout
