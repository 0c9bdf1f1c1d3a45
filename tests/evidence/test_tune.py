"""`tune`: which candidate wins, what the table says then, and what is refused."""

import itertools
import json

import pytest
import torch

pytest.importorskip("triton")

import triton

from rpo_kernels.kernels import launch
from rpo_kernels.tools import tune

from ..helpers import HAS_GPU
from .test_commands import ROOT, run


def two(op, V, element_size, arch, every=tune.candidates):
    return itertools.islice(every(op, V, element_size, arch), 2)


@pytest.mark.parametrize("op", tune.OPS)
def test_tune_checks_and_times_candidates_and_reports_the_winner(op, device, monkeypatch):
    monkeypatch.setattr(tune, "candidates", two)
    rows, best = tune.by_clock(op, 50, torch.float32, device, 1e9, bytes=400, rounds=2)
    assert [row["status"] for row in rows] == ["ok", "ok"] and best["median_s"] <= 1.01 * min(
        row["median_s"] for row in rows
    )
    assert "of copy at N 2, V 50" in best["evidence"]
    rows, best = tune.by_clock(op, 50, torch.float32, device, 1e9, ends=0.0, bytes=400)
    assert [row["status"] for row in rows] == ["not timed", "not timed"] and best is None


@pytest.mark.parametrize("op", tune.OPS)
def test_tune_times_no_candidate_that_is_wrong_or_fails(op, device):
    work = tune.RowPass(2, 50, torch.float32, device)
    settings = next(two(op, 50, 4, "sm_90"))
    truth = work.logps, work.dlogits
    work.logps, work.dlogits = (1.001 * x for x in truth)
    found = tune.timed(work, op, settings, 1)
    assert found["status"] == "wrong" and "median_s" not in found
    work.logps, work.dlogits = truth
    work.labels = None
    assert tune.timed(work, op, settings, 1)["status"] == "failed"


def test_tune_takes_the_fastest_settings_and_the_first_of_a_tie():
    timed = [{"status": "ok", "median_s": s} for s in (1.3, 1.005, 1.0)] + [
        {"status": "wrong", "error": 2.0}
    ]
    assert tune.winner(timed) is timed[1]
    assert tune.winner(timed[3:]) is None


def test_tune_has_only_candidates_that_are_legal_rows(tmp_path):
    file = tmp_path / "table.json"
    for arch, op, V, size in itertools.product(tune.CHIPS, tune.OPS, (100, 50_257), (2, 4)):
        settings = [
            {key: getattr(x, key) for key in tune.TUNED} for x in tune.candidates(op, V, size, arch)
        ]
        assert len({tuple(x.values()) for x in settings}) == len(settings) > 1
        at = {"arch": arch, "op": op, "element_size": size, "V_at_least": 0, "evidence": ""}
        file.write_text(json.dumps([at | x for x in settings]))
        launch.read_table(file)


def test_tune_keeps_other_rows_and_merges_equal_neighbours(tmp_path):
    one = {"lanes": 256, "vec": 8, "num_warps": 8, "num_stages": 1, "max_registers": 0}
    two = one | {"num_stages": 2}
    winners = {
        5000: one | {"evidence": "e1"},
        6000: one | {"evidence": "e2"},
        9000: two | {"evidence": "e3"},
    }
    rows = tune.table_rows("sm_90", "forward", 2, winners | {300: one | {"evidence": "e0"}})
    says = lambda rows: [(row["V_at_least"], row["num_stages"], row["evidence"]) for row in rows]
    assert says(rows) == [(0, 1, "e0"), (4096, 1, "e1"), (9000, 2, "e3")]
    file = tmp_path / "table.json"
    tune.write_table(
        file,
        [
            rows[0] | {"evidence": "small"},
            rows[1] | {"evidence": "old"},
            rows[1] | {"arch": "sm_80"},
        ],
    )
    tune.write_table(file, rows[1:])
    kept = launch.read_table(file)
    assert [row["arch"] for row in kept] == ["sm_80", "sm_90", "sm_90", "sm_90"]
    assert says(kept[1:]) == [(0, 1, "small"), (4096, 1, "e1"), (9000, 2, "e3")]


@pytest.mark.skipif(
    not triton.__version__.startswith("3.7"),
    reason="the package's rows are made with the code of triton 3.7",
)
def test_tune_by_machine_code_gives_the_packages_own_row(tmp_path):
    file = tmp_path / "table.json"
    printed = run(
        "tune",
        "--vocab",
        "151936",
        "--dtype",
        "float32",
        "--op",
        "forward",
        "--audit",
        "sm_100",
        "--output",
        file,
    )
    assert "spills" in printed  # candidates before the winner, each with what is wrong
    (row,) = json.loads(file.read_text())
    assert row in json.loads(launch.TABLE.read_text())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param(
            [],
            "there is none; --audit CHIP",
            marks=pytest.mark.skipif(HAS_GPU, reason="there is a GPU"),
        ),
        (
            ["--audit", "sm_90", "--dtype", "bfloat16", "float16"],
            "share rows of the table; name one",
        ),
        (["--audit", "sm_90", "--output", "nowhere/table.json"], "there is no folder nowhere"),
        (["--audit", "sm_90", "--output", "README.md"], "README.md is there and is no table"),
        (["--audit", "sm_91"], "invalid choice: 'sm_91'"),
        (["--audit", "sm_90", "--vocab", "-1"], "expected a positive integer"),
    ],
)
def test_tune_says_what_it_cannot_do_before_anything_is_written(
    arguments, says, monkeypatch, tmp_path, capsys
):
    from rpo_kernels.__main__ import main

    monkeypatch.chdir(ROOT)
    # which the command takes out of its process, here that of other tests
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    before = (ROOT / "README.md").read_bytes()
    try:
        code = main(
            [
                "tune",
                "--vocab",
                "100",
                "--dtype",
                "bfloat16",
                "--output",
                str(tmp_path / "t.json"),
                *arguments,
            ]
        )
    except SystemExit as ended:
        code = ended.code
    assert code == 2 and says in capsys.readouterr().err
    assert (ROOT / "README.md").read_bytes() == before and not list(tmp_path.iterdir())
