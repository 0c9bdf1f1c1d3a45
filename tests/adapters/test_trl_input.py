"""What RPOTrainer takes, and what it refuses before training starts."""

from __future__ import annotations

import copy
import json
import math

import pytest

from rpo_kernels import RPOObjective
from rpo_kernels.sums import ObjectiveSum

from .tiny_models import llama, pairs, tokenizer

pytestmark = [pytest.mark.xdist_group("trl"), pytest.mark.filterwarnings("ignore")]

trl = pytest.importorskip("trl")
from datasets import Dataset, DatasetDict, IterableDataset  # noqa: E402
from transformers import HfArgumentParser  # noqa: E402

import rpo_kernels.adapters.trl.trainer as trainer_module  # noqa: E402
from rpo_kernels.adapters.trl import RPOConfig, RPOTrainer  # noqa: E402
from rpo_kernels.adapters.trl.data import encode  # noqa: E402

from .test_trl_trainer import LORA, groups, options  # noqa: E402

# ---- objectives in a configuration ---------------------------------------------------------------


def config(tmp_path, **more) -> RPOConfig:
    return RPOConfig(**options(tmp_path, **more))


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, RPOObjective("backward_kl", 0.1)),
        ({"objective": RPOObjective("squared", 0.3, 2.0)}, RPOObjective("squared", 0.3, 2.0)),
        ({"objective": "squared", "beta": 0.5}, RPOObjective("squared", 0.5)),
        ({"objective": "dpo", "beta": 0.5}, RPOObjective.dpo(0.5)),
        (
            {"objective": '{"preset": "ipo", "tau": 0.2, "average": true}'},
            RPOObjective.ipo(0.2, average=True),
        ),
        (
            {"objective": {"distance": "forward_kl", "eta": 3.0, "beta": 0.2}, "beta": 0.2},
            RPOObjective("forward_kl", 0.2, 3.0),
        ),
    ],
)
def test_rpo_config_takes_an_objective_in_several_spellings_and_from_a_file(
    given, expected, tmp_path
):
    args = config(tmp_path, **given)
    assert args.make_objective() == expected and args.beta == expected.beta
    saved = json.loads(args.to_json_string())
    again = RPOConfig(
        **options(
            tmp_path, objective=saved["objective"], beta=saved["beta"], loss_type=saved["loss_type"]
        )
    )
    assert again.make_objective() == expected


def test_rpo_config_takes_an_objective_from_a_command_line(tmp_path):
    line = f"--output_dir {tmp_path} --use_cpu True --bf16 False --report_to none".split()
    line += "--beta 0.05 --objective".split()
    (args,) = HfArgumentParser(RPOConfig).parse_args_into_dataclasses(
        [*line, '{"distance": "squared", "eta": 3.0}']
    )
    assert args.make_objective() == RPOObjective("squared", 0.05, 3.0)
    (args,) = HfArgumentParser(RPOConfig).parse_args_into_dataclasses([*line, "softmax_dpo"])
    assert args.make_objective() == RPOObjective.softmax_dpo(0.05)


