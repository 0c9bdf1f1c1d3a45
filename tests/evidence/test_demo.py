"""The demo in examples/: its judge, its files, and both of its loops end to end on a tiny random
model.
"""

import json
import random
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
for library in ("tqdm", "matplotlib", "tabulate"):
    pytest.importorskip(library)

sys.path.append(str(Path(__file__).parents[2] / "examples"))

import align  # noqa: E402
import transformers_loop  # noqa: E402
from demo import (  # noqa: E402
    data,
    judge,
    models,
    options,
    prompts,
    report,
)

from rpo_kernels import RPOObjective  # noqa: E402
from rpo_kernels.adapters.transformers import attach  # noqa: E402

WORDS = ["yes", "no", "red", "green", "blue", "one", "two", "?", "."]


@pytest.fixture
def tiny(monkeypatch):
    """A random Llama of a few thousand weights and a tokenizer of a few words, in place of any that
    would be loaded.
    """
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds

    vocabulary = {
        word: i for i, word in enumerate(["<pad>", "<end>", "<unk>", "<user>", "<bot>", *WORDS])
    }
    words = Tokenizer(kinds.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<end>", pad_token="<pad>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}<bot>{% endif %}"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = attach(transformers.LlamaForCausalLM(config).eval())
    monkeypatch.setattr(models, "load", lambda name, device: (model, tokenizer))
    # faster at this size
    monkeypatch.setattr(models, "precision", lambda device: torch.autocast("cpu", enabled=False))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield model, tokenizer
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        ("capitals", "BECAUSE OF SALT, 3 %.", "BECAUSE of salt"),
        ("capitals", " YES \n", "?!"),
        (
            "few words",
            "It's a well-known rock that circles the earth.",
            "one two three four five six seven eight nine",
        ),
        ("few words", "A rock.", "..."),
        ("bullets", "- salt\n- rivers", "- salt\n- rivers\n- rain"),
        ("bullets", "* salt\n\n* rivers\n", "Here they are:\n- salt\n- rivers"),
        ("bullets", "- salt\n- rivers", "- salt\n-"),
        ("JSON", '{"answer": "salt"}', '{"answer": "salt"} Enjoy!'),
        ("JSON", '```json\n{"answer": ["salt"]}\n```', '{"answer": "salt", "why": "rivers"}'),
        ("JSON", '{"answer": {"because": 1}}', '["answer"]'),
        ("JSON", '{"answer": 3}', '{"answer": "... "}'),
        ("title", "<<The Salty Sea>>\nIt is salty.", "<<Title>> The Salty Sea"),
        ("title", "My title: <<Salt>>", "<<>> <<..>> <Salt>"),
        ("question", "Is it the salt?", "It is the salt."),
    ],
)
def test_judge_accepts_what_follows_the_rule_and_nothing_else(rule, good, bad):
    assert judge.judge(rule, "a prompt", good) == 1.0
    assert judge.judge(rule, "a prompt", bad) == 0.0


@pytest.mark.parametrize("rule", judge.RULES)
def test_judge_gives_nothing_for_empty_or_repeated_prompts(rule):
    prompt = prompts.task("What is salt?", rule).prompt
    for response in ("", "  \n", prompt, prompt[-20:], "what is SALT?"):
        assert judge.judge(rule, prompt, response) == 0.0


def test_prompts_held_out_share_no_question_with_training():
    training, held_out = (
        prompts.tasks(prompts.TRAINING_QUESTIONS),
        prompts.tasks(prompts.HELD_OUT_QUESTIONS),
    )
    question = lambda task: task.prompt.lower().split("?")[0]
    assert not {question(t) for t in training} & {question(t) for t in held_out}
    for tasks in (training, held_out):
        assert len(set(tasks)) == len(tasks)
        n = len(judge.RULES)
        assert len({t.rule for t in tasks[:n]}) == len({question(t) for t in tasks[:n]}) == n


def write(path, *lines):
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines),
        encoding="utf-8",
    )
    return str(path)


PAIR = {"prompt": "red ?", "chosen": "yes .", "rejected": "no ."}


