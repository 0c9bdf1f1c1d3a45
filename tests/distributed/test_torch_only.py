"""An installation of torch alone, without numpy and triton: what works there works, the rest says
what it needs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rpo_kernels import token_logps

from . import ranks

ROOT = Path(__file__).parents[2]
ON_TWO_RANKS = []


def on_two_ranks(function):
    function.on_one_rank = function
    ON_TWO_RANKS.append(ranks.name_of(function))
    return function


@pytest.fixture
def without(tmp_path, monkeypatch):
    """New processes find none of these packages."""

    def hide(*packages: str) -> None:
        lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in packages)]
        (tmp_path / "sitecustomize.py").write_text("\n".join(lines))
        path = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    return hide


def columns(group) -> slice:
    return slice(5 * group.rank(), 5 * group.rank() + 5)


@on_two_ranks
def numpy_is_hidden(group):
    with pytest.raises(RuntimeError, match="Numpy is not available"):
        torch.ones(1).numpy()


@on_two_ranks
def shards_give_the_log_probabilities_of_the_whole(group):
    logits, labels = torch.randn(4, 3, 10), torch.randint(10, (4, 3))
    whole = token_logps(logits, labels)
    ours = token_logps(logits[..., columns(group)].contiguous(), labels, process_group=group)
    torch.testing.assert_close(ours, whole)


@on_two_ranks
def ranks_whose_labels_differ_are_told_so(group):
    logits, labels = torch.randn(4, 3, 5), torch.full((4, 3), group.rank())
    with pytest.raises(ValueError, match="must agree on the values of `labels`"):
        token_logps(logits, labels, process_group=group)


@on_two_ranks
def an_error_of_one_rank_is_raised_on_all(group):
    temperature = -1.0 if group.rank() else 1.0
    message = "`temperature` must be" + ("" if group.rank() else r".*\(raised by rank 1 of")
    with pytest.raises(ValueError, match=message):
        token_logps(
            torch.randn(4, 3, 5),
            torch.zeros(4, 3, dtype=torch.long),
            temperature=temperature,
            process_group=group,
        )


def test_process_group_needs_no_numpy(without, tmp_path):
    without("numpy", "triton")
    failures = ranks.run(ON_TWO_RANKS, 2, tmp_path)
    assert not any(failures.values()), "\n".join(x for each in failures.values() for x in each)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU needs no interpreter")
@pytest.mark.parametrize(
    ("command", "hidden", "missing"),
    [
        ("verify", ["triton"], "triton"),
        ("verify", ["numpy"], "numpy"),
        ("traffic", ["triton", "numpy"], "triton"),
        ("traffic", ["numpy"], "numpy"),
        ("audit", ["triton", "numpy"], "triton"),
        ("tune --vocab 99 --dtype float32 --audit sm_90 --output t.json", ["triton"], "triton"),
    ],
)
def test_commands_say_which_package_is_missing(without, command, hidden, missing):
    without(*hidden)
    done = subprocess.run(
        [sys.executable, "-m", "rpo_kernels", *command.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    said = f"{command.split()[0]}: the package {missing} is not installed; install it"
    assert done.returncode and said in done.stderr and "Traceback" not in done.stderr, done.stderr