@pytest.mark.parametrize(
    "given, message",
    [
        (
            {"loss_type": "ipo"},
            r"`loss_type` must stay unset, got 'ipo' with `objective` 'backward_kl'",
        ),
        ({"loss_type": ["sigmoid"], "objective": "dpo"}, r"`loss_type` must stay unset"),
        (
            {"label_smoothing": 0.1},
            r"`label_smoothing` has no effect with an objective, got 0.1; use objective=",
        ),
        ({"loss_weights": [1.0]}, r"`loss_weights` has no effect"),
        ({"use_weighting": True}, r"`use_weighting` has no effect"),
        ({"ld_alpha": 0.5}, r"`ld_alpha` has no effect"),
        ({"f_divergence_type": "js_divergence"}, r"`f_divergence_type` has no effect"),
        ({"discopop_tau": 0.1}, r"`discopop_tau` has no effect"),
        ({"f_alpha_divergence_coef": 0.9}, r"`f_alpha_divergence_coef` has no effect"),
        (
            {"padding_free": True, "pad_to_multiple_of": 8},
            r"`pad_to_multiple_of` 8 pads, and `padding_free` does not",
        ),
        ({"objective": "kto"}, r"must name a distance .* or a preset \(dpo, .*\); got 'kto'"),
        (
            {"objective": '{"preset": "simpo", "tau": 1}'},
            r"simpo has no `tau`, only `beta`, `gamma`",
        ),
        ({"objective": '{"distance": squared}'}, r"`objective` is not JSON"),
        ({"objective": "ipo", "beta": 0.1}, r"ipo has no `beta`, only `tau`, `average`"),
        (
            {"objective": RPOObjective.dpo(0.2), "beta": 0.1},
            r"`beta` must be the objective's, 0.2, or None; got 0.1",
        ),
        (
            {
                "objective": [(0.8, RPOObjective.dpo(0.1)), (0.2, RPOObjective.bco(0.3))],
                "beta": 0.3,
            },
            r"`beta` must be None where every part .* has its own, 0.1, 0.3; got 0.3",
        ),
        ({"objective": {"distance": "squared", "beta": -1.0}}, r"`beta` must be .* > 0"),
    ],
)
def test_rpo_config_refuses_options_that_contradict_each_other(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **given)


# ---- data ----------------------------------------------------------------------------------------


def encoded(row, objective=None) -> dict:
    return encode(row, tokenizer(), "</s>", objective or RPOObjective(), "train")


def test_rpo_trainer_takes_pairs_groups_and_chats():
    (pair,) = pairs(1)
    expected = encoded(pair)
    rewards = [pair.pop("score_chosen"), pair.pop("score_rejected")]
    assert expected["rewards"] == rewards and len(expected["response_ids"]) == 2
    assert encoded(pair | {"chosen_reward": rewards[0], "rejected_reward": rewards[1]}) == expected
    group = {
        "prompt": pair["prompt"],
        "responses": [pair["chosen"], pair["rejected"]],
        "rewards": rewards,
    }
    assert encoded(group) == expected
    chat = {
        "prompt": [{"role": "user", "content": pair["prompt"]}],
        "rewards": rewards,
        "responses": [
            [{"role": "assistant", "content": pair[side]}] for side in ("chosen", "rejected")
        ],
    }
    ids = encoded(chat)
    text = tokenizer().decode(ids["prompt_ids"] + ids["response_ids"][0])
    assert text == f"<|user|>{pair['prompt']}</s><|assistant|>{pair['chosen']}</s>"
    whole = {
        side: [*chat["prompt"], chat["responses"][i][0]]
        for i, side in enumerate(("chosen", "rejected"))
    }
    # the prompt is implicit
    assert encoded(whole | {"score_chosen": rewards[0], "score_rejected": rewards[1]}) == ids


def test_rpo_trainer_puts_the_best_response_first_for_objectives_without_rewards():
    (group,) = groups([3])
    group["rewards"] = [0.0, 2.0, 1.0]
    first, second, third = encoded(group)["response_ids"]
    labels_only = encoded(group, RPOObjective.softmax_dpo())
    assert labels_only["response_ids"] == [second, first, third] and "rewards" not in labels_only
    (pair,) = pairs(1)
    pair |= {"score_chosen": 0.0, "score_rejected": 1.0}
    # "chosen" is the label
    assert encoded(pair, RPOObjective.dpo())["response_ids"] == encoded(pair)["response_ids"]


def test_rpo_trainer_puts_the_best_response_first_where_a_part_of_a_sum_uses_no_rewards():
    (group,) = groups([3])
    group["rewards"] = [0.0, 2.0, 1.0]
    first, second, third = encoded(group)["response_ids"]
    parts = [(1.0, RPOObjective("squared")), (1.0, RPOObjective.softmax_dpo())]
    mixed = encoded(group, ObjectiveSum.of(parts))
    assert mixed["response_ids"] == [second, first, third] and mixed["rewards"] == [2.0, 0.0, 1.0]


