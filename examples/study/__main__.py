"""Which objective, how many responses, online or offline?

A study of these questions of the RPO paper (arXiv 2502.00203), with a small policy whose judge is
known and whose responses can all be listed.

    python -m examples.study                    the reduced study, some minutes
    python -m examples.study --full             more of every axis, ten seeds
    python -m examples.study --axes judge sft   these only

Settings differ from a base in one thing (settings.py). Runs of a seed start from the same policy,
so that differences are paired. A study that was stopped is continued. Tables with standard errors
and plots are written to --output.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

import rpo_kernels

from . import report, runs
from .results import Results
from .settings import AXES, Setting, settings


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m examples.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, cuda = parser.add_argument, torch.cuda.is_available()
    names = ", ".join(AXES)
    add("--full", action="store_true", help="all settings of every axis, and ten seeds")
    add("--axes", nargs="+", default=list(AXES), metavar="NAME", help=f"of {names}; default: all")
    add("--seeds", type=int, metavar="N", help="at least 2; default: 3, with --full 10")
    add("--workers", type=int, metavar="N", help="processes; default: as many as CPUs, 8 on a GPU")
    add("--device", default="cuda" if cuda else "cpu", help="default: %(default)s")
    add("--output", type=Path, default="study_output", metavar="DIR", help="default: %(default)s")
    add("--report", action="store_true", help="no runs: tables and plots of those in --output")
    add("--page", type=Path, metavar="FILE", help="renew tables and numbers of this page, too")
    args = parser.parse_args(arguments)
    args.command = " ".join([parser.prog, *(sys.argv[1:] if arguments is None else arguments)])
    args.seeds = (10 if args.full else 3) if args.seeds is None else args.seeds
    if args.workers is None:
        cpus = os.cpu_count() or 1
        args.workers = cpus if args.device == "cpu" else min(cpus, 8)
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device!r}: {str(error).splitlines()[0]}")
    for name in args.axes:
        if name not in AXES:
            parser.error(f"--axes {name!r}: expected some of {', '.join(AXES)}")
    if args.seeds < 2:
        parser.error(f"--seeds {args.seeds}: a standard error takes at least 2")
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: expected at least 1")
    if args.page and not args.page.exists():
        parser.error(f"--page {args.page}: no such file")
    return args


def environment(device: str) -> str:
    """Return versions, commit and device."""
    try:
        git = ["git", "-C", str(Path(__file__).parent), *"describe --always --dirty".split()]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    device = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()
    return (
        f"rpo_kernels {rpo_kernels.__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}, "
        f"{device}, commit {commit}"
    )


def fill(results: Results, args) -> None:
    """Do the missing runs, seed by seed, with a progress bar."""
    chosen = settings(args.axes, args.full)
    wanted = [(setting, seed) for seed in range(args.seeds) for setting in chosen]
    tasks = [(*run, args.device) for run in wanted if run not in results.runs]
    origin = {"command": args.command, "environment": environment(args.device)}
    with tqdm(total=len(wanted), initial=len(wanted) - len(tasks), desc="study", unit="run") as bar:

        def note(done: tuple[Setting, int, dict]) -> None:
            setting, seed, measured = done
            results.add(setting, seed, measured | origin)
            bar.set_postfix_str(f"seed {seed}, {setting}", refresh=False)
            bar.update()

        if args.workers == 1 or len(tasks) < 2:
            runs.one_thread()
            for task in tasks:
                note(runs.work(task))
        else:
            processes = min(args.workers, len(tasks))
            with multiprocessing.get_context("spawn").Pool(processes, runs.one_thread) as pool:
                for done in pool.imap_unordered(runs.work, tasks):
                    note(done)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    try:
        results = Results(args.output / "runs.jsonl")
        if not args.report:
            fill(results, args)
        elif not results.runs:
            raise ValueError(f"--report: expected runs in {results.path}, got none")
        report.write(results, args.axes, args.output, args.page)
    except ValueError as error:
        sys.exit(f"python -m examples.study: {error}")
    print(f"\nSee {args.output}/report.md, {args.output}/plots and {results.path}.")


if __name__ == "__main__":
    main()
