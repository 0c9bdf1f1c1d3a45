"""What a release is: docs/install.md tells what it was tested with; and, among the slow tests, its
files are built and installed as its users do it.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import rpo_kernels

from .test_pages import cells

ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
VERSIONS = {
    row[0]: row[1:] for row in cells((ROOT / "docs" / "install.md").read_text(), "Versions")
}


def pinned(package: str) -> str:
    return re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]


def test_install_page_has_the_ranges_of_the_package_and_the_versions_that_are_tested():
    (python,) = re.findall(r'requires-python = "(.*)"', PYPROJECT)
    assert VERSIONS["python"][:2] == [python, re.search(r":: (3\.\d+)", PYPROJECT)[1]]
    for package, (taken, tested, _) in VERSIONS.items():
        if package != "python":
            assert re.search(rf"\b{re.escape(pinned(package))}\b", tested), package
            ranges = re.findall(rf'"{package}([<>=][^"]*)"', PYPROJECT)
            assert ranges == ([] if taken == "-" else [taken]), package
    makefile = (ROOT / "Makefile").read_text()
    (releases,) = re.findall(r"^test-transformers: (.*)$", makefile, re.M)
    others = re.findall(r"transformers-([\d.]+)", releases)
    assert others and all(x in VERSIONS["transformers"][1] for x in others)


def test_version_stands_in_one_place_and_heads_the_changelog():
    """In __init__.py, from where pyproject.toml reads it."""
    files = ("pyproject.toml", "CITATION.cff", "README.md", "docs/install.md")
    assert not any(rpo_kernels.__version__ in (ROOT / name).read_text() for name in files)
    heading = re.search(
        r"^## (\S+) \(\d{4}-\d\d-\d\d\)$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    assert heading[1] == rpo_kernels.__version__


# ---- built and installed -------------------------------------------------------------------------


class Environment:
    """A fresh one, without what this one has."""

    def __init__(self, folder: Path):
        venv.create(folder / "venv", with_pip=True)
        self.folder, self.python = folder, folder / "venv" / "bin" / "python"

    def run(self, *arguments: str) -> str:
        ours = {"PYTHONPATH", "TRITON_INTERPRET", "VIRTUAL_ENV"}
        environment = {k: v for k, v in os.environ.items() if k not in ours}
        options = {"cwd": self.folder, "env": environment, "capture_output": True, "text": True}
        done = subprocess.run([str(self.python), *arguments], **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def pip(self, *arguments: str) -> None:
        self.run("-m", "pip", "--quiet", "--disable-pip-version-check", *arguments)

    def install(self, *packages: str) -> None:
        self.pip("install", "-c", str(ROOT / "constraints.txt"), *packages)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """The source distribution, and the wheel that is built from it."""
    environment = Environment(tmp_path_factory.mktemp("build"))
    environment.install("build", "twine")
    source, dist = environment.folder / "source", environment.folder / "dist"
    made_here = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "*_output", "build")
    shutil.copytree(ROOT, source, ignore=made_here)
    environment.run("-m", "build", "--outdir", str(dist), str(source))
    environment.run("-m", "twine", "check", "--strict", *map(str, dist.iterdir()))
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


@pytest.fixture(scope="module")
def user(tmp_path_factory) -> Environment:
    return Environment(tmp_path_factory.mktemp("user"))


@pytest.mark.slow
def test_release_files_hold_the_whole_package_and_describe_it(built):
    package = ROOT / "rpo_kernels"
    files = {*package.rglob("*.py"), package / "py.typed", *package.rglob("*.json")}
    ours = {path.relative_to(ROOT).as_posix() for path in files}
    wheel = zipfile.ZipFile(built["wheel"])
    with tarfile.open(built["sdist"]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert ours | {"LICENSE", "README.md", "pyproject.toml"} <= names
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == ours
    (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    lines = wheel.read(metadata).decode().splitlines()
    for line in (
        f"Version: {rpo_kernels.__version__}",
        "Author: rpo_kernels contributors",
        "License-Expression: Apache-2.0",
        "Requires-Dist: torch>=2.8",
        "Project-URL: Paper, https://arxiv.org/abs/2502.00203",
        "Description-Content-Type: text/markdown",
    ):
        assert line in lines, line
    assert not [line for line in lines if line.startswith("Classifier:") and "GPU" in line]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_release_files_work_in_a_fresh_environment(kind, built, user, tmp_path):
    user.pip("uninstall", "--yes", "rpo-kernels")
    user.install(str(built[kind]))
    info = json.loads(user.run("-m", "rpo_kernels", "info", "--json"))
    assert info["rpo_kernels"] == rpo_kernels.__version__
    assert info["transformers"] == info["trl"] == "not installed"
    user.run("-m", "rpo_kernels", "verify", "--backend", "torch", "--quick")
    user.run("-m", "rpo_kernels", "hub", str(tmp_path / "kernel"))
    program = "import rpo_kernels as r; print(sorted(r.__all__), r.__file__)"
    names, file = user.run("-c", program).rsplit(" ", 1)
    assert ast.literal_eval(names) == rpo_kernels.__all__
    assert Path(file.strip()).is_relative_to(Path(user.folder, "venv"))