GOOD = {"prompt": "a cat ", "responses": ["sings", "runs"], "rewards": [1.0, 0.0]}
UNREWARDED = {"prompt": "a cat ", "chosen": "sings", "rejected": "runs"}


@pytest.mark.parametrize(
    "row, objective, message",
    [
        (
            UNREWARDED,
            "backward_kl",
            r'train dataset must have rewards .* got prompt, chosen, rejected\. .*objective="dpo"',
        ),
        (
            GOOD | {"responses": ["sings"], "rewards": [1.0]},
            "dpo",
            r"`responses` must be a list of at least two .* got 1",
        ),
        (
            GOOD | {"rewards": [1.0]},
            "backward_kl",
            r"`rewards` must be one number per response, 2; got 1",
        ),
        (GOOD | {"rewards": [1.0, math.nan]}, "backward_kl", r"`rewards` must be numbers, got nan"),
        (
            GOOD | {"rewards": [1.0, math.inf]},
            "squared",
            r"`rewards` must be finite numbers, got inf",
        ),
        (
            GOOD | {"rewards": None},
            "backward_kl",
            r"`rewards` must be one number per response, 2; got None",
        ),
        (
            GOOD | {"group_weight": math.nan},
            "backward_kl",
            r"`group_weight` must be a finite number; got nan",
        ),
        (
            GOOD | {"group_weights": 2.0},
            "backward_kl",
            r"`group_weight` must be .* its weight; got `group_weights`",
        ),
        (
            GOOD | {"responses": ["a", "b", "c"], "rewards": [1.0] * 3},
            "robust_dpo",
            r"`responses` must be two to each prompt .* labels pairs, got 3",
        ),
        (GOOD | {"images": [0]}, "dpo", r"train dataset must be text only, got a column `images`"),
        (
            {"prompt": "a cat ", "completion": "sings"},
            "dpo",
            r"must have the columns .*; got prompt, completion",
        ),
        (
            GOOD | {"responses": [[{"role": "assistant", "content": "sings"}]] * 2},
            "backward_kl",
            r"`responses` must be texts, as `prompt` is, got list",
        ),
    ],
)
@pytest.mark.parametrize("kind", [Dataset, IterableDataset])
def test_rpo_trainer_refuses_data_that_do_not_fit(kind, row, objective, message, tmp_path):
    data = Dataset.from_list([row, row])
    data = data if kind is Dataset else data.to_iterable_dataset()
    with pytest.raises(ValueError, match=message):
        RPOTrainer(
            llama(),
            llama(seed=1),
            config(tmp_path, objective=objective),
            train_dataset=data,
            processing_class=tokenizer(),
        )


def test_rpo_trainer_checks_every_row_and_the_evaluation_data(tmp_path):
    bad, fine = (
        Dataset.from_list([GOOD, GOOD | {"rewards": [1.0, 2.0, 3.0]}]),
        Dataset.from_list([GOOD]),
    )
    for data, name in (
        ({"train_dataset": bad}, "train"),
        ({"train_dataset": fine, "eval_dataset": bad}, "eval"),
    ):
        with pytest.raises(
            ValueError,
            match=rf"{name} dataset: `rewards` must be one number per response, 2; got 3",
        ):
            RPOTrainer(
                llama(), llama(seed=1), config(tmp_path), processing_class=tokenizer(), **data
            )


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "train dataset must have rows, got none"),
        ([GOOD], "must have prompts shorter than `max_length` 2, got none"),
    ],
)
def test_rpo_trainer_refuses_data_of_which_nothing_is_left(rows, message, tmp_path):
    data, args = Dataset.from_list([GOOD]).select(range(len(rows))), config(tmp_path, max_length=2)
    with pytest.raises(ValueError, match=message):
        RPOTrainer(llama(), llama(seed=1), args, train_dataset=data, processing_class=tokenizer())


def test_rpo_trainer_refuses_what_is_no_dataset(tmp_path):
    data = DatasetDict(train=Dataset.from_list([GOOD]))
    with pytest.raises(TypeError, match=r"`train_dataset` must be a Dataset .*; got DatasetDict"):
        RPOTrainer(llama(), llama(seed=1), config(tmp_path), train_dataset=data)


