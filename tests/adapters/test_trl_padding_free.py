"""RPOTrainer without padding: the numbers of padded batches, from fewer rows."""

from __future__ import annotations

import pytest
import torch

from rpo_kernels import RPOObjective

from .tiny_models import llama, mixtral, text, tokenizer

pytestmark = [pytest.mark.xdist_group("trl"), pytest.mark.filterwarnings("ignore")]

trl = pytest.importorskip("trl")
from datasets import Dataset  # noqa: E402
from peft import PromptTuningConfig  # noqa: E402

from rpo_kernels.adapters.trl import RPOConfig, RPOTrainer  # noqa: E402

from .test_trl_trainer import LORA, groups, options, run  # noqa: E402

OBJECTIVE = RPOObjective("squared", 0.3, average=True, sft_weight=0.1)

# Prompts and responses of very different lengths, and groups of 2 to 5 responses.
UNEVEN = [
    {
        "prompt": text(i, 1 + 5 * (i % 3)) + " ",
        "responses": [text(10 * i + j + 900, 1 + 7 * ((i + j) % 3)) for j in range(k)],
        "rewards": [float((3 * j + i) % 4) / 2 for j in range(k)],
    }
    for i, k in enumerate([2, 5, 3, 2, 4, 2, 3, 3])
]


def trained(tmp_path, padding_free, *, rows=UNEVEN, objective=OBJECTIVE, more=None, **how):
    args = RPOConfig(
        objective=objective,
        padding_free=padding_free,
        **options(tmp_path, max_steps=2, **(more or {})),
    )
    return run(RPOTrainer, args, rows, **how)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"more": {"precompute_ref_log_probs": True, "max_length": 14}},
        {"ref": False, "peft": LORA},
        pytest.param(
            {"model": mixtral, "more": {"router_aux_loss_coef": 0.3}}, marks=pytest.mark.slow
        ),
        {
            "objective": RPOObjective("forward_kl", 1.0, reference="none"),
            "ref": False,
            "rows": groups([3] * 8),
        },
    ],
    ids=[
        "ragged groups",
        "precomputed reference, cut off",
        "LoRA",
        "mixture of experts",
        "K = 3, no reference",
    ],
)
def test_rpo_trainer_padding_free_takes_the_steps_of_padded_batches(how, tmp_path):
    expected, logged = (trained(tmp_path, packs, **how) for packs in (False, True))
    assert len(logged) == len(expected) == 2
    assert abs(expected[0]["loss"] - expected[-1]["loss"]) > 1e-4  # it trains
    for a, b in zip(logged, expected):
        assert a.keys() == b.keys()
        for name in b:
            assert a[name] == pytest.approx(b[name], rel=2e-5, abs=1e-5), name


def test_rpo_trainer_padding_free_has_the_gradients_of_padded_batches_from_fewer_rows(tmp_path):
    losses, grads, rows = [], [], []
    count = lambda module, args, out: rows.append(out[..., 0].numel())
    for packs in (False, True):
        trainer = RPOTrainer(
            llama(),
            llama(seed=1),
            RPOConfig(objective=OBJECTIVE, padding_free=packs, **options(tmp_path)),
            train_dataset=Dataset.from_list(UNEVEN[:4]),
            processing_class=tokenizer(),
        )
        trainer.model.model.layers[0].mlp.register_forward_hook(count)
        batch = next(iter(trainer.get_train_dataloader()))
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        losses.append(loss.detach())
        grads.append([p.grad for p in trainer.model.parameters()])
    torch.testing.assert_close(*losses)
    for packed, padded in zip(grads[1], grads[0]):
        torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-6)
    assert rows[1] == batch["cu_seqlens"][-1] < 0.6 * rows[0], rows


@pytest.mark.slow
def test_rpo_trainer_padding_free_evaluates_as_padded_batches_do(tmp_path):
    metrics = []
    for packs in (False, True):
        trainer = RPOTrainer(
            llama(),
            llama(seed=1),
            RPOConfig(
                objective=OBJECTIVE,
                padding_free=packs,
                **options(tmp_path, per_device_eval_batch_size=3),
            ),
            train_dataset=Dataset.from_list(UNEVEN),
            eval_dataset=Dataset.from_list(UNEVEN),
            processing_class=tokenizer(),
        )
        trainer.evaluate()
        metrics.append(trainer.state.log_history[-1])
        assert trainer.args.padding_free == packs  # a saved configuration says what was done
    for name, value in metrics[0].items():
        if "time" not in name and "second" not in name:
            assert metrics[1][name] == pytest.approx(value, rel=2e-5, abs=1e-5), name


def recurrent():
    """A model whose state passes from one sequence of a row to the next."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 1}
    return MambaForCausalLM(MambaConfig(vocab_size=len(tokenizer()), **sizes))


@pytest.mark.parametrize("precompute", [False, True])
def test_rpo_trainer_padding_free_refuses_a_model_that_mixes_sequences(precompute, tmp_path):
    with pytest.raises(ValueError, match=r"keeps the sequences of a row apart.*Mamba"):
        trained(
            tmp_path,
            True,
            model=lambda seed=0: recurrent(),
            more={"precompute_ref_log_probs": precompute},
        )


def test_rpo_trainer_padding_free_refuses_prompt_tuning(tmp_path):
    peft = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="`padding_free` and prompt learning"):
        trained(tmp_path, True, ref=False, peft=peft)


def test_rpo_trainer_padding_free_refuses_compute_metrics(tmp_path):
    with pytest.raises(ValueError, match="`compute_metrics` gets the logits of padded rows"):
        RPOTrainer(
            llama(),
            llama(seed=1),
            RPOConfig(padding_free=True, **options(tmp_path)),
            train_dataset=Dataset.from_list(UNEVEN[:2]),
            processing_class=tokenizer(),
            compute_metrics=lambda prediction: {},
        )


def test_rpo_trainer_padding_free_refuses_to_predict(tmp_path):
    trainer = RPOTrainer(
        llama(),
        llama(seed=1),
        RPOConfig(padding_free=True, **options(tmp_path)),
        train_dataset=Dataset.from_list(UNEVEN[:2]),
        processing_class=tokenizer(),
    )
    with pytest.raises(ValueError, match="`padding_free` must be False for predict"):
        trainer.predict(trainer.train_dataset)
