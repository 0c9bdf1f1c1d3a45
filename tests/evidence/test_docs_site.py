"""The site that `make docs` builds, and the notebook of its first page."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rpo_kernels

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
OFFLINE = """
import socket, sys
def refuse(*arguments): raise OSError("the build asked for the network")
socket.socket.connect = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli(["build", "--strict", "--site-dir", sys.argv[1]])
"""


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


start = load("start")


def test_api_page_has_every_public_name_once():
    page = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    public = [f"rpo_kernels.{name}" for name in rpo_kernels.__all__]
    for adapter in ("transformers", "trl"):
        source = (ROOT / "rpo_kernels" / "adapters" / adapter / "__init__.py").read_text()
        names = re.findall(r'"(\w+)"', re.search(r"__all__ = \[(.*?)\]", source, re.DOTALL)[1])
        public += [f"rpo_kernels.adapters.{adapter}.{name}" for name in names]
    assert sorted(page) == sorted(public)


def test_linear_rpo_loss_of_the_front_page_runs():
    (source,) = re.findall(r"```python\n(.*?)```", (DOCS / "index.md").read_text(), re.DOTALL)
    names = {
        "hidden": torch.randn(4, 5, 8, requires_grad=True),
        "lm_head": torch.nn.Linear(8, 11, bias=False),
        "labels": torch.randint(11, (4, 5)),
        "ref_logps": -torch.rand(4),
    }
    exec(compile(source, "docs/index.md", "exec"), names)
    assert names["hidden"].grad.abs().sum() > 0


def test_start_page_and_notebook_have_the_same_code_text_and_outputs():
    page = start.PAGE.read_text(encoding="utf-8")
    notebook = json.loads(start.NOTEBOOK.read_text(encoding="utf-8"))
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    assert found == start.cells(page), "run `make notebook`"
    demo = json.loads(start.DEMO.read_text(encoding="utf-8"))
    text, plots = start.filled(page, notebook, demo)
    assert text == page, "run `make notebook`"
    assert len(plots) == 1
    assert [(start.PLOTS / f"{i}.png").read_bytes() for i in range(1, len(plots) + 1)] == plots


@pytest.mark.slow
def test_start_page_has_a_policy_that_learns_and_a_loss_that_saves_memory():
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    run = "import json, start; json.dump(start.run(start.PAGE.read_text(encoding='utf-8')), stdout)"
    command = [sys.executable, "-c", f"from sys import stdout; {run}"]
    paths = os.pathsep.join([str(ROOT), str(DOCS / "tools")])
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = paths
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    cells = json.loads(done.stdout)["cells"]
    printed = "\n".join(start.outputs(cell)[0] for cell in cells if cell["cell_type"] == "code")
    rewards = [float(reward) for reward in re.findall(r"reward ([\d.]+)", printed)]
    assert rewards[0] < 0.5 and rewards[-1] > 1.5
    naive, ours = (int(mb) for mb in re.findall(r"(\d+) MiB", printed))
    assert 0 < ours < naive / 2


@pytest.mark.slow
def test_docs_site_builds_without_a_warning_or_the_network_and_its_pages_need_none(tmp_path):
    pytest.importorskip("mkdocstrings")
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-c", OFFLINE, str(tmp_path)]
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr[-4000:]
    pages = {page: page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html")}
    assert len(pages) > 15
    for page, text in pages.items():
        loaded = re.findall(r"<(?:script|img|link)\b[^>]*?(?:src|href)=\"?(https?:[^\s\">]+)", text)
        assert loaded == [], page
        assert ":func:" not in text and "=====" not in text, page
