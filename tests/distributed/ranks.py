"""Many cases in one set of gloo processes, because starting them takes longer than any case.

``python -m tests.distributed.ranks MODULE WORLD RANK FOLDER`` is one rank: it runs every case of a
module, each in a process group of its own, so that a case that fails on one rank leaves the
next one alone.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

PATIENCE = timedelta(seconds=20)  # of a collective that a failed rank does not join


def run(module: str, world: int, folder: Path) -> dict[str, list[str]]:
    """Names of the cases that ran on so many ranks, with the failures of each."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    with contextlib.ExitStack() as files:
        processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tests.distributed.ranks",
                    module,
                    str(world),
                    str(rank),
                    str(folder),
                ],
                cwd=Path(__file__).parents[2],
                env=environment,
                stdout=files.enter_context((folder / f"log{rank}").open("w")),
                stderr=subprocess.STDOUT,
            )
            for rank in range(world)
        ]
        for process in processes:
            process.wait()
    failures: dict[str, list[str]] = {}
    for rank, process in enumerate(processes):
        assert process.returncode == 0, (
            f"rank {rank}:\n{(folder / f'log{rank}').read_text()[-4000:]}"
        )
        for name, failure in json.loads((folder / f"rank{rank}.json").read_text()).items():
            failures.setdefault(name, []).extend([f"rank {rank}:\n{failure}"] if failure else [])
    return failures


def main(module: str, world: int, rank: int, folder: Path) -> None:
    with contextlib.suppress(ImportError):  # in an installation of torch alone
        from .. import interpreter  # noqa: F401
    cases: dict[str, tuple[Callable, tuple[int, ...]]] = importlib.import_module(module).CASES
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(folder / "store"), world),
        rank=rank,
        world_size=world,
        timeout=PATIENCE,
    )
    results = {}
    for name, (case, worlds) in cases.items():
        if world not in worlds or name not in os.environ.get(
            "CASES", name
        ):  # CASES: some alone, by hand
            continue
        torch.manual_seed(0)  # the same tensors on all ranks
        group = dist.new_group(timeout=PATIENCE)
        try:
            case(group)
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
    (folder / f"rank{rank}.json").write_text(json.dumps(results))
    os._exit(0)  # groups that a failed case left in disorder need no goodbye


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
