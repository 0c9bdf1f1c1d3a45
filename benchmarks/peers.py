"""Peers, for a machine that reaches no package registry: lists, unpacks and checks them.

    python benchmarks/peers.py [--wheels FOLDER --target FOLDER]

Without folders: how to get the wheels, and which peers this Python has. With them each wheel is
unpacked into the target, for PYTHONPATH, and peers are looked for there first. The exit code is 1
if one is missing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import zipfile
from pathlib import Path

# What the providers call.
CALLS = {
    "liger-kernel": "from liger_kernel.chunked_loss import LigerFusedLinearKTOLoss",
    "cut-cross-entropy": "from cut_cross_entropy import linear_cross_entropy",
    "trl": "from trl.kernels import ChunkedLogProbFunction; import trl.trainer.utils",
}
# The last three: what trl.trainer needs beside transformers, pandas and pyarrow.
PIP = """pip download --no-deps -d FOLDER liger-kernel==0.8.5 cut-cross-entropy trl==1.16.0 \
datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19"""


def unpack(wheels: Path, target: Path) -> None:
    """Wheels of pure Python are zip files of what an import finds."""
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as file:
            file.extractall(target)


def works(name: str, path: list[str]) -> bool:
    """In a process of its own: imports change what the next one finds."""
    code = f"import importlib.metadata as m; {CALLS[name]}; print(m.version({name!r}))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = (done.stderr if done.returncode else done.stdout).splitlines()
    print(f"{name}: {lines[-1] if lines else done.returncode}")
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheels", type=Path, metavar="FOLDER")
    parser.add_argument("--target", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    path = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    if args.wheels and args.target:
        unpack(args.wheels, args.target)
        path.insert(0, str(args.target))
    else:
        print(PIP)
    return int(not all([works(name, path) for name in CALLS]))


if __name__ == "__main__":
    sys.exit(main())
