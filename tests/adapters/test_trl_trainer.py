"""RPOTrainer: TRL's own losses where the objective is TRL's, and the reference's everywhere
else.
"""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rpo_kernels import RPOObjective, reference

from .tiny_models import llama, mixtral, pairs, text, tokenizer

# One process imports TRL, which takes 5 s; what its dependencies warn about is not ours.
pytestmark = [pytest.mark.xdist_group("trl"), pytest.mark.filterwarnings("ignore")]

trl = pytest.importorskip("trl")
from datasets import Dataset, load_from_disk  # noqa: E402
from peft import LoraConfig, PromptTuningConfig  # noqa: E402

from rpo_kernels.adapters.trl import RPOConfig, RPOTrainer  # noqa: E402

# not zero: the adapter matters at once
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def options(tmp_path, **more) -> dict:
    return {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "logging_steps": 1,
        "disable_tqdm": True,
        "optim": "sgd",
        "learning_rate": 0.3,
        **more,  # Adam makes steps of rounded zeros
    }


def run(cls, args, rows=None, *, peft=None, ref=True, model=llama):
    """Train, and return what was logged at each step."""
    trainer = cls(
        model(),
        model(seed=1) if ref else None,  # another model, so that log-ratios are not 0 at first
        args,
        train_dataset=Dataset.from_list(pairs(12) if rows is None else rows),
        processing_class=tokenizer(),
        peft_config=copy.deepcopy(peft),
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


VARIANTS = {
    "sigmoid": ("dpo", {}, {}),
    "ipo": ({"preset": "ipo", "tau": 0.1, "average": True}, {"loss_type": "ipo"}, {}),
    "robust, label smoothing": (
        {"preset": "robust_dpo", "label_smoothing": 0.2},
        {"loss_type": "robust", "label_smoothing": 0.2},
        {},
    ),
    "exo_pair, label smoothing": (
        {"preset": "exo", "label_smoothing": 0.1},
        {"loss_type": "exo_pair", "label_smoothing": 0.1},
        {},
    ),
    "sppo_hard": ({"preset": "sppo", "beta": 0.1}, {"loss_type": "sppo_hard"}, {}),
    "bco_pair": ("bco", {"loss_type": "bco_pair"}, {}),
    "precomputed reference": ("dpo", {"precompute_ref_log_probs": True}, {}),
    "precomputed reference is the model as it was": (
        "dpo",
        {"precompute_ref_log_probs": True},
        {"ref": False},
    ),
    "PEFT reference": ("dpo", {}, {"ref": False, "peft": LORA}),
    "PEFT reference, precomputed": (
        "dpo",
        {"precompute_ref_log_probs": True},
        {"ref": False, "peft": LORA},
    ),
    "prompt tuning": (
        "dpo",
        {},
        {"ref": False, "peft": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)},
    ),
    "gradient checkpointing": ("dpo", {"gradient_checkpointing": True}, {}),
    "mixture of experts": ("dpo", {"router_aux_loss_coef": 0.3}, {"model": mixtral}),
    "left end cut off": ("dpo", {"max_length": 12, "truncation_mode": "keep_end"}, {}),
    "right end cut off": ("dpo", {"max_length": 12}, {}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_rpo_trainer_takes_six_steps_of_TRLs_own(variant, tmp_path):
    objective, theirs, more = VARIANTS[variant]
    ours = {name: x for name, x in theirs.items() if name not in ("loss_type", "label_smoothing")}
    expected = run(trl.DPOTrainer, trl.DPOConfig(**options(tmp_path, **theirs)), **more)
    logged = run(RPOTrainer, RPOConfig(objective=objective, **options(tmp_path, **ours)), **more)
    assert len(logged) == len(expected) == 6
    assert abs(expected[0]["loss"] - expected[-1]["loss"]) > 1e-3  # it trains
    metrics = set(expected[0])
    if (
        objective != "dpo"
    ):  # implicit rewards are in the objective's units there, TRL's always beta x log-ratio
        metrics = {
            name
            for name in metrics
            if not name.startswith("rewards/") or name == "rewards/accuracies"
        }
        metrics -= {"rewards/accuracies"} if "average" in objective else set()
    for step, (a, b) in enumerate(zip(logged, expected)):
        assert set(b) <= set(a), "a metric of TRL is lost"
        # policy and reference are equal: accuracies are those of rounding errors
        tied = abs(b["rewards/margins"]) < 1e-6
        for name in metrics - ({"rewards/accuracies"} if tied else set()):
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-5), (step, name)


@pytest.fixture
def mixture(tmp_path):
    """A trainer of a mixture of experts whose configuration asks for the auxiliary loss."""

    def make(rows=None, *, asks=True, **config):
        model = mixtral()
        model.config.output_router_logits = asks
        return RPOTrainer(
            model,
            mixtral(seed=1),
            RPOConfig(**options(tmp_path, max_steps=1, **config)),
            train_dataset=Dataset.from_list(pairs(4) if rows is None else rows),
            processing_class=tokenizer(),
        )

    return make


def test_rpo_trainer_adds_no_auxiliary_loss_with_a_coefficient_of_0(mixture):
    losses = []
    for asks in (False, True):
        trainer = mixture(asks=asks, objective="dpo", router_aux_loss_coef=0.0)
        (batch,) = trainer.get_train_dataloader()
        losses.append(trainer.compute_loss(trainer.model, batch).item())
    assert losses[1] == losses[0]


def test_rpo_trainer_logs_the_auxiliary_loss_exactly_beside_a_large_loss(mixture):
    rows = [row | {"score_chosen": 1000.0} for row in pairs(4)]
    trainer = mixture(rows, objective="squared", router_aux_loss_coef=0.01)
    (batch,) = trainer.get_train_dataloader()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = mixtral()(**inputs, output_router_logits=True).aux_loss.item()
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["loss"] > 1e5 and logged["aux_loss"] == pytest.approx(expected, rel=1e-5)


# ---- K responses ---------------------------------------------------------------------------------


def groups(sizes) -> list[dict]:
    return [
        {
            "prompt": text(i, 3) + " ",
            "responses": [text(10 * i + j + 500, 1 + (i + 2 * j) % 5) for j in range(k)],
            "rewards": [float((3 * j + i) % 4) / 2 for j in range(k)],
        }
        for i, k in enumerate(sizes)
    ]


def truth(batch, objective) -> tuple[float, float]:
    """Loss and gradient norm of a batch from the logits of the models above, all in float64."""
    logps = []
    policy, ref = llama().double(), llama(seed=1).double()
    for model in (policy, ref):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[
            :, :-1
        ]
        token = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        logps.append((token * batch["completion_mask"][:, 1:]).sum(1))
    sizes = batch["group_sizes"]
    out = reference.preference_loss(
        logps[0],
        batch["rewards"].double(),
        objective,
        ref_logps=None if objective.reference == "none" else logps[1].detach(),
        lengths=batch["completion_mask"][:, 1:].sum(1),
        cu_groups=torch.tensor([0, *sizes.cumsum(0)], dtype=torch.int32),
    )
    out.loss.backward()
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in policy.parameters()))
    return out.loss.item(), norm


