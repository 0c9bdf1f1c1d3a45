"""`python -m rpo_kernels verify` can fail: an error planted in any kernel is seen."""

# ruff: noqa: E501

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rpo_kernels.tools.cases import Quantity, judged, worst

pytest.importorskip("triton")

import torch

ROOT = Path(__file__).parents[2]
# (family of cases that must fail, file, what it says, the error)
PLANTED = {
    "forward: lost rescale": (
        "vocabulary",
        "rows",
        "* _power_of_two(top - 40)",
        "* _power_of_two(top * 0 - 40)",
    ),
    "forward: dropped mask": (
        "vocabulary",
        "rows",
        "here = valid & (cols != columns.label) &",
        "here = (cols != columns.label) &",
    ),
    "forward: off-by-one tail": (
        "vocabulary",
        "rows",
        "if tail < columns.width:",
        "if tail < columns.width - 1:",
    ),
    "entropy: lost rescale": (
        "entropy",
        "vocabulary_forward",
        "log2_mantissa - rest_moment / total",
        "log2_mantissa - moment / total",
    ),
    "backward: wrong sign": (
        "vocabulary",
        "vocabulary_backward",
        "at_label = -coef",
        "at_label = coef",
    ),
    "backward: dropped mask": (
        "vocabulary",
        "vocabulary_backward",
        "d.to(dlogits_ptr.dtype.element_ty), mask=at_edge)",
        "d.to(dlogits_ptr.dtype.element_ty), mask=edge_cols >= 0)",
    ),
    "backward: off-by-one tail": (
        "vocabulary",
        "vocabulary_backward",
        "tl.minimum(head, width), width)",
        "tl.minimum(head, width), width - 1)",
    ),
    "sums: dropped mask": (
        "objectives",
        "sequences",
        "scored = scored & (label != n.ignore_index)",
        "scored = scored & (label != -101)",
    ),
    "sums: off-by-one tail": (
        "objectives",
        "sequences",
        "scored = token < end[:, None]",
        "scored = token < end[:, None] - 1",
    ),
    "groups: wrong sign": ("groups", "responses", "d = si[:, None] - s", "d = s - si[:, None]"),
    "groups: lost rescale": (
        "groups",
        "responses",
        "sum_s = sum_s * tl.exp(top_s - base) + added",
        "sum_s = sum_s + added",
    ),
    "scaling: off-by-one tail": (
        "linear",
        "scaling",
        "element_ty), mask=offsets < left)",
        "element_ty), mask=offsets < left - 1)",
    ),
}

# Heavy imports once; then a process per package, forked before it imports the kernels.
PROGRAM = """
import os, sys, torch, networkx, triton, triton.language, contextlib, io
torch.set_num_threads(1)
for line in sys.stdin:
    place, *words = line.split()
    child = os.fork()
    if child == 0:
        sys.path.insert(0, place)
        from rpo_kernels.__main__ import main
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            code = main(["verify", "--quick", "--only", *words])
        import rpo_kernels
        assert rpo_kernels.__file__.startswith(place)
        failed = sorted({row.split()[0] for row in out.getvalue().splitlines() if row.endswith("FAIL")})
        print(place, code, *failed, flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print(place, "crashed", flush=True)
"""


# A few cases of each family. Logits lie among NaNs and gradients take their place, so that no
# dropped mask reaches foreign memory.
CASES = {
    "vocabulary": "vocabulary 2x3x4097 float32 place",
    "entropy": "vocabulary 2x3x4097 float32 entropy",
    "objectives": "objectives dpo",
    "groups": "groups 70 listwise",
    "linear": "linear squared float32",
}


def test_verify_sees_an_error_planted_in_each_kernel_and_passes_without(tmp_path):
    jobs = {}
    sound = {f"{family}: sound": (family, None, "", "") for family in CASES}
    for i, (name, (family, file, says, error)) in enumerate((PLANTED | sound).items()):
        jobs[place := tmp_path / str(i)] = name, family
        shutil.copytree(
            ROOT / "rpo_kernels",
            place / "rpo_kernels",
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        if file:
            path = place / "rpo_kernels" / "kernels" / f"{file}.py"
            source = path.read_text()
            assert says in source, f"{name}: kernels/{file}.py has changed; plant the error anew"
            path.write_text(source.replace(says, error))
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        input="\n".join(f"{place} {CASES[family]}" for place, (_, family) in jobs.items()),
    )
    results = {Path(line.split()[0]): line.split()[1:] for line in done.stdout.splitlines()}
    assert len(results) == len(jobs), done.stderr
    for place, (name, family) in jobs.items():
        expected = ["0"] if name.endswith(": sound") else ["1", CASES[family].split()[0]]
        assert results[place] == expected, (name, results[place], done.stderr)


def test_verify_fails_a_case_for_any_output_that_is_nan_or_beyond_its_bound():
    nan, inf = float("nan"), float("inf")
    truth = torch.tensor([1.0, -inf, nan], dtype=torch.float64)
    assert worst(truth.float(), truth) == 0
    assert worst(torch.tensor([1.0, -inf, 0.0]), truth) == inf
    assert worst(torch.tensor([nan, -inf, nan]), truth) == inf
    theirs = truth.float() + 1e-6
    assert judged("x", theirs, theirs, truth, 0.0).share() <= 1
    assert judged("x", truth.float() + 2e-6, theirs, truth, 0.0).share() > 1
    assert Quantity("x", 0, 0, 0).share() == 0 and Quantity("x", 1, 0, 0).share() == inf
