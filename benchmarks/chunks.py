"""Rows per chunk of logits and workspaces of the linear path: time and memory on this GPU.

    python benchmarks/chunks.py [--results FILE] [--budget SECONDS] [--dry-run]

Each is checked against float64 before it is timed. What is found goes into `GPU_CHUNK_ROWS` of
`rpo_kernels/ops/head.py` by hand. Launch settings of the row passes are tuned by `python -m
rpo_kernels tune`. A run that was cut short goes on with its FILE. A dry run goes through the
motions on a CPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from unittest import mock

import torch
from cases import PARTS, QWEN, SEQUENCES, TINY, Case
from measure import Ceilings, Step, check, peak_of
from providers import Ours
from results import ROOT, Results, about
from truth import truth_of

from rpo_kernels.ops import head
from rpo_kernels.tools.timing import seconds

ROWS, WORKSPACES = (512, 2048, 4096), (1 << 30, 1 << 29, 1 << 31, 1 << 32)
FULL = {
    "case": (QWEN, 8192),
    "rounds": 15,
    "chunks": [(1024, w) for w in WORKSPACES] + [(rows, 1 << 30) for rows in ROWS],
}
DRY = {"case": (TINY, 4 * SEQUENCES), "rounds": 1, "chunks": [(8, 1 << 20), (16, 1 << 20)]}


def timings(sizes: dict, device: str, ends: float, found: Results) -> None:
    """Rows are saved one by one: a run may be cut short, and goes on behind them."""
    case = Case(next(part for part in PARTS if part.loss == "dpo"), *sizes["case"])
    inputs, limit = [case.inputs(device)], Ceilings(device).limit(case)[0]
    truth = truth_of(case, inputs[0])
    constant = "GPU_CHUNK_ROWS" if device == "cuda" else "CPU_CHUNK_ROWS"
    for chunk, workspace in sizes["chunks"]:
        row = {"case": case.id, "chunk_rows": chunk, "workspace_bytes": workspace}
        if found.find(**row):
            continue
        if time.monotonic() > ends:
            print("the time budget is spent")
            break
        provider = Ours()
        provider.options = {"workspace_bytes": workspace}
        with mock.patch.object(head, constant, chunk):
            step = Step(case, provider, inputs)
            if verdict := check(step, truth).verdict:
                found.put({**row, "status": "wrong", "error": verdict})
                continue
            seconds(step, step.prepare, device, 2)
            median = statistics.median(seconds(step, step.prepare, device, sizes["rounds"]))
            row |= {
                "status": "ok",
                "median_s": median,
                "peak_bytes": peak_of(step, device),
                "limit_s": limit,
            }
            found.put(row)
        print(
            f"chunks of {chunk} rows, workspace {workspace >> 20} MiB: {median / limit:.2f} x its "
            "bare GEMMs"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        default=ROOT / "benchmarks" / "results" / "chunks.json",
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=float("inf"),
        metavar="SECONDS",
        help="begin nothing after this",
    )
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not args.dry_run else "cpu"
    if device == "cpu" and not args.dry_run:
        parser.error(
            "chunks are timed on a GPU, and there is none; --dry-run goes through the motions"
        )
    ends = time.monotonic() + args.budget
    facts = about(device, "dry run" if args.dry_run else "full")
    found = Results(args.results, facts, ("case", "chunk_rows", "workspace_bytes"))
    timings(DRY if args.dry_run else FULL, device, ends, found)


if __name__ == "__main__":
    main()
