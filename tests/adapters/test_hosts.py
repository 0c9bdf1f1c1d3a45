"""docs/hosts.md inside the hosts themselves: each is installed into a folder of its own, without
its dependencies, beside the few releases that it cannot do without, and trains with and without
ours.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .snippets import DOCS

ROOT = Path(__file__).parents[2]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]

# Heading on the page, and what is installed: of torch and of the rest, what runs the suite.
HOSTS = {
    "llamafactory": (
        "LlamaFactory",
        "llamafactory==0.9.5 trl==0.24.0 transformers==5.6.0 tokenizers==0.22.2 peft==0.18.1 "
        "accelerate==1.11.0 datasets==4.0.0 einops==0.8.2 "
        "omegaconf==2.4.0 antlr4-python3-runtime==4.13.2",
    ),
    "ms_swift": (
        "ms-swift",
        "ms-swift==4.6.0 trl==0.29.1 transformers==5.17.0 peft==0.20.0 datasets==4.8.4 "
        "addict==2.4.0 einops==0.8.2 json-repair==0.64.6",
    ),
    "axolotl": (
        "axolotl",
        "axolotl==0.19.0 trl==1.9.0 transformers==5.16.1 tokenizers==0.23.1 peft==0.20.0 "
        "accelerate==1.13.0 datasets==4.8.4 addict==2.4.0 colorama==0.4.6 einops==0.8.2",
    ),
    "verl": (
        "verl",
        "verl==0.9.1 transformers==5.9.0 tokenizers==0.22.2 tensordict==0.10.0 pyvers==0.2.3 "
        "cloudpickle==3.1.3 omegaconf==2.4.0 antlr4-python3-runtime==4.13.2",
    ),
    "openrlhf": (
        "OpenRLHF",
        "openrlhf==0.11.2 transformers==5.15.0 tokenizers==0.22.2",
    ),
}


@pytest.mark.parametrize("host", HOSTS)
def test_hosts_page_names_the_releases_that_are_run(host):
    title, requirements = HOSTS[host]
    section = (DOCS / "hosts.md").read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    said = section[section.index("**Run**") :]
    release, *beside = (x.split("==")[1] for x in requirements.split())
    assert f"of {release}" in said
    for name, minor in re.findall(r"\b(trl|transformers|peft) ([\d.]+\d)", said):
        assert re.search(rf"\b{name}=={minor}\.", requirements), name


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Path:
    """Our package as pip installs it, with its entry points."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("ours")
    shutil.copytree(ROOT / "rpo_kernels", source / "rpo_kernels")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--target", str(target)]
    subprocess.run([*PIP, *options, str(source)], check=True, capture_output=True)
    return target


def installed(host: str) -> Path:
    """The folder that holds a host, kept from run to run."""
    requirements = HOSTS[host][1].split()
    folder = ROOT / ".cache" / "hosts" / host
    stamp = folder / "requirements.txt"
    if not stamp.exists() or stamp.read_text().split() != requirements:
        shutil.rmtree(folder, ignore_errors=True)
        options = ["--no-deps", "--target", str(folder), *requirements]
        done = subprocess.run([*PIP, *options], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{host} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
        shutil.rmtree(folder / "tests", ignore_errors=True)  # some ship theirs, by the name of ours
        stamp.write_text("\n".join(requirements))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS)
def test_hosts_train_alike_with_ours(host, ours, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ours, installed(host), ROOT)))
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    command = [sys.executable, "-m", "tests.adapters.hosts", host, str(tmp_path)]
    options = {"cwd": tmp_path, "env": environment, "timeout": 900}
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
