"""Commands in the README, CONTRIBUTING, docs and examples run exactly as printed."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:python|make|torchrun) .+")
LONG = "more than three minutes on a CPU"
ELSEWHERE = "makes an environment of its own"
OWN = "stands for files of the reader's own"
# Commands that are not run, and why.
NOT_RUN = {
    "make demo": f"{LONG}; tests/evidence/test_demo.py runs it with a small model",
    'make demo ARGS="--model DIR --data FILE.jsonl --objective dpo --beta 0.1 --steps 50"': OWN,
    "make test": "this suite",
    "make study": f"{LONG}; tests/evidence/test_study.py runs it in miniature",
    'make study ARGS="--full"': "hours",
    "make test-slow": "these tests, and others like them",
    "make test-transformers": ELSEWHERE,
    "make lint": ELSEWHERE,
    "make check": ELSEWHERE,
    "make docs": f"{ELSEWHERE}; tests/evidence/test_docs_site.py builds the site",
    "make notebook": f"{ELSEWHERE}; tests/evidence/test_docs_site.py runs the notebook",
    "make sanitize": f"{ELSEWHERE}; tests/evidence/test_sanitize.py runs some cases",
    "make bench": f"{LONG}; tests/evidence/test_benchmarks.py runs it with --smoke",
    "make gpu": "needs a GPU",
    "python -m build": f"{ELSEWHERE}; tests/evidence/test_release.py runs it",
    "python -m twine check --strict dist/*": "follows `python -m build`",
    "python -m rpo_kernels verify": f"{LONG}; tests/evidence/test_verify.py runs it with --quick",
    "python -m rpo_kernels audit": f"{LONG}; tests/evidence/test_compile.py audits every chip",
    "python examples/align.py": f"{LONG}; what `make demo` runs",
    "python examples/align.py --model DIR --data FILE.jsonl": OWN,
    "python train_dpo.py config.yaml": f"{OWN}; tests/adapters/test_hosts.py runs the code",
    "python examples/transformers_loop.py --model DIR --data FILE.jsonl": OWN,
    "python examples/trl_rpo.py --model DIR --data FILE.jsonl": OWN,
    "python benchmarks/cpu.py": f"{LONG}; tests/evidence/test_cpu_cost.py measures the same",
}
GPU_ONLY = {"python -m rpo_kernels tune --vocab 151936 --dtype bfloat16 --output table.json"}


def commands_in(lines: list[str]) -> list[str]:
    """Without the remarks behind them."""
    stripped = (re.split(r"\s+#\s", line)[0].strip() for line in lines)
    return [line for line in stripped if COMMAND.fullmatch(line)]


def printed_commands() -> dict[str, str]:
    """Each with the first file that prints it."""
    found: dict[str, str] = {}
    for page in PAGES:
        # tables are made by a command that stands beside them
        text = re.sub(r"<!-- .*? table.*?<!-- end -->", "", page.read_text(), flags=re.DOTALL)
        # and what made the results of the study stands beside them
        text = re.sub(r"^- `.*`: rpo_kernels.*$", "", text, flags=re.MULTILINE)
        fence = r"^```(\w*)\n(.*?)^```"
        blocks = re.findall(fence, text, re.DOTALL | re.MULTILINE)
        shell = "".join(lines for language, lines in blocks if language in ("", "bash", "sh"))
        outside = re.sub(fence, "", text, flags=re.DOTALL | re.MULTILINE)
        inline = re.findall(r"`([^`\n]+)`", outside)
        for command in commands_in([*shell.splitlines(), *inline]):
            found.setdefault(command, page.name)
    for example in sorted((ROOT / "examples").glob("*.py")):
        lines = (ast.get_docstring(ast.parse(example.read_text())) or "").splitlines()
        for command in commands_in([line for line in lines if line.startswith("    ")]):
            found.setdefault(command, f"examples/{example.name}")
    return found


COMMANDS = printed_commands()


def test_commands_are_found_and_those_that_are_not_run_are_still_printed():
    assert {"python examples/trl_rpo.py", "python -m rpo_kernels verify", "make test"} <= set(
        COMMANDS
    )
    assert (NOT_RUN.keys() | GPU_ONLY) <= COMMANDS.keys()


def test_commands_print_one_to_a_line():
    """A formatter of docstrings once flowed them together."""
    for command, where in COMMANDS.items():
        words = re.findall(r"(?<![\w/.-])(?:python|torchrun)(?= )", command)
        assert len(words) <= 1, f"{where}: {command}"


def test_make_tests_the_oldest_transformers_that_the_package_takes():
    oldest = re.search(r"transformers>=([\d.]+)", (ROOT / "pyproject.toml").read_text())[1]
    releases = re.search(r"^test-transformers:(.*)", (ROOT / "Makefile").read_text(), re.M)[1]
    assert releases.split()[0] == f".venv/transformers-{oldest}.0"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the sources, in which commands may write; downloads are kept where they always
    are.
    """
    folder = tmp_path_factory.mktemp("checkout") / "rpo_kernels"
    made_here = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "*_output", "build")
    shutil.copytree(ROOT, folder, ignore=made_here)
    (ROOT / ".cache").mkdir(exist_ok=True)
    (folder / ".cache").symlink_to(ROOT / ".cache")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_pages_run_as_printed(command, checkout):
    if command in NOT_RUN:
        pytest.skip(NOT_RUN[command])
    if command in GPU_ONLY and not torch.cuda.is_available():
        command += " --audit sm_90"  # as the remark beside it says
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment["PYTHONPATH"] = str(checkout)  # this checkout, wherever the package is installed
    options = {"shell": True, "cwd": checkout, "env": environment, "timeout": 1800}
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, textwrap.indent(done.stdout[-2000:] + done.stderr[-4000:], "    ")
