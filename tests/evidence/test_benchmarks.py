"""The benchmarks measure what they say: wrong providers are caught, costs are counted, every file
comes out.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import cases  # noqa: E402
import longest  # noqa: E402
import measure  # noqa: E402
import peers  # noqa: E402
import providers  # noqa: E402
import readme as fill  # noqa: E402
import results  # noqa: E402
from cases import MODELS, PARTS, QWEN, TINY, Case  # noqa: E402
from truth import truth_of  # noqa: E402

ROWS, DTYPES = 64, [torch.float32, torch.bfloat16]
PART = {part.name: part for part in PARTS}
RUN_HERE = [
    p for p in providers.PROVIDERS if not isinstance(p, providers.Compiled)
]  # which takes seconds for each graph


def prepared(part, dtype=torch.float32, share=0.5):
    case = Case(part, TINY, ROWS, share, dtype)
    inputs = [case.inputs("cpu")]
    return case, inputs, truth_of(case, inputs[0])


@pytest.mark.filterwarnings("default")  # peers' warnings are not ours to fix
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_bench_gate_passes_every_provider_that_runs_here(part, dtype):
    case, inputs, truth = prepared(part, dtype)
    ran = []
    for provider in RUN_HERE:
        if provider.missing(case, "cpu") is None:
            errors = measure.check(measure.Step(case, provider, inputs), truth)
            assert errors.verdict is None, (provider.name, errors)
            ran.append(provider.name)
    assert {"rpo_kernels", "naive PyTorch"} <= set(ran)


def scaled_gradient(x, factor):
    """The same value, another gradient."""
    return factor * x + (1 - factor) * x.detach()


def odd(labels):
    """Every other response: what all share would cancel in a loss of pairs."""
    return torch.arange(labels.shape[0])[:, None] % 2


WRONG = {
    "an error of a hundredth of a nat": lambda logps, labels: (
        logps + 0.01 * odd(labels) * (labels >= 0)
    ),
    "NaN": lambda logps, labels: logps * float("nan"),
    "the wrong sign of the gradient": lambda logps, labels: scaled_gradient(logps, -1),
    "a gradient 1 % too large": lambda logps, labels: scaled_gradient(logps, 1.01),
    "a lost row": lambda logps, labels: torch.where(
        torch.arange(labels.shape[1]) == labels.shape[1] - 1, logps.detach(), logps
    ),
    "an ignored mask": lambda logps, labels: logps - odd(labels) * (labels < 0),
}


GATED = ["logits forward + backward", "SimPO", "KTO"]


@pytest.mark.parametrize("part", GATED)
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_bench_gate_rejects(wrong, part):
    class Planted(providers.Naive):
        name = "planted"

        def from_logits(self, logits, labels):
            return wrong(super().from_logits(logits, labels), labels)

    case, inputs, truth = prepared(PART[part])
    assert measure.check(measure.Step(case, Planted(), inputs), truth).verdict


def test_bench_gate_rejects_entropies_of_capped_logits_and_logits_without_their_cap():
    class Planted(providers.Naive):
        def from_logits(self, logits, labels, softcap=None, entropy=False):
            cap = 10.0 if entropy else None
            wrong = super().from_logits(logits, labels, cap, entropy)
            right = super().from_logits(logits, labels)
            return (right, wrong[1]) if entropy else wrong

    for part, says in (
        ("logits and entropy forward", "entropy off"),
        ("softcapped logits forward", "log-prob off"),
    ):
        case, inputs, truth = prepared(PART[part])
        assert says in measure.check(measure.Step(case, Planted(), inputs), truth).verdict


@pytest.mark.parametrize("part", ["SimPO", "RPO of 8 responses"])
def test_bench_cases_of_real_lengths_score_the_right_tokens(part):
    case = Case.of_pairs(
        PART[part], TINY, tuple(p // 40 + 2 for p in cases.PAIRS), dtype=torch.float32
    )
    inputs = case.inputs("cpu")
    assert ((inputs.labels >= 0).sum(1) == torch.tensor(case.counts)).all()
    assert inputs.labels.shape == (32, max(case.counts)) and inputs.labels.numel() == case.rows
    truth = truth_of(case, inputs)
    for provider in (providers.Ours(), providers.Naive()):
        assert measure.check(measure.Step(case, provider, [inputs]), truth).verdict is None
    assert sum(cases.PAIRS) / len(cases.PAIRS) == pytest.approx(553, rel=0.02)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_bench_gate_rejects_a_bf16_gradient_half_as_large_again(part):
    """Where logits may be rounded, bounds are wide, but not that wide."""
    if not part.trains:
        pytest.skip("no gradient")

    class Planted(providers.Naive):
        def from_logits(self, logits, labels):
            return scaled_gradient(super().from_logits(logits, labels), 1.5)

    case, inputs, truth = prepared(part, torch.bfloat16)
    assert "gradient" in measure.check(measure.Step(case, Planted(), inputs), truth).verdict


def test_bench_step_in_place_leaves_the_inputs_of_others_alone():
    case, inputs, truth = prepared(PART["logits forward + backward"])
    before = inputs[0].logits.clone()
    step = measure.Step(case, providers.OursInPlace(), inputs)
    for _ in range(2):
        assert measure.check(step, truth).verdict is None
    assert torch.equal(inputs[0].logits, before)


def test_bench_limit_counts_scored_rows_and_needed_gradients():
    G = 2 * 8192 * 4096 * 151_936
    by_name = {part.name: Case(part, QWEN, 8192) for part in PARTS}
    gemms = {name: case.flop / G for name, case in by_name.items()}
    assert gemms == {
        "logits forward": 0,
        "logits and entropy forward": 0,
        "softcapped logits forward": 0,
        "logits forward + backward": 0,
        "linear no grad": 1,
        "linear frozen head": 2,
        "linear trainable head": 3,
        "DPO": 3,
        "SimPO": 3,
        "KTO": 3,
        "RPO of 8 responses": 3,
    }
    L = 2 * 8192 * 151_936
    assert (
        by_name["logits forward"].bytes == L and by_name["logits forward + backward"].bytes == 3 * L
    )
    quarter = Case(PART["logits forward + backward"], QWEN, 8192, 0.25)
    assert quarter.bytes == L // 4 + L // 4 + L  # the gradient of every row is written
    assert {model.V for model in MODELS} == {128_256, 151_936, 262_144, 49_152}


def test_bench_memory_is_the_peak_above_the_inputs():
    case, inputs, _ = prepared(PART["logits forward"])

    class Known(providers.Naive):
        def from_logits(self, logits, labels):
            both = torch.zeros(1000), torch.zeros(500)
            return both[1].new_zeros(labels.shape)

    step = measure.Step(case, Known(), inputs)
    assert measure.peak_of(step, "cpu") == pytest.approx(4 * (1000 + 500 + ROWS), abs=256)


def run(*command, **environment):
    inherited = {
        name: x for name, x in os.environ.items() if "XDIST" not in name
    }  # under which pytest-benchmark takes no times
    done = subprocess.run(
        [str(x) for x in command],
        cwd=ROOT,
        env={**inherited, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_bench_command_measures_and_goes_on_where_it_stopped(tmp_path):
    """Through pytest-benchmark; then without it, as on a machine that lacks it."""
    for library in ("pytest_benchmark", "matplotlib"):
        pytest.importorskip(library)
    file = tmp_path / "bench.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks/bench.py",
        "--smoke",
        "-q",
        "-p",
        "no:cacheprovider",
        "--results",
        file,
    ]
    parts = "logits and forward and not (entropy or softcapped)"
    chosen = ["-k", f"128 and {parts} and (naive or rpo_kernels)"]
    first = run(*command, *chosen)
    assert "5 passed" in first, first
    rows = json.loads(file.read_text())["rows"]
    done = [row for row in rows if row["status"] == "ok"]
    assert {row["provider"] for row in done} == {
        "rpo_kernels",
        "rpo_kernels, in place",
        "naive PyTorch",
    }
    for row in done:
        low, high = row["quartiles_s"]
        assert (
            0 < low <= row["median_s"] <= high
            and row["limit_s"] > 0
            and row["peak_bytes"] > 0
            and row["error"] < 1e-4
        )
    found = json.loads(file.read_text())
    file.write_text(json.dumps({**found, "rows": rows[1:]}))
    again = run(*command, *chosen, "-p", "no:benchmark")
    assert "1 passed" in again and "in the results file already" in again, again
    now = json.loads(file.read_text())["rows"]
    assert (
        now[:-1] == rows[1:]
        and now[-1]["provider"] == rows[0]["provider"]
        and now[-1]["status"] == "ok"
    )
    about = json.loads(file.read_text())["about"]
    assert (
        about["torch"] == torch.__version__ and about["commit"] and "bench.py" in about["command"]
    )
    for name in ("bench.md", "bench-time.png", "bench-memory.png", "bench-peers.png"):
        assert (tmp_path / name).stat().st_size > 0
    assert "naive PyTorch" in (tmp_path / "bench.md").read_text()


def a_results_file(path: Path, kind: str) -> None:
    about = {
        "kind": kind,
        "device": "a chip",
        "driver": None,
        "torch": "2",
        "triton": "3",
        "commit": "c",
        "command": "x",
        "sizes": "full",
        "launch_table": None,
        "copy_rate": 1e12,
    }
    found = results.Results(path, about)
    case = Case(PARTS[0], QWEN, 2048)
    facts = {
        "quartiles_s": [0.001, 0.003],
        "rounds": 3,
        "peak_bytes": 1 << 31,
        "limit_s": 0.001,
        "limit": "x",
        "error": 1e-6,
    }
    found.add(case, providers.Ours(), "ok", median_s=0.002, gradient_errors={}, **facts)
    found.add(case, providers.Naive(), "wrong", reason="log-prob off by 1")
    found.add(case, providers.Liger(), "skipped", reason="has a loss of pairs only")


def test_results_tables_show_who_ran_who_was_wrong_and_who_was_skipped(tmp_path):
    file = tmp_path / "bench.json"
    a_results_file(file, "cuda")
    text = results.report(json.loads(file.read_text()))
    assert "| rpo_kernels | 2 (1 to 3) | 2.00 | 2 | 1.0e-06 |" in text
    assert "| naive PyTorch | wrong: log-prob off by 1 |" in text
    assert "Skipped: Liger (has a loss of pairs only)." in text


@pytest.mark.parametrize(
    ("file", "kind", "says"),
    [("bench.json", "cuda", "on a GPU"), ("bench-smoke-cpu.json", "cpu", "on a CPU")],
)
def test_readme_is_filled_from_results_and_says_which_device(tmp_path, file, kind, says):
    readme, folder = tmp_path / "README.md", tmp_path / "results"
    folder.mkdir()
    (folder / "cpu-2-threads.json").write_text(
        (ROOT / "benchmarks" / "results" / "cpu-2-threads.json").read_text()
    )
    a_results_file(folder / file, kind)
    marks = [
        f"<!-- {name} table: generated by `python benchmarks/readme.py` -->"
        for name in ("cpu", "peers")
    ]
    readme.write_text(f"a\n{marks[1]}\nstale\n<!-- end -->\nb\n{marks[0]}\nc\n")
    for _ in range(2):  # filling again changes nothing
        fill.main([readme], folder)
        text = readme.read_text()
        assert (
            text.startswith(f"a\n{marks[1]}\nMeasured {says} (a chip")
            and "| logits forward | 2 ms, 2.00 x, 2 GiB, 1e-06 | wrong |" in text
        )
        assert (
            "stale" not in text
            and "\nb\n" in text
            and text.endswith("\nc\n")
            and text.count("<!-- end -->") == 2
        )


def test_readme_tables_are_those_of_the_committed_results():
    """What was measured or counted elsewhere; memory traffic is counted by tests of its own."""
    marks = [
        name
        for page in fill.PAGES
        for name in re.findall(r"<!-- (\w+) table: generated by", page.read_text())
    ]
    assert sorted(marks) == ["chips", "cpu", "host", "memory", "peers", "traffic"]
    for page in fill.PAGES:
        text = page.read_text()
        without_traffic = text.replace(fill.MARK.format("traffic"), "")
        assert fill.filled(without_traffic) == without_traffic


# ---- on a GPU ------------------------------------------------------------------------------------

SCRIPT = ROOT / "benchmarks" / "gpu.sh"


@pytest.mark.slow
def test_gpu_stage_that_is_cut_short_keeps_the_failures_it_has_seen(tmp_path):
    """The script's own limit, and both ways to run pytest."""
    (limited,) = [x for x in SCRIPT.read_text().splitlines() if x.startswith("limited()")]
    file = tmp_path / "test_slow.py"
    file.write_text(
        "import time\ndef test_bad(): assert 1 + 1 == 3\ndef test_slow(): time.sleep(60)\n"
    )
    parallel = " -n 2" if importlib.util.find_spec("xdist") else ""
    for options in {"", parallel}:
        command = (
            f"{limited}; started=$SECONDS limit=46; limited {sys.executable} -m pytest -q "
            f"-p no:cacheprovider{options} {file}"
        )
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert (
            done.returncode == 124
            and "assert (1 + 1) == 3" in done.stdout
            and "1 failed" in done.stdout
        ), done.stdout