@pytest.mark.parametrize(
    "sizes", [[2] * 4, [4] * 4, [2, 5, 3, 2]], ids=["pairs", "K = 4", "ragged"]
)
@pytest.mark.parametrize(
    "objective",
    [
        RPOObjective("backward_kl", 0.3, 2.0),
        RPOObjective(
            "squared",
            0.2,
            comparison="pairwise",
            average=True,
            sft_weight=0.1,
            sft_normalizer="tokens",
        ),
        RPOObjective("forward_kl", 1.0, reference="none", comparison="pointwise"),
    ],
    ids=["backward KL", "squared and SFT", "reference-free"],
)
def test_rpo_trainer_has_the_loss_and_gradient_of_the_reference(objective, sizes, tmp_path):
    trainer = RPOTrainer(
        llama(),
        llama(seed=1) if objective.reference == "single" else None,
        RPOConfig(objective=objective, **options(tmp_path, max_steps=1, max_grad_norm=1e9)),
        train_dataset=Dataset.from_list(groups(sizes)),
        processing_class=tokenizer(),
    )
    (batch,) = trainer.get_train_dataloader()
    loss, norm = truth(batch, objective)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(loss, rel=2e-5)
    assert logged["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert "rewards/target_margin" in logged and ("kl" in logged) == (
        objective.reference == "single"
    )


