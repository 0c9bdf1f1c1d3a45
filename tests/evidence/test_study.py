"""The study in examples/study/: its language, its exact optimum, and its command in miniature."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

for library in ("transformers", "tqdm", "matplotlib", "tabulate"):
    pytest.importorskip(library)

from examples.study import __main__ as study  # noqa: E402
from examples.study import language, policy, report, results, runs, theory  # noqa: E402
from examples.study.settings import AXES, BASE, DISTANCES, Axis, Setting, settings, vary  # noqa: E402
from rpo_kernels.objectives import PRESETS  # noqa: E402

ROOT = Path(__file__).parents[2]
MINI = vary(steps=(5,), strength=(1.0, 4.0))
DPO = Setting("dpo", K=2, steps=5, noise=0.5)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def miniature(monkeypatch):
    """Two axes of three settings of five steps each, after short fine-tunings."""
    short = lambda model, steps, heed, generator: policy.imitate(model, 20, heed, generator)
    monkeypatch.setattr(runs, "imitate", short)
    learn = lambda *data, steps: policy.reward_model(*data, steps=80)
    monkeypatch.setattr(runs, "reward_model", learn)
    monkeypatch.setattr(theory, "STEPS", 2)
    monkeypatch.setitem(AXES, "strength", Axis("How far?", MINI))
    monkeypatch.setitem(AXES, "objective", Axis("Which?", [*MINI, DPO]))
    caches = runs.start, runs.reference_samples, runs.learned_judge
    [cache.cache_clear() for cache in caches]
    yield ["--axes", "objective", "--seeds", "2", "--workers", "1", "--device", "cpu"]
    [cache.cache_clear() for cache in caches]


# ---- language and policy -------------------------------------------------------------------------


def test_judge_gives_a_point_for_each_wish():
    prompt = language.Prompt(first=1, last=4, size=3, direction=1)
    assert language.judge(prompt, (1, 3, 4)) == 4
    assert language.judge(prompt, (1, 3)) == pytest.approx(0.75 + 1 + 0.75 + 1)
    assert language.judge(prompt, ()) == pytest.approx(0.25)
    assert language.judge(prompt, (4, 3, 1)) == pytest.approx(1 + 0.25 + 0.25)


def test_responses_are_all_listed_once():
    labels = language.response_labels()
    assert len(language.RESPONSES) == sum(5**size for size in range(5)) == 781
    assert torch.equal(language.response_index(labels), torch.arange(781))


@torch.no_grad()
def test_linear_token_logps_of_all_responses_sum_to_one_and_match_samples():
    torch.manual_seed(0)
    model, prompts = policy.Policy(), torch.tensor([3, 70])
    logps = model.distribution(prompts)
    torch.testing.assert_close(
        logps.exp().sum(1), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-6
    )
    one_by_one = model.token_logps(prompts[1:].expand(781), model.labels).double().sum(1)
    torch.testing.assert_close(one_by_one, logps[1], rtol=0, atol=1e-4)

    n = 4000
    labels = model.sample(prompts[:1].expand(n), torch.Generator().manual_seed(0))
    counts = torch.bincount(language.response_index(labels), minlength=781)
    probabilities = logps[0].exp()
    deviations = (counts - n * probabilities) / (n * probabilities * (1 - probabilities)).sqrt()
    assert deviations[n * probabilities > 10].abs().max() < 5


# ---- the exact optimum ---------------------------------------------------------------------------


@pytest.mark.parametrize("distance", DISTANCES)
def test_preference_loss_leads_to_the_exact_optimum_whatever_the_distance(distance):
    assert theory.distance_to_optimum(distance, "listwise", eta=0.3) < 1e-5
    assert theory.distance_to_optimum(distance, "pairwise", eta=1.0) < 1e-4


def test_preference_loss_of_points_needs_rewards_less_log_z():
    assert theory.distance_to_optimum("squared", "pointwise") > 0.1
    assert theory.distance_to_optimum("squared", "pointwise", normalized=True) < 1e-4


def test_study_optimum_maximises_reward_less_kl(miniature):
    begin, strength = runs.start(0, "cpu"), 4.0
    value = lambda logps: strength * begin.reward(logps) - runs.kl(logps, begin.logps)
    optimum = begin.optimum(strength)
    points = begin.points[begin.held_out]
    log_z = (begin.logps + strength * points).logsumexp(1).mean().item()
    assert value(optimum) == pytest.approx(log_z, abs=1e-9)
    noise = torch.randn(optimum.shape, generator=torch.Generator().manual_seed(0)).double()
    for size in (-0.1, 0.1):
        assert value((optimum + size * noise).log_softmax(1)) < log_z - 1e-4
    at = runs.kl(optimum, begin.logps)
    assert begin.efficiency(begin.reward(optimum), at) == pytest.approx(
        1, abs=1e-9
    )  # 4 is on the frontier's grid


def test_study_seeds_have_prompts_policies_and_samples_of_their_own(miniature):
    one, other = runs.start(0, "cpu"), runs.start(1, "cpu")
    assert not torch.equal(one.held_out, other.held_out)
    assert not torch.equal(one.policy.head.weight, other.policy.head.weight)
    samples = [runs.reference_samples(seed, "cpu", 64, 4, False) for seed in (0, 1)]
    assert not torch.equal(samples[0].prompts, samples[1].prompts)
    assert not set(one.held_out.tolist()) & set(samples[0].prompts.tolist())


def test_study_reward_model_learns_the_judge_and_is_the_same_each_time(miniature):
    model, scale, shift, accuracy = runs.learned_judge(0, "cpu", 400)
    assert accuracy > 0.6  # of a policy that hardly learnt to write
    data = runs.reference_samples(0, "cpu", 2000, 4, False)
    rewards = runs.rewarded(runs.start(0, "cpu"), Setting(judged_pairs=400), data, None).rewards
    assert rewards.std().item() == pytest.approx(data.rewards.std().item(), rel=0.2)
    torch.manual_seed(1)
    runs.learned_judge.cache_clear()
    assert runs.learned_judge(0, "cpu", 400)[1:] == (scale, shift, accuracy)


def test_study_puts_the_best_response_first_for_objectives_without_rewards(miniature):
    data = runs.reference_samples(0, "cpu", 64, 4, False)
    begin, setting = runs.start(0, "cpu"), Setting("softmax_dpo")
    rewards = runs.rewarded(begin, setting, data, None).rewards.view(-1, 4)
    assert torch.equal(rewards[:, 0], rewards.max(1).values)
    assert torch.equal(rewards.sort(1).values, data.rewards.view(-1, 4).sort(1).values)


# ---- the command ---------------------------------------------------------------------------------


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_study_resumes_where_it_was_stopped(miniature, tmp_path, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    study.main([*miniature, "--output", str(whole)])
    records = read(whole / "runs.jsonl")
    assert len(records) == 2 * 3
    assert "study: 100%" in capsys.readouterr().err
    for record in records:
        assert [point["step"] for point in record["curve"]] == [0, 1, 2, 3, 4, 5]
        assert record["curve"][0]["kl"] == pytest.approx(0, abs=1e-6)
        assert record["curve"][-1]["kl"] > 1e-4
        assert (record["optimum"] is None) == (record["setting"]["objective"] == "dpo")
        assert "commit" in record["environment"] and "--seeds 2" in record["command"]
    assert (whole / "plots" / "objective.png").stat().st_size > 10_000

    stopped.mkdir()
    lines = (whole / "runs.jsonl").read_text().splitlines(keepends=True)
    (stopped / "runs.jsonl").write_text("".join(lines[:4]) + lines[4][:50])
    study.main([*miniature, "--output", str(stopped)])
    assert (stopped / "runs.jsonl").read_text().splitlines(keepends=True)[:4] == lines[:4]
    measured = lambda record: {
        k: v for k, v in record.items() if k in ("setting", "seed", "curve", "optimum")
    }
    assert [measured(x) for x in read(stopped / "runs.jsonl")] == [measured(x) for x in records]

    text = (stopped / "report.md").read_text()
    rewards = [x["curve"][-1]["reward"] for x in records if x["setting"]["objective"] == "dpo"]
    mean, error = sum(rewards) / 2, abs(rewards[0] - rewards[1]) / 2
    row = next(line for line in text.splitlines() if line.startswith("| dpo"))
    assert row.split("|")[2].strip() == f"{mean:.3f} ± {error:.3f}"


@pytest.mark.slow
def test_study_renews_marked_tables_and_numbers_of_a_page(miniature, tmp_path):
    study.main([*miniature, "--output", str(tmp_path)])
    page = tmp_path / "page.md"
    page.write_text(
        f"a <!-- reward: {DPO} -->old<!-- end -->.\n<!-- table: objective -->\n<!-- end -->\n"
    )
    command = ["--report", "--output", str(tmp_path), "--page", str(page)]
    study.main(command)
    text = page.read_text()
    assert re.search(r"a <!-- .+? -->\d\.\d{3} ± \d\.\d{3}<!-- end -->\.\n<!-- table", text)
    assert "| dpo, K 2, noise 0.5" in text
    study.main(command)
    assert page.read_text() == text
    page.write_text("<!-- reward: no such setting --><!-- end -->")
    with pytest.raises(SystemExit, match="no such setting"):
        study.main(command)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--axes", "colour"], "--axes 'colour': expected some of strength, objective"),
        (["--seeds", "0"], "--seeds 0: a standard error takes at least 2"),
        (["--device", "toaster"], "--device 'toaster': "),
        (["--workers", "0"], "--workers 0: expected at least 1"),
        (["--page", "missing.md"], "--page missing.md: no such file"),
    ],
)
def test_study_refuses_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        study.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, message",
    [
        ("not JSON\n", "line 1: expected a run of this study, got 'not JSON'"),
        (
            '{"setting": {"objective": "dpo", "colour": 1}, "seed": 0}\n',
            "unexpected keyword argument 'colour'",
        ),
        ('{"setting": {}, "seed": 0}\n', "KeyError: '.*objective"),
        ("", "--report: expected runs"),
        ('{"half": ', "--report: expected runs"),
    ],
)
def test_study_refuses_a_broken_file_of_results(text, message, tmp_path):
    (tmp_path / "runs.jsonl").write_text(text)
    with pytest.raises(SystemExit, match=message):
        study.main(["--report", "--output", str(tmp_path)])


def test_study_counts_no_run_twice(tmp_path):
    path = tmp_path / "runs.jsonl"
    measured = dict.fromkeys(("curve", "optimum", "judge accuracy", "seconds", "command"))
    measured["environment"] = "here"
    for writer in (results.Results(path), results.Results(path)):
        writer.add(BASE, 0, measured)
    with pytest.raises(ValueError, match="line 2: base, seed 0, is in the file twice"):
        results.Results(path)


# ---- settings and statistics ---------------------------------------------------------------------


def test_study_settings_make_every_preset_and_have_names_of_their_own():
    reduced, full = settings(list(AXES), False), settings(list(AXES), True)
    assert set(reduced) < set(full) and BASE in reduced
    assert len({str(setting) for setting in full}) == len(full)
    assert {*DISTANCES, *PRESETS} == {setting.objective for setting in full}
    for setting in full:
        setting.rpo()
        per_prompt = setting.per_prompt or setting.K
        assert 64 % per_prompt == per_prompt % setting.K == setting.steps % 5 == 0


def test_study_estimate_has_a_standard_error_and_a_threshold():
    estimate = report.Estimate.of([1.0, 2.0, None, 3.0])
    assert (estimate.mean, estimate.n) == (2.0, 3)
    assert estimate.error == pytest.approx(1 / math.sqrt(3))
    assert not estimate.is_resolved  # t = 3.46, and two degrees of freedom ask for 9.92
    assert report.Estimate.of([1.0, 1.01, 0.99]).bold() == "**+1.000 ± 0.006**"
    assert report.Estimate.of([None]).text() == ""


def test_study_compares_rewards_at_equal_kl(monkeypatch):
    monkeypatch.setitem(AXES, "strength", Axis("", vary(strength=(1.0, 2.0))))
    other = Setting("squared")
    curve = lambda kl, reward: [{"kl": 0.0, "reward": 2.0}, {"kl": kl, "reward": reward}]
    file = results.Results(Path("none"))
    for setting, kl, reward in (
        (Setting(strength=1.0), 1.0, 3.0),
        (Setting(strength=2.0), 4.0, 3.5),
        (other, 2.25, 3.0),
    ):
        file.runs[setting, 0] = {"curve": curve(kl, reward)}
    made = report.Study(file)
    assert made.at_equal_kl(other, 0) == pytest.approx(3.0 - 3.25)
    assert made.at_equal_kl(Setting(strength=1.0), 0) == pytest.approx(
        3.0 - 2.75
    )  # by the other one
    assert made.at_equal_kl(Setting(strength=2.0), 0) is None  # beyond


def test_study_page_holds_what_the_committed_results_say():
    page = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    committed = results.Results(ROOT / "benchmarks" / "results" / "study" / "runs.jsonl")
    made = report.Study(committed)
    tables = {axis: made.table(axis) for axis in AXES} | {"runs": report.provenance(committed)}
    tables["theory"] = re.search(r"<!-- table: theory -->\n(.+?)\n<!-- end -->", page, re.DOTALL)[1]
    assert report.filled(page, made, tables) == page