def test_gpu_script_answers_an_unknown_stage_with_the_known_ones():
    done = subprocess.run([SCRIPT, "bench"], capture_output=True, text=True)
    assert done.returncode == 2
    assert all(f"  {stage} " in done.stdout for stage in STAGES), done.stdout


STAGES = ["tests", "tune", "chunks", "host", "bench-peers", "bench-compile", "longest"]


@pytest.mark.slow
def test_gpu_stages_run_dry_and_go_on_where_they_stopped(tmp_path):
    """Small sizes, one file of tests, settings by machine code."""
    for library in ("triton", "pytest_benchmark", "matplotlib"):
        pytest.importorskip(library)
    patient = {"LIMIT_S": "3000", "RPO_COMMIT": "one"}  # on a loaded machine, whoever commits
    text = run(SCRIPT, "--dry-run", "--out", tmp_path, **patient)
    assert all(f"== {stage}: exit code 0" in text for stage in STAGES), text
    load = lambda name: json.loads((tmp_path / name).read_text())
    kept = {name: load(name) for name in ("bench.json", "chunks.json", "longest.json")}
    for name, found in kept.items():
        assert "ok" in {row["status"] for row in found["rows"]}, name
    about = kept["bench.json"]["about"]
    assert about["launch_table"], "later stages take the settings that tune has found"
    by_provider = {
        row["provider"]: row for row in kept["bench.json"]["rows"] if row["part"] == "KTO"
    }
    assert {"rpo_kernels", "naive PyTorch", "torch.compile"} <= set(by_provider)
    settings = [(row["arch"], row["op"]) for row in load("launch_table.json")]
    assert settings == [("sm_90", "backward")]
    passed = load("tests.json")["passed"]
    assert passed and all("test_architecture" in name for name in passed)
    for name in ("bench.md", "bench-peers.png", "longest.md", "tests.txt", "host.json"):
        assert (tmp_path / name).stat().st_size > 0

    again = run(
        SCRIPT, "--dry-run", "--out", tmp_path, *(x for x in STAGES if x != "host"), **patient
    )
    assert all(f"== {stage}: exit code 0" in again for stage in STAGES if stage != "host"), again
    assert {name: load(name)["rows"] for name in kept} == {
        name: found["rows"] for name, found in kept.items()
    }
    assert f"{len(passed)} skipped" in (tmp_path / "tests.txt").read_text()


@pytest.mark.parametrize("most", [0, 255, 256, 700, 5000, 1 << 30])
def test_bench_finds_the_longest_pair_to_within_a_sixteenth(most):
    tried = []
    found = longest.longest(lambda tokens: tried.append(tokens) or tokens <= most)
    assert found <= most and (found >= min(most, longest.LONGEST) * 15 / 16 or most < 256)
    assert len(tried) == len(set(tried)) <= 18


def test_gpu_peers_are_unpacked_from_wheels_and_checked(tmp_path, capsys):
    wheels, target = tmp_path / "wheels", tmp_path / "target"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "cut_cross_entropy-9.9-py3-none-any.whl", "w") as file:
        file.writestr("cut_cross_entropy/__init__.py", "linear_cross_entropy = print")
        file.writestr("cut_cross_entropy-9.9.dist-info/METADATA", "Version: 9.9\n")
    peers.unpack(wheels, target)
    assert peers.works("cut-cross-entropy", [str(target)])
    assert not peers.works("cut-cross-entropy", [str(wheels)])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "cut-cross-entropy: 9.9" and "No module named" in said[1]
