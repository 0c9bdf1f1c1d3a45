"""Every kernel compiled for real chips, with no GPU: registers that fit, and logits moved 16 bytes
at a time.

Compiling needs a process without Triton's interpreter: this file is also the program of that
process, one per chip.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from rpo_kernels.kernels.launch import assumed_arch
from rpo_kernels.kernels.rows import RowFlags
from rpo_kernels.objectives import COMPARISONS, DISTANCES
from rpo_kernels.tools.audit import AROUND_BYTES, GROUP_PASS_BYTES, audited
from rpo_kernels.tools.chips import CHIPS
from rpo_kernels.tools.variants import Variant, meta, variants

from ..helpers import compiling

ROOT = Path(__file__).parents[2]
FAST = ("sm_90",)  # `make test-slow` has the others, and all variants of this one


@triton.jit
def _single_elements_kernel(x_ptr, out_ptr, V, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + cols * 3, mask=cols < V, other=0.0)
        tl.store(x_ptr + cols * 3, x * 2, mask=cols < V)
        total += tl.exp2(x) + tl.exp2(-x)
    tl.store(out_ptr + tl.arange(0, BLOCK), total)


def main(name, is_full=False):
    """Audit the variants for one chip, and a control with every fault; print the rows as JSON.

    All variants, or those that need the fewest and the most registers.
    """
    rows = []
    for variant in variants(full=is_full):
        elsewhere = not is_full and variant.dtype == torch.float16
        # the other options compile to the same loops
        plain = variant.name in (
            "bfloat16, unaligned",
            "float32, unaligned",
        )
        if elsewhere or (variant.V and not variant.name.endswith(", aligned") and not plain):
            continue
        with assumed_arch(name):
            launches = variant.launches()
        for launch in launches:
            rows.append(audited(name, variant, launch))
            if isinstance(flags := launch.arguments.get("FLAGS"), RowFlags):
                tile = flags.lanes * flags.vec
                rows[-1]["tile"] = tile / (launch.num_warps * CHIPS[name].target[2])
            if rows[-1]["variant"] == "harmonic":
                starve = {"maxnreg": 64} if CHIPS[name].target[0] == "cuda" else {"waves_per_eu": 8}
                starved = audited(name, variant, launch, **starve)
    control = Variant(
        "control",
        lambda: _single_elements_kernel[(1,)](meta(5003), meta(256), 5003, BLOCK=256),
        torch.float32,
        5003,
    )
    (launch,) = control.launches()
    code = launch.compile(triton.backends.compiler.GPUTarget(*CHIPS[name].target))
    spills = bool(re.search(r"\b(LDL|STL|scratch_store)", code.instructions))
    print(
        json.dumps(
            [*rows, starved, audited(name, control, launch) | {"spill_instructions": spills}]
        )
    )


@pytest.mark.parametrize(
    ("name", "is_full"),
    [
        *((name, False) for name in FAST),
        *(
            pytest.param(name, name == "sm_90", marks=pytest.mark.slow)
            for name in CHIPS
            if name == "sm_90" or name not in FAST
        ),
    ],
)
def test_audit_finds_kernels_in_registers_and_accesses_of_sixteen_bytes(name, is_full, tmp_path):
    environment = compiling(TRITON_CACHE_DIR=str(tmp_path))
    command = [sys.executable, "-m", "tests.evidence.test_compile", name, *["full"] * is_full]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    *rows, starved, control = json.loads(done.stdout.splitlines()[-1])
    group_passes = len(DISTANCES) * len(COMPARISONS) + 6
    assert len(rows) == (
        (12 + 2) * 2 + 3 + 1 + group_passes if is_full else (4 + 1 + 2) * 2 + 3 + 1 + 2
    )
    for row in rows:
        assert row["verdict"] == "ok", row
        if row["kernel"] == "group_pass":
            assert row["local_bytes"] <= GROUP_PASS_BYTES, row
        elif row["kernel"] == "shards_combine":  # twelve numbers a row: their width does not matter
            assert row["local_bytes"] == 0, row
        else:
            assert row["local_bytes"] <= AROUND_BYTES and row["load"] == 16, row
            assert row["store"] == (None if "forward" in row["kernel"] else 16), row
        if (
            "tile" in row
        ):  # the loop that was counted takes whole tiles, with at least an exponential per element
            assert row["elements"] % row["tile"] == 0, row
            options = row["variant"].split(",")[0].split()[1:]
            expected = 1 + ("softcap" in options)
            assert row["special"] < row["instructions"], row
            assert row["exponentials"] == expected <= row["special"], row
            if not options:
                exponentials_bind = (
                    name == "sm_100" and "forward" in row["kernel"] and "16" in row["variant"]
                )
                assert row["bandwidth_ratio"] >= (1.15 if exponentials_bind else 1.3), row
            if options == ["entropy"]:
                assert row["bandwidth_ratio"] >= 1.15, row
    assert starved["local_bytes"] > GROUP_PASS_BYTES and starved["verdict"].startswith("spills"), (
        starved
    )
    assert control["verdict"] == "FAIL: scalar loads and stores" and (
        control["load"],
        control["store"],
    ) == (4, 4), control
    assert control["exponentials"] == control["special"] == 2, control


if __name__ == "__main__":
    main(sys.argv[1], is_full="full" in sys.argv)
