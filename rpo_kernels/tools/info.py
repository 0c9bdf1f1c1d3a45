"""Print versions, devices, backends and the launch settings that this machine uses."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
from typing import Any

import torch

from .. import __version__
from .variants import VOCABULARIES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def facts() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    found: dict[str, Any] = {
        "rpo_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "trl": _version("trl"),
        "system": platform.platform(),
        "processors": f"{os.cpu_count()}, of which torch uses {torch.get_num_threads()}",
        "devices": [f"{x.name}, {x.total_memory / 2**30:.0f} GiB" for x in gpus] or ["cpu"],
        "backend auto": "triton on tensors of the GPU, torch on those of the CPU"
        if gpus
        else "torch",
        "backend triton": _triton_runs(bool(gpus)),
        "backend torch": "available",
    }
    if importlib.util.find_spec("triton") is not None:
        found["launch settings"] = _launch_settings()
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _triton_runs(gpu: bool) -> str:
    if importlib.util.find_spec("triton") is None:
        return "not available: the package triton is not installed"
    if gpu:
        return "compiled"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return (
        "interpreted"
        if interpreted
        else "interpreted, in a process that starts with TRITON_INTERPRET=1"
    )


def _launch_settings() -> dict[str, dict[str, int | str]]:
    from ..kernels.launch import arch_of, launch_settings

    arch = arch_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    all_of_them = itertools.product(
        ("forward", "backward"), VOCABULARIES.values(), (torch.bfloat16, torch.float32)
    )
    return {
        f"{op}, V = {V}, {str(dtype)[6:]}, {arch}": vars(
            launch_settings(op, V, dtype.itemsize, arch)
        )
        for op, V, dtype in all_of_them
    }


def run(args: argparse.Namespace) -> int:
    found = facts()
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    for name, value in found.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, settings in value.items():
                print(f"  {key:42}{', '.join(f'{k} {v}' for k, v in settings.items())}")
        else:
            print(f"{name:18}{', '.join(value) if isinstance(value, list) else value}")
    return 0