def test_rpo_trainer_takes_streamed_rows(tmp_path):
    data = Dataset.from_list(groups([2, 3, 2, 4])).to_iterable_dataset()
    trainer = RPOTrainer(
        llama(),
        llama(seed=1),
        config(tmp_path, max_steps=2),
        train_dataset=data,
        processing_class=tokenizer(),
    )
    trainer.train()
    assert trainer.state.global_step == 2


# ---- references ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective, arguments, more, message",
    [
        ("dpo", {}, {}, r"`ref_model` must be a model, got None: .*copy.deepcopy"),
        (
            "simpo",
            {"ref_model": True},
            {},
            r"`ref_model` must be left out for an objective without a reference",
        ),
        (
            "simpo",
            {},
            {"precompute_ref_log_probs": True},
            r"`precompute_ref_log_probs` must be left out",
        ),
        (
            {"distance": "squared", "reference": "geometric"},
            {"ref_model": True},
            {},
            r"`objective` must have one reference or none",
        ),
    ],
)
def test_rpo_trainer_refuses_references_that_do_not_fit(
    objective, arguments, more, message, tmp_path
):
    arguments = {"ref_model": llama(seed=1)} if arguments else {}
    with pytest.raises(ValueError, match=message):
        RPOTrainer(
            llama(),
            args=config(tmp_path, objective=objective, **more),
            train_dataset=Dataset.from_list([GOOD]),
            processing_class=tokenizer(),
            **arguments,
        )


def test_rpo_trainer_loads_no_reference_for_objectives_without_one(tmp_path):
    trainer = RPOTrainer(
        llama(),
        args=config(tmp_path, objective="simpo", max_steps=1),
        train_dataset=Dataset.from_list([UNREWARDED] * 4),
        eval_dataset=Dataset.from_list([UNREWARDED]),
        processing_class=tokenizer(),
    )
    assert trainer.ref_model is None and not trainer.args.precompute_ref_log_probs
    trainer.train()
    trainer.evaluate()
    assert "kl" not in trainer.state.log_history[0]


def test_rpo_trainer_takes_peft_config_in_DPOTrainers_place(tmp_path):
    data, adapter = Dataset.from_list([GOOD]), copy.deepcopy(LORA)
    before = (llama(), None, config(tmp_path), None, data, None, tokenizer())
    trainer = RPOTrainer(*before, None, None, (None, None), None, adapter)
    assert trainer.ref_model is None and trainer.model.peft_config["default"] is adapter


def test_rpo_trainer_needs_an_rpo_config(tmp_path):
    with pytest.raises(TypeError, match=r"`args` must be an RPOConfig.*got DPOConfig"):
        RPOTrainer(
            llama(),
            llama(seed=1),
            trl.DPOConfig(**options(tmp_path)),
            train_dataset=Dataset.from_list([GOOD]),
        )


# ---- the installed TRL ---------------------------------------------------------------------------


def changed(*names):
    """A method with these arguments."""
    return eval(f"lambda {', '.join(names)}: None")


@pytest.mark.parametrize(
    "name, there, message",
    [
        (
            "_compute_loss",
            changed("self", "model", "batch"),
            r"_compute_loss takes \(self, model, batch\), not \(self, model, inputs, return_out",
        ),
        ("compute_ref_log_probs", None, r"has no method `compute_ref_log_probs`"),
    ],
)
def test_rpo_trainer_refuses_a_TRL_whose_trainer_changed_and_says_how(
    name, there, message, tmp_path, monkeypatch
):
    class Changed(trl.DPOTrainer):
        pass

    setattr(Changed, name, there)
    monkeypatch.setattr(trainer_module, "DPOTrainer", Changed)
    monkeypatch.setattr(trl, "__version__", "1.99.0")
    with pytest.raises(RuntimeError, match=rf"RPOTrainer: .*trl \(1\.99\.0\).*{message}"):
        RPOTrainer(llama(), args=config(tmp_path), train_dataset=Dataset.from_list([GOOD]))