def test_rpo_trainer_multiplies_the_loss_of_a_row_by_its_group_weight(tmp_path):
    rows = [row | {"group_weight": w} for row, w in zip(groups([2, 3]), (3.0, 0.5))]
    trainer = RPOTrainer(
        llama(),
        llama(seed=1),
        RPOConfig(objective="squared", **options(tmp_path)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    rows = [*trainer.train_dataset]
    loss = lambda rows: trainer.compute_loss(trainer.model, trainer.data_collator(rows)).item()
    first, second = (loss([{**row, "group_weight": 1.0}]) for row in rows)
    assert loss(rows) == pytest.approx((3.0 * first + 0.5 * second) / 2, rel=1e-5)


def test_rpo_trainer_computes_the_reference_of_a_batch_that_was_not_precomputed(tmp_path):
    trainer = RPOTrainer(
        llama(),
        llama(seed=1),
        RPOConfig(**options(tmp_path)),
        train_dataset=Dataset.from_list(groups([2, 3])),
        processing_class=tokenizer(),
    )
    batch = trainer.data_collator([*trainer.train_dataset])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    logps = llama(seed=1)(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    token = logps.gather(-1, ids[:, 1:, None])[..., 0] * batch["completion_mask"][:, 1:]
    a, b, c, d, e = token.sum(1).tolist()
    first, others = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    assert first.tolist() == pytest.approx([a, c], rel=1e-5)
    assert others.flatten().tolist() == pytest.approx([b, 0.0, d, e], rel=1e-5)


# ---- accumulation, evaluation, distribution ------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [{}, {"precompute_ref_log_probs": True}],
    ids=["live reference", "precomputed reference"],
)
def test_rpo_trainer_takes_the_same_step_in_four_microbatches(more, tmp_path):
    steps = []
    for size, accumulation in ((4, 1), (1, 4)):
        args = options(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            **more,
        )
        steps.append(
            run(
                RPOTrainer,
                RPOConfig(objective=RPOObjective("squared", 0.3), **args),
                groups([2, 4, 3, 5]),
            )[0]
        )
    for name in ("loss", "grad_norm"):
        assert steps[0][name] == pytest.approx(steps[1][name], rel=1e-5)


def test_rpo_trainer_evaluates_the_loss_of_all_prompts_and_every_metric(tmp_path):
    rows, objective = groups([3, 2, 4, 3, 3]), RPOObjective("backward_kl", 0.5)
    trainer = RPOTrainer(
        llama(),
        llama(seed=1),
        RPOConfig(objective=objective, **options(tmp_path, per_device_eval_batch_size=2)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset={"a": Dataset.from_list(rows), "b": Dataset.from_list(pairs(3))},
        processing_class=tokenizer(),
    )
    metrics = trainer.evaluate()
    batch = trainer.data_collator(list(trainer.eval_dataset["a"]))
    assert metrics["eval_a_loss"] == pytest.approx(truth(batch, objective)[0], rel=2e-5)
    for name in (
        "rewards/margins",
        "rewards/agreement",
        "rewards/target_margin",
        "kl",
        "entropy",
        "mean_token_accuracy",
    ):
        assert any(f"eval_{name}" in entry for entry in trainer.state.log_history), name
    fresh = trainer.evaluate(Dataset.from_list(rows))  # prepared on the spot
    assert fresh["eval_loss"] == pytest.approx(metrics["eval_a_loss"], rel=1e-6)


def test_rpo_trainer_metrics_of_groups_say_which_response_they_mean(tmp_path):
    """K = 3 with known implicit rewards: chosen and rejected are the largest and smallest target,
    agreement counts pairs.
    """
    from rpo_kernels import preference_loss
    from rpo_kernels.adapters.trl.metrics import group_metrics

    logps, rewards = (
        torch.tensor([1.0, 3.0, 2.0, 5.0, 4.0]),
        torch.tensor([0.0, 2.0, 2.0, 1.0, 3.0]),
    )
    out = preference_loss(
        logps,
        rewards,
        RPOObjective("squared", 1.0, reference="none"),
        cu_groups=torch.tensor([0, 3, 5], dtype=torch.int32),
    )
    metrics, chosen, rejected = group_metrics(out, torch.tensor([3, 2]), ragged=True)
    assert chosen.tolist() == [1, 4] and rejected.tolist() == [0, 3]
    values = {name: (total / count).item() for name, (total, count) in metrics.items()}
    assert values == {
        "rewards/chosen": 3.5,
        "rewards/rejected": 3.0,
        "rewards/accuracies": 0.5,
        "rewards/margins": 0.5,
        "rewards/target_margin": 2.0,
        "logps/chosen": 3.5,
        "logps/rejected": 3.0,
        "rewards/agreement": pytest.approx(2 / 3),
    }


def two_runs(where, batch_size: int) -> list[list[dict]]:
    """Three steps and an evaluation, with a live and with a precomputed reference; K differs, also
    between processes.
    """
    # processes share a precomputed reference through a file beside the data
    rows, histories = (
        load_from_disk(where),
        [],
    )
    for precompute in (False, True):
        args = options(
            where,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=batch_size,
            max_steps=3,
        )
        trainer = RPOTrainer(
            llama(),
            llama(seed=1),
            RPOConfig(objective="squared", precompute_ref_log_probs=precompute, **args),
            train_dataset=rows,
            eval_dataset=rows.select(range(4)),
            processing_class=tokenizer(),
        )
        trainer.train()
        trainer.evaluate()
        histories.append(trainer.state.log_history)
    return histories


PROGRAM = """if True:
    import json, os, sys, warnings
    warnings.simplefilter("ignore")
    from tests.adapters.test_trl_trainer import two_runs
    histories = two_runs(sys.argv[1], batch_size=2)
    if os.environ["RANK"] == "0":
        print("LOG" + json.dumps(histories))
"""


def test_rpo_trainer_of_two_processes_takes_the_steps_of_one(tmp_path):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    Dataset.from_list(groups([2, 4, 3, 2, 5, 2, 3, 3])).save_to_disk(tmp_path / "data")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(program),
        str(tmp_path / "data"),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("LOG")]
    for logged, expected in zip(
        json.loads(line.removeprefix("LOG")), two_runs(tmp_path / "data", batch_size=4)
    ):
        assert len(logged) == len(expected) == 5  # steps, training's summary, evaluation
        for a, b in zip(logged, expected):
            assert a.keys() == b.keys()
            for name in b:
                if not name.endswith(
                    ("runtime", "per_second", "total_flos")
                ):  # flops count padding
                    assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-5), name