def test_data_reads_each_layout_of_a_file(tmp_path):
    rows = data.read_preferences(
        write(
            tmp_path / "x.jsonl",
            PAIR,
            "",
            PAIR | {"chosen_reward": 5, "rejected_reward": 2.5, "source": "ignored"},
            PAIR | {"score_chosen": 1, "score_rejected": 2},
            {"prompt": "red ?", "responses": ["yes", "no", "one"], "rewards": [0, 1, 2]},
        )
    )
    assert [row.rewards for row in rows] == [[1, 0], [5, 2.5], [1, 2], [0, 1, 2]]
    assert [row.scored for row in rows] == [False, True, True, True]
    assert rows[0].responses == ["yes .", "no ."] and rows[3].responses == ["yes", "no", "one"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"prompt": ', "line 2: not JSON"),
        (
            "[1, 2]",
            r"line 2: expected prompt, chosen, rejected, or prompt, responses, rewards; got \[1, "
            r"2\]",
        ),
        (
            {"prompt": "red ?", "chosen": "yes"},
            "line 2: expected prompt.*got the keys prompt, chosen",
        ),
        (PAIR | {"chosen": "  "}, "line 2: `prompt` and `responses` must be non-empty strings"),
        (
            PAIR | {"prompt": [{"role": "user"}]},
            "line 2: `prompt` and `responses` must be non-empty strings",
        ),
        (
            PAIR | {"chosen_reward": "5", "rejected_reward": 1},
            'line 2: `rewards` must be finite numbers, got "5"',
        ),
        (
            '{"prompt": "p", "chosen": "c", "rejected": "r", '
            '"score_chosen": NaN, "score_rejected": 1}',
            "line 2.*finite",
        ),
        (
            {"prompt": "p", "responses": ["a"], "rewards": [1]},
            "line 2: `responses` must be a list of at least two",
        ),
        (
            {"prompt": "p", "responses": ["a", "b"], "rewards": [1]},
            "line 2: `rewards` must be a list of 2 numbers",
        ),
    ],
)
def test_data_names_a_bad_line(tmp_path, bad, message):
    with pytest.raises(ValueError, match=message):
        data.read_preferences(write(tmp_path / "x.jsonl", PAIR, bad))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "missing.jsonl"], "missing.jsonl: No such file"),
        (
            ["--objective", "dpoo"],
            "'dpoo': expected a distance (squared, backward_kl, forward_kl, hellinger) or preset "
            "(dpo, ",
        ),
        (["--objective", "ipo", "--beta", "1"], "--beta: the preset 'ipo' takes only tau, average"),
        (["--beta", "-1"], "`beta` must be a finite number > 0"),
        (["--steps", "0"], "argument --steps: must be greater than 0, got 0"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--responses", "1"], "--responses: expected at least 2 to compare, got 1"),
        (["--objective", "robust_dpo"], "compares pairs, got groups of 4 responses"),
        (["--device", "gpu"], "--device 'gpu': "),
        (["--data", "PAIRS", "--objective", "squared"], "has rows without scores"),
        (["--data", "PAIRS"], "expected more rows than --held-out 24, got 2"),
    ],
)
def test_options_that_are_bad_are_refused_before_a_model_is_loaded(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("loaded a model"))
    pairs = write(tmp_path / "pairs.jsonl", PAIR, PAIR)
    with pytest.raises(SystemExit):
        align.main([pairs if argument == "PAIRS" else argument for argument in arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", [*options.DISTANCES, *options.PRESETS])
def test_options_name_every_distance_and_preset(name):
    assert isinstance(options.make_objective(name, None, None), RPOObjective)


def test_data_without_rewards_has_the_best_first_and_no_ties():
    group = data.best_first(data.Group([1], [[2], [3], [4], [5]], [0.5, 1.0, 1.0, 0.0]))
    assert group == data.Group([1], [[3], [2], [5]], [1.0, 0.5, 0.0])


def test_data_batches_score_only_tokens_of_responses(tiny):
    batch = data.collate(
        [data.Group([3, 9, 4], [[5, 1], [6]], [1.0, 0.0]), data.Group([7], [[8, 9, 1]], [2])], "cpu"
    )
    assert batch.input_ids.tolist() == [[3, 9, 4, 5, 1], [3, 9, 4, 6, 0], [7, 8, 9, 1, 0]]
    assert batch.attention_mask.tolist() == [[1] * 5, [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]
    ignored = -100
    assert batch.labels.tolist() == [
        [ignored, ignored, 5, 1, ignored],
        [ignored, ignored, 6, ignored, ignored],
        [8, 9, 1, ignored, ignored],
    ]
    assert batch.cu_groups.tolist() == [0, 2, 3]


def test_models_have_log_ratios_of_zero_at_the_start(tiny):
    model, _ = tiny
    prompt, response = [3, 9, 4], [5, 8, 1]
    batch = data.collate([data.Group(prompt, [response, [6]], [1.0, 0.0])], "cpu")
    out, log_ratios = align.rpo(model, model, batch, RPOObjective("squared"), temperature=0.7)
    assert log_ratios.tolist() == [0.0, 0.0]
    logps = (model(torch.tensor([prompt + response])).logits[0, 2:5] / 0.7).log_softmax(-1)
    torch.testing.assert_close(out.logps[0], logps[range(3), response].sum().detach())


def test_models_sample_up_to_the_end_token(tiny):
    model, tokenizer = tiny
    asked = [data.prompt_ids(tokenizer, text) for text in ("red ?", "green blue yes ?")]
    assert asked == [[3, 7, 12, 4], [3, 8, 9, 5, 12, 4]]
    torch.manual_seed(0)
    sampled = models.sample(model, tokenizer, asked * 20, 4, max_tokens=6, temperature=1.0)
    assert len(sampled) == 40 and all(len(group) == 4 for group in sampled)
    for response in (response for group in sampled for response in group):
        assert 1 not in response[:-1] and (response[-1] == 1 or len(response) == 6)


def yes_is_good(rule, prompt, response):
    return float(response.startswith("yes"))


def run(tmp_path, *arguments):
    return align.main([*arguments, "--device", "cpu", "--output", str(tmp_path / "out")])


@pytest.mark.parametrize("objective", ["squared", "dpo"])
def test_align_online_raises_the_reward(tiny, tmp_path, monkeypatch, capsys, objective):
    monkeypatch.setattr(align, "judge", yes_is_good)
    result = run(
        tmp_path, "--objective", objective, "--steps", "15", "--lr", "2e-2", "--sample-tokens", "3"
    )
    reward = result.held_out["judge reward"]
    assert reward["before"].mean < 0.4 and reward["change"].mean > 4 * reward["change"].error > 0
    assert result.held_out["win rate against before"]["after"].mean > 0.6
    assert result.held_out["KL to the reference, nats"]["before"].mean == 0
    assert result.held_out["KL to the reference, nats"]["after"].mean > 0
    assert result.held_out["implicit reward accuracy"]["before"].mean == 0.5
    assert result.held_out["implicit reward accuracy"]["after"].mean > 0.8
    assert "judge reward" in capsys.readouterr().out
    saved = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert saved["held_out"]["judge reward"]["after"]["mean"] == reward["after"].mean
    assert len(saved["samples"]) == 24 and saved["settings"]["steps"] == 15 == len(saved["steps"])
    assert (tmp_path / "out" / "training.png").read_bytes().startswith(b"\x89PNG")


def test_align_repeats_with_the_same_seed(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(align, "judge", yes_is_good)
    weights = {name: tensor.clone() for name, tensor in tiny[0].state_dict().items()}
    runs = []
    for seed in ("1", "1", "2"):
        tiny[0].load_state_dict(weights)
        runs.append(
            run(
                tmp_path, "--steps", "3", "--lr", "1e-2", "--sample-tokens", "3", "--seed", seed
            ).steps
        )
    assert str(runs[0]) == str(runs[1]) != str(runs[2])  # as text: NaN differs from itself


@pytest.mark.parametrize("objective", [None, "squared", "dpo", "simpo"])
def test_align_offline_learns_the_order(tiny, tmp_path, objective):
    random.seed(0)
    rows = []
    for i in range(80):
        prompt, tail = f"{random.choice(WORDS)} {random.choice(WORDS)} ?", random.choice(WORDS)
        if i % 4:
            rows.append({"prompt": prompt, "chosen": f"yes {tail}", "rejected": f"no {tail}"})
            rows[-1] |= {"chosen_reward": 4, "rejected_reward": 1}
        else:
            rows.append(
                {
                    "prompt": prompt,
                    "responses": [tail, f"yes {tail}", f"no {tail}"],
                    "rewards": [2, 4, 1],
                }
            )
    arguments = [
        "--data",
        write(tmp_path / "x.jsonl", *rows),
        "--steps",
        "25",
        "--lr",
        "1e-2",
        "--sample-tokens",
        "3",
    ]
    result = run(tmp_path, *arguments, *(["--objective", objective] if objective else []))
    accuracy, loss = result.held_out["implicit reward accuracy"], result.held_out["loss"]
    assert accuracy["after"].mean > 0.85
    assert loss["change"].mean < -2 * loss["change"].error
    assert result.held_out["implicit reward margin"]["change"].mean > 0
    assert (tmp_path / "out" / "training.png").exists()


def test_align_trains_dpo_on_pairs_without_scores(tiny, tmp_path):
    path = write(tmp_path / "x.jsonl", *[PAIR] * 30)
    result = run(tmp_path, "--data", path, "--steps", "5", "--lr", "1e-2", "--sample-tokens", "2")
    assert result.held_out["implicit reward accuracy"]["after"].mean == 1.0
    assert result.held_out["loss"]["before"].mean == pytest.approx(0.6931, abs=1e-3)


def test_report_leaves_nan_out_and_counts_a_tie_as_half_a_win():
    estimate = report.Estimate.of([1.0, float("nan"), 3.0])
    assert (estimate.mean, estimate.error) == (2.0, pytest.approx(1.0))
    assert (
        report.win_rate([1.0, 0.0], [1.0, 0.0]) == 0.5
        and report.win_rate([1.0], [0.0, 1.0]) == 0.75
    )


@pytest.mark.parametrize("arguments", [[], ["--lora"]])
def test_transformers_loop_learns_the_order_of_its_rewards(tiny, monkeypatch, tmp_path, arguments):
    rows = [
        PAIR | {"prompt": f"{word} ?", "chosen_reward": 3, "rejected_reward": 1} for word in WORDS
    ]
    arguments = [
        *arguments,
        "--data",
        write(tmp_path / "x.jsonl", *rows),
        "--steps",
        "12",
        "--lr",
        "1e-2",
    ]
    history = transformers_loop.main(arguments)
    # policy and reference are one
    assert len(history) == 12 and history[0]["rewards/agreement"] == 0
    assert history[-1]["loss"] < history[0]["loss"] / 2 and history[-1]["rewards/agreement"] == 1


def test_transformers_loop_has_groups_of_three():
    rows = [data.parse(row) for row in transformers_loop.ROWS]
    assert {len(row.responses) for row in rows} == {3}
