"""Compare every kernel with the float64 reference on this machine, next to plain PyTorch.

A case passes if no output's error exceeds 1.5 times that of PyTorch in the same dtype, plus the
roundings of its arithmetic. Each row shows the output that is closest to its bound: largest
absolute error, PyTorch's, and the bound. Outputs are filled with NaN before each launch, and so is
all memory around the logits.

Kernels run compiled if there is a GPU, and in Triton's interpreter otherwise. Exit code 1 if a case
fails.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from .cases import Case, Machine, Quantity, cases
from .needs import positive, require
from .table import lines, show

COLUMNS = {
    "family": "family",
    "case": "case",
    "dtype": "dtype",
    "shape": "shape",
    "seed": "seed",
    "quantity": "closest to its bound",
    "error": "error",
    "pytorch": "PyTorch's",
    "allowed": "allowed",
    "verdict": "verdict",
}
# as wide as results are
TYPICAL: dict[str, Any] = dict.fromkeys(("error", "pytorch", "allowed"), 1.11e-10) | dict.fromkeys(
    ("quantity", "verdict"), "ok"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        choices=("triton", "torch"),
        default="triton",
        help="the kernels (default), or the PyTorch backend that serves CPUs",
    )
    parser.add_argument(
        "--quick", action="store_true", help="some of the cases, about a minute on two cores"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="first seed of the inputs (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds", type=positive, help="how many seeds (default: 1 if quick, else 3)"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="WORD",
        help="only cases whose row holds each of these words: vocabulary, objectives, groups, "
        "linear, float16, dpo, 2x3x4097, ...",
    )
    parser.add_argument(
        "--json", action="store_true", help="print every output of every case as JSON"
    )


def machine(backend: str) -> Machine:
    """Return this machine.

    Without a GPU, kernels are interpreted, which is decided when they are imported.
    """
    gpu = torch.cuda.is_available()
    if backend == "triton":  # its interpreter uses numpy
        needed = ("triton",) if gpu else ("triton", "numpy")
        require("verify", *needed, otherwise=", or pass --backend torch")
    if backend == "triton" and not gpu:
        os.environ["TRITON_INTERPRET"] = "1"
    return Machine("cuda" if gpu else "cpu", backend, gpu or backend == "torch")


def described(case: Case, seed: int) -> dict[str, Any]:
    """Return what is known of a case's row before it has run."""
    return {
        "family": case.family,
        "case": case.name,
        "dtype": str(case.dtype)[6:],
        "shape": case.shape,
        "seed": seed,
    }


def verified(case: Case, at: Machine, seed: int) -> dict[str, Any]:
    """Run a case, and return its row of the table."""
    quantities = case.run(at, torch.Generator().manual_seed(seed))
    closest = max(quantities, key=Quantity.share)
    return described(case, seed) | {
        "quantity": closest.name,
        "error": closest.error,
        "pytorch": closest.pytorch,
        "allowed": closest.allowed,
        "verdict": "ok" if all(x.error <= x.allowed for x in quantities) else "FAIL",
        "outputs": [vars(x) for x in quantities],
    }


def run(args: argparse.Namespace) -> int:
    at = machine(args.backend)
    how = {"torch": "the PyTorch backend"}.get(
        at.backend, "compiled kernels" if at.device == "cuda" else "Triton's interpreter"
    )
    start, seeds = (
        time.perf_counter(),
        range(args.seed, args.seed + (args.seeds or (1 if args.quick else 3))),
    )
    chosen = [case for case in cases(args.quick, at) if set(args.only) <= case.words()]
    if not chosen:
        print(f"verify: no case has the words {' '.join(args.only)}", file=sys.stderr)
        return 2
    jobs = [(case, seed) for case in chosen for seed in seeds]
    print(f"verify: {len(jobs)} cases on {at.device}, {how}", file=sys.stderr)
    rows = []

    def results() -> Iterator[dict[str, Any]]:
        for case, seed in jobs:
            rows.append(verified(case, at, seed))
            yield rows[-1]

    # numpy warns in the interpreter where IEEE arithmetic is meant to give inf or nan
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", category=RuntimeWarning, module=r"triton\.runtime\.interpreter"
        )
        if args.json:
            print(show(list(results()), COLUMNS, "json"))
        else:
            like = [described(*job) | TYPICAL for job in jobs]
            for line in lines(results(), COLUMNS, like):  # in an interpreter they take minutes
                print(line, flush=True)
    failed = sum(row["verdict"] != "ok" for row in rows)
    print(
        f"verify: {failed} of {len(rows)} cases fail ({time.perf_counter() - start:.0f} s)",
        file=sys.stderr,
    )
    return 1 if failed else 0