def test_rpo_trainer_refuses_a_helper_of_TRL_that_is_called_otherwise(tmp_path, monkeypatch):
    calls = {changed("model", "name"): (1, ("adapter_name",))}
    monkeypatch.setattr(trainer_module, "CALLS", calls)
    with pytest.raises(
        RuntimeError, match=r"\(model, name\) is called otherwise \(missing .*'name'"
    ):
        RPOTrainer(llama(), args=config(tmp_path), train_dataset=Dataset.from_list([GOOD]))


def test_rpo_trainer_refuses_a_TRL_that_lacks_an_attribute(tmp_path, monkeypatch):
    names = (*trainer_module.ATTRIBUTES, "_tokens_seen")
    monkeypatch.setattr(trainer_module, "ATTRIBUTES", names)
    with pytest.raises(RuntimeError, match="DPOTrainer sets no `_tokens_seen`"):
        RPOTrainer(
            llama(),
            llama(seed=1),
            config(tmp_path),
            train_dataset=Dataset.from_list([GOOD]),
            processing_class=tokenizer(),
        )


def test_rpo_config_takes_weighted_sums_in_every_spelling(tmp_path):
    expected = ObjectiveSum.of([(0.8, RPOObjective.dpo(0.2)), (0.2, RPOObjective.bco(0.3))])
    pairs = [[0.8, "dpo"], [0.2, {"preset": "bco", "beta": 0.3}]]
    for given in (
        {"objective": pairs, "beta": 0.2},
        {"objective": json.dumps(pairs), "beta": 0.2},
        {"objective": [(0.8, RPOObjective.dpo(0.2)), (0.2, RPOObjective.bco(0.3))]},
        {"objective": expected},
    ):
        args = config(tmp_path, **given)
        assert args.make_objective() == expected
        saved = json.loads(args.to_json_string())
        again = config(tmp_path, **{name: saved[name] for name in ("objective", "beta")})
        assert again.make_objective() == expected
        assert [part.name for part in again.make_objective().parts] == ["dpo", "bco"]


@pytest.mark.parametrize(
    "given, message",
    [
        ([], r"RPOConfig: `objective` must be pairs \[weight, objective\] .*got \[\]"),
        (["dpo"], r"must be pairs \[weight, objective\]"),
        ([[1.0, "nothing"]], r"`objective` is no sum: `objective` must name a distance"),
        ([[-1.0, "dpo"]], r"`objective` is no sum: `weight` must be a finite number > 0, got -1.0"),
        ([[1.0, 3]], r"`objective` must be an RPOObjective, a name, a dict, or a list of pairs"),
    ],
)
def test_rpo_config_refuses_what_is_no_sum(given, message, tmp_path):
    with pytest.raises((TypeError, ValueError), match=message):
        config(tmp_path, objective=given)


def test_rpo_trainer_of_a_sum_logs_each_part(tmp_path):
    trainer = RPOTrainer(
        llama(),
        llama(seed=1),
        config(tmp_path, objective=[[0.8, "dpo"], [0.2, "bco"]], max_steps=1),
        train_dataset=Dataset.from_list(pairs(4)),
        processing_class=tokenizer(),
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["dpo/loss"] + logged["bco/loss"] == pytest.approx(logged["loss"], rel=1e-4)
    assert logged["dpo/rewards/margins"] == logged["rewards/margins"]
    assert "rewards/target_margin" not in logged


def test_rpo_trainer_of_a_sum_logs_the_target_margin_of_a_part_that_uses_rewards(tmp_path):
    trainer = RPOTrainer(
        llama(),
        llama(seed=1),
        config(tmp_path, objective=[[0.8, "dpo"], [0.2, "squared"]], max_steps=1),
        train_dataset=Dataset.from_list([GOOD]),
        processing_class=tokenizer(),
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["rewards/target_margin"] == logged["squared/rewards/target_margin"] == 1.0
    assert "dpo/rewards/target_margin" not in logged  # a constant
