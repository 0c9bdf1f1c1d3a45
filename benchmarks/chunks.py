"""Rows per chunk of logits and workspaces of the linear path: time and memory on this GPU.

    python benchmarks/chunks.py [--results FILE] [--budget SECONDS] [--dry-run]

Each is checked against float64, then timed with the pair loss. The best values have to be copied to
`GPU_CHUNK_ROWS` in `rpo_kernels/ops/head.py` by hand. (`python -m rpo_kernels tune` tunes launch
settings of the row passes.) A dry run on a CPU goes through the same steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from cases import PARTS, QWEN, SEQUENCES, TINY, Case
from measure import Ceilings, Step, check, peak_bytes
from providers import Ours
from results import ROOT, about
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


def timings(
    sizes: dict, device: str, ceilings: Ceilings, ends: float, save: Callable[[list[dict]], None]
) -> list[dict]:
    """Time each size; `save` is called after each, because a run may be interrupted."""
    case = Case(next(part for part in PARTS if part.group_size == 2), *sizes["case"])
    inputs, limit = [case.inputs(device)], ceilings.limit(case)[0]
    truth, found = truth_of(case, inputs[0]), []
    constant = "GPU_CHUNK_ROWS" if device == "cuda" else "CPU_CHUNK_ROWS"
    for chunk, workspace in sizes["chunks"]:
        if time.monotonic() > ends:
            print("the time budget is spent")
            break
        provider = Ours()
        provider.options = {"workspace_bytes": workspace}
        with mock.patch.object(head, constant, chunk):
            step = Step(case, provider, inputs)
            row = {"case": case.id, "chunk_rows": chunk, "workspace_bytes": workspace}
            if verdict := check(step, truth).verdict:
                found.append({**row, "status": "wrong", "error": verdict})
                continue
            seconds(step, step.prepare, device, 2)
            median = statistics.median(seconds(step, step.prepare, device, sizes["rounds"]))
            row |= {
                "status": "ok",
                "median_s": median,
                "peak_bytes": peak_bytes(step, device),
                "limit_s": limit,
            }
            found.append(row)
        save(found)
        print(
            f"chunks of {chunk} rows, workspace {workspace >> 20} MiB: {median / limit:.2f} x its "
            "bare GEMMs"
        )
    return found


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
    ends, ceilings = time.monotonic() + args.budget, Ceilings(device)
    facts = about(device, "dry run" if args.dry_run else "full", copy_rate=ceilings.copy_rate)
    args.results.parent.mkdir(parents=True, exist_ok=True)

    def save(rows: list[dict]) -> None:
        lines = ",\n  ".join(map(json.dumps, rows))
        args.results.write_text(
            f'{{\n "about": {json.dumps(facts, indent=1)},\n "chunks": [\n  {lines}\n ]\n}}\n'
        )

    save(timings(DRY if args.dry_run else FULL, device, ceilings, ends, save))


if __name__ == "__main__":
    main()
