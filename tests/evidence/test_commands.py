"""The commands as a user meets them.

What audit and verify find is in test_compile.py and test_verify.py.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rpo_kernels.__main__ import COMMANDS, main
from rpo_kernels.tools.disassembly import loops
from rpo_kernels.tools.table import lines, show
from rpo_kernels.tools.traffic import OperatorTraffic

from ..helpers import HAS_GPU, compiling

ROOT = Path(__file__).parents[2]


def run(*arguments, expect=0):
    environment = compiling(OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "rpo_kernels", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout


def test_help_names_every_command_and_info_says_what_is_installed():
    text = run("--help")
    assert all(name in text for name in COMMANDS)
    found = json.loads(run("info", "--json"))
    assert found["torch"] == torch.__version__ and found["backend auto"].startswith(
        "triton" if HAS_GPU else "torch"
    )


@pytest.mark.parametrize("number", ["0", "-3", "two"])
@pytest.mark.parametrize("words", ["verify --seeds", "traffic --vocabulary", "audit --jobs"])
def test_commands_refuse_numbers_that_are_not_positive(words, number, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*words.split(), number])
    option = words.split()[1]
    expected = f"argument {option}: expected a positive integer, got {number!r}"
    assert expected in capsys.readouterr().err


def test_verify_prints_a_row_before_the_next_one_is_computed():
    rows, begun = [{"case": "a", "error": 1.0}, {"case": "long", "error": None}], []
    printed = lines((begun.append(row) or row for row in rows), {"case": "c", "error": "e"}, rows)
    assert (next(printed), begun) == ("c     e", [])
    assert (next(printed), begun) == ("a     1", rows[:1])
    assert "c     e\na     1\nlong  -" == show(rows, {"case": "c", "error": "e"})


@pytest.mark.skipif(HAS_GPU, reason="traffic is counted in Triton's interpreter")
def test_traffic_finds_the_cost_model_and_what_naive_pytorch_moves():
    pytest.importorskip("triton")
    rows = json.loads(run("traffic", "--vocabulary", "515", "--json"))
    assert len(rows) == 15 and not any(row["verdict"] == "FAIL" for row in rows)
    elements = 4 * 8 * 515
    forward, _, backward, ours, naive = rows[5:10]  # bf16, every row scored
    tokens = 32 * 4 * 8  # a few numbers for each
    assert elements * 2 <= forward["read"] < elements * 2 + tokens and forward["written"] < tokens
    assert (
        elements * 2 <= backward["read"] < elements * 2 + tokens
        and elements * 2 == backward["written"]
    )
    assert ours["read"] == sum(row["read"] for row in rows[5:8])
    # cast, log_softmax, zeros for the gather, log_softmax backward, cast: 2 + 4 + 0 + 8 + 4 read, 4
    # + 4 + 4 + 4 + 2 written
    assert naive["read"] == pytest.approx(18 * elements, rel=0.02) and naive[
        "written"
    ] == pytest.approx(18 * elements, rel=0.02)
    scored_half = rows[10]
    assert scored_half["read"] == pytest.approx(forward["read"] / 2, rel=0.01)


def test_traffic_of_operators_counts_inputs_and_outputs_once_and_views_never():
    x, y = torch.randn(2, 8, 4)
    with OperatorTraffic() as traffic:
        x.view(4, 8).t()[1:]
    assert (traffic.read, traffic.written) == (0, 0)
    with OperatorTraffic() as traffic:
        x + y
        torch.zeros(8, 4)
    assert (traffic.read, traffic.written) == (2 * 128, 2 * 128)
    index = torch.zeros(8, 1, dtype=torch.int64)
    with OperatorTraffic() as traffic:
        x.gather(1, index)
    assert (traffic.read, traffic.written) == (8 * 8 + 8 * 4, 8 * 4)


SASS = """
        /*0000*/                   MOV R1, R2 ;
.L_x_1:
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR12][R18.64] ;
        /*0020*/                   MUFU.EX2 R5, R4 ;
.L_x_2:
        /*0030*/                   LDG.E.U16 R6, desc[UR12][R18.64] ;
        /*0040*/               @P1 BRA `(.L_x_2) ;
        /*0050*/                   STG.E.64 desc[UR12][R18.64], R4 ;
        /*0060*/              @!P0 BRA `(.L_x_1) ;
        /*0070*/                   STG.E desc[UR12][R18.64], R4 ;
        /*0080*/                   EXIT ;
.L_x_3:
        /*0090*/                   BRA `(.L_x_3);
"""
# The inner loop's body lies before the header that it is entered by, behind a branch from which
# nothing falls into it.
GCN = """
.LBB0_0:
\tglobal_load_ushort v2, v[2:3], off
\ts_branch .LBB0_2
.LBB0_1:
\tv_exp_f32_e32 v6, v6
\ts_cbranch_scc0 .LBB0_3
.LBB0_2:
\tglobal_load_dwordx4 v[2:5], v[2:3], off
\tglobal_store_dwordx2 v[2:3], v[4:5], off
\ts_branch .LBB0_1
.LBB0_3:
\tglobal_store_byte v[2:3], v4, off
\ts_cbranch_scc1 .LBB0_0
\ts_endpgm
"""


def test_audit_reads_loops_from_branches_and_takes_inner_loops_apart():
    outer, inner, trap = loops(SASS)
    assert (
        outer.accesses == {("load", 16): 1, ("store", 8): 1}
        and outer.exponentials == outer.special == 1
        and outer.issued == 4
    )
    assert inner.accesses == {("load", 2): 1} and inner.issued == 2 and not trap.accesses
    assert (outer.innermost, inner.innermost) == (False, True)
    outer, loop = loops(GCN)
    assert outer.accesses == {("load", 2): 1, ("store", 1): 1}
    assert (
        loop.accesses == {("load", 16): 1, ("store", 8): 1}
        and loop.exponentials == 1
        and loop.issued == 1
    )
