"""Tests that several gloo processes run together.

Starting the processes takes longer than any test, so one set for each number of ranks runs all the
tests of that number that a session selected. Each has its own process group, so that a test that
fails on one rank leaves the next one in order. ``python -m tests.distributed.ranks FOLDER WORLD
RANK`` is one of the processes.
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

import pytest
import torch
import torch.distributed as dist

PATIENCE = timedelta(minutes=1)  # of a collective that a failed rank does not join


def on_ranks(*worlds: int) -> Callable:
    """Make a function of a process group a test that runs on each of these numbers of ranks.

    The last number is for every run, the others for the slow suite: four ranks have all that two
    have, and a shard without columns.
    """

    def decorate(on_one_rank: Callable[[dist.ProcessGroup], None]) -> Callable:
        # one worker of xdist gets all tests of a set of processes
        marks = {world: [pytest.mark.xdist_group(f"{world} ranks")] for world in worlds}
        for world in worlds[:-1]:
            marks[world].append(pytest.mark.slow)

        @pytest.mark.parametrize("world", [pytest.param(w, marks=marks[w]) for w in worlds])
        def test(world, failures_on):
            if failures := failures_on(world)[name_of(test)]:
                pytest.fail("\n".join(failures), pytrace=False)

        for name in ("__module__", "__name__", "__qualname__", "__doc__"):
            setattr(test, name, getattr(on_one_rank, name))
        test.on_one_rank = on_one_rank
        return test

    return decorate


def name_of(test: Callable) -> str:
    return f"{test.__module__}:{test.__name__}"


def run(tests: list[str], world: int, folder: Path) -> dict[str, list[str]]:
    """The failures of each of these tests ("module:name") on so many ranks."""
    (folder / "tests.json").write_text(json.dumps(tests))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    program = [sys.executable, "-m", "tests.distributed.ranks", str(folder), str(world)]
    with contextlib.ExitStack() as files:
        processes = [
            subprocess.Popen(
                [*program, str(rank)],
                cwd=Path(__file__).parents[2],
                env=environment,
                stdout=files.enter_context((folder / f"log{rank}").open("w")),
                stderr=subprocess.STDOUT,
            )
            for rank in range(world)
        ]
        for process in processes:
            process.wait()
    failures: dict[str, list[str]] = {name: [] for name in tests}
    for rank, process in enumerate(processes):
        log = (folder / f"log{rank}").read_text()
        assert process.returncode == 0, f"rank {rank}:\n{log[-4000:]}"
        outcome = json.loads((folder / f"rank{rank}.json").read_text())
        assert outcome.keys() == failures.keys()
        for name, failure in outcome.items():
            failures[name] += [f"rank {rank}:\n{failure}"] if failure else []
    return failures


def main(folder: Path, world: int, rank: int) -> None:
    with contextlib.suppress(ImportError):  # in an installation of torch alone
        from .. import interpreter  # noqa: F401
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(folder / "store"), world),
        rank=rank,
        world_size=world,
        timeout=PATIENCE,
    )
    outcome = {}
    for name in json.loads((folder / "tests.json").read_text()):
        module, _, function = name.partition(":")
        on_one_rank = getattr(importlib.import_module(module), function).on_one_rank
        torch.manual_seed(0)  # the same tensors on all ranks
        group = dist.new_group(timeout=PATIENCE)
        try:
            on_one_rank(group)
            outcome[name] = ""
        except Exception:
            outcome[name] = traceback.format_exc()
    (folder / f"rank{rank}.json").write_text(json.dumps(outcome))
    os._exit(0)  # groups that a failed test left in disorder need no goodbye


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
