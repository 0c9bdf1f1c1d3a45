"""Every snippet of docs/losses.md: its value, its gradients and its GEMMs."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from rpo_kernels import (
    RPOObjective,
    linear_token_logps,
    preference_loss,
    reference,
    shift_labels,
)

from ..helpers import worst
from .tiny_models import llama

pytestmark = [pytest.mark.xdist_group("trl"), pytest.mark.filterwarnings("ignore")]
trl = pytest.importorskip("trl")

from rpo_kernels.adapters.transformers import attach, model_token_logps  # noqa: E402

PAGE = (Path(__file__).parents[2] / "docs" / "losses.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
TABLE = {
    name: (config, int(trainable), int(frozen))
    for name, config, trainable, frozen in re.findall(
        r"^\| `(\w+)` \| (?:-|`(.*?)`) \| (\d) \| (\d) \|$", PAGE, re.MULTILINE
    )
}
LOSSES: dict = {"__name__": "page"}
for source in SNIPPETS:
    exec(compile(source, "docs/losses.md", "exec"), LOSSES)

S, T, H, V, BETA = 8, 8, 16, 67, 0.5
CHOSEN_THEN_REJECTED = [*range(0, S, 2), *range(1, S, 2)]  # TRL's order of our sequences
OPTIONS = {
    "output_dir": "unused",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "beta": BETA,
}
# Logits are below 8, so fp32 rounds a log-probability by less than 8 eps; T of them are summed, in
# TRL and here. When log-probabilities change by x nats, these losses and their gradients change by
# no more than the share x of themselves.
TOLERANCE = 2 * T * 8 * torch.finfo(torch.float32).eps


class Bigram(torch.nn.Module):
    """A language model that sees one token: its table's gradients are those of hidden states."""

    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
    is_gradient_checkpointing = False

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.table = torch.nn.Embedding(V, H)
        self.lm_head = torch.nn.Linear(H, V, bias=False)
        torch.nn.init.normal_(self.lm_head.weight, std=1.5 * H**-0.5)

    def base_model(self, input_ids, **_):
        return SimpleNamespace(last_hidden_state=self.table(input_ids))

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=self.lm_head(self.table(input_ids)))


@pytest.fixture
def batch() -> SimpleNamespace:
    """Four pairs of unequal lengths. No token occurs twice: a row of the table, a hidden state."""
    torch.manual_seed(20)  # see test_losses_page_batch_tells_formulas_apart
    prompts = torch.tensor([3, 3, 1, 1, 2, 2, 4, 4])
    lengths = torch.tensor([8, 5, 4, 7, 8, 8, 6, 7])
    at = torch.arange(T)
    attention = (at < lengths[:, None]).long()
    responses = attention * (at >= prompts[:, None])
    ids = torch.randperm(V)[: S * T].view(S, T)
    labels = shift_labels(ids, responses)
    x = SimpleNamespace(
        ids=ids,
        attention=attention,
        responses=responses,
        labels=labels,
        desirable=torch.rand(S) < 0.5,
    )
    x.policy, x.reference = Bigram(3), Bigram(2)
    x.ref_logps = LOSSES["reference_logps"](*head_of(x.reference, ids), labels)
    return x


def head_of(
    model: Bigram, ids: torch.Tensor, frozen: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and head, as leaves."""
    hidden, weight = model.table(ids).detach(), model.lm_head.weight.detach()
    return hidden.requires_grad_(), weight.requires_grad_(not frozen)


def more_arguments(name: str, x: SimpleNamespace) -> dict:
    """What a snippet takes beside hidden, weight and labels."""
    tokens = reference.linear_token_logps(
        x.reference.table(x.ids), x.reference.lm_head.weight, x.labels
    ).detach()
    return {
        "reference_logps": {},
        "kto": {"ref_logps": x.ref_logps, "desirable": x.desirable, "kl": 0.3},
        "orpo": {"responses": x.labels != -100},
        "slic": {"delta": 2.0, "sft_weight": 0.3},
        "ld_dpo": {"ref_token_logps": tokens},
    }.get(name, {"ref_logps": x.ref_logps})


def check(loss, hidden, weight, model: Bigram, ids, theirs) -> None:
    """Value and gradients of both leaves equal those that TRL's loss gives its model."""
    theirs.backward()
    expected = (theirs, model.table.weight.grad[ids], model.lm_head.weight.grad)
    ours = (loss, *torch.autograd.grad(loss, (hidden, weight)))
    for a, b in zip(ours, expected):
        assert a.shape == b.shape and b.any()
        assert worst(a, b) <= TOLERANCE * b.abs().max()


def trainer_of(cls, config, x: SimpleNamespace):
    """TRL's trainer with what its loss reads, as its constructor sets it, and no more."""
    from trl.trainer.utils import add_fused_lm_head

    trainer, same = cls.__new__(cls), lambda tensor: tensor
    trainer.args, trainer.beta = config, config.beta
    trainer.model, trainer.ref_model = x.policy, x.reference
    trainer.accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=same, gather_for_metrics=same
    )
    trainer.aux_loss_enabled, trainer._tp_size, trainer._total_train_tokens = False, 1, 0
    trainer._metrics = {"train": defaultdict(list)}
    trainer.precompute_ref_logps = False
    for model in (x.policy, x.reference):
        add_fused_lm_head(
            model, outputs=("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
        )
    return trainer


def dpo_loss_of_trl(config: str, x: SimpleNamespace, **more) -> torch.Tensor:
    config_of = lambda **options: trl.DPOConfig(**OPTIONS, **options, **more)
    config = eval(config, {"DPOConfig": config_of})
    trainer = trainer_of(trl.DPOTrainer, config, x)
    trainer.loss_types = config.loss_type
    trainer.loss_weights = config.loss_weights or [1.0] * len(config.loss_type)
    names = "ld_alpha f_divergence_type f_alpha_divergence_coef label_smoothing use_weighting"
    for name in names.split():
        setattr(trainer, name, getattr(config, name))
    inputs = {"input_ids": x.ids, "attention_mask": x.attention, "completion_mask": x.responses}
    inputs = {name: tensor[CHOSEN_THEN_REJECTED] for name, tensor in inputs.items()}
    return trainer._compute_loss(x.policy, inputs, return_outputs=False)


def gemms_of(profiler) -> list:
    names = r"aten::(mm|bmm|addmm_?|baddbmm_?)"
    return [event for event in profiler.key_averages() if re.fullmatch(names, event.key)]


def test_losses_page_has_a_row_for_every_function_of_at_most_ten_lines():
    functions = [re.findall(r"^def (\w+)", source, re.MULTILINE) for source in SNIPPETS]
    assert list(TABLE) == [name for names in functions for name in names]
    for source in SNIPPETS[1:]:
        assert len([line for line in source.splitlines() if line]) <= 10, source
    assert all(len(line) <= 100 for source in SNIPPETS for line in source.splitlines())


@pytest.mark.parametrize(
    "name", [name for name, (config, *_) in TABLE.items() if config.startswith("DPOConfig")]
)
def test_linear_token_logps_of_pairs_equals_trl(name, batch):
    hidden, weight = head_of(batch.policy, batch.ids)
    more, trls = more_arguments(name, batch), {}
    if name == "discopop":  # the default of 0.05 takes all of one part and nothing of the other
        more["tau"] = trls["discopop_tau"] = 1.0
    loss = LOSSES[name](hidden, weight, batch.labels, beta=BETA, **more)
    theirs = dpo_loss_of_trl(TABLE[name][0], batch, **trls)
    check(loss, hidden, weight, batch.policy, batch.ids, theirs)


@pytest.mark.parametrize("divergence", LOSSES["SCORES"])
def test_linear_token_logps_f_dpo_equals_trl_under_every_divergence(divergence, batch):
    hidden, weight = head_of(batch.policy, batch.ids)
    loss = LOSSES["f_dpo"](hidden, weight, batch.labels, batch.ref_logps, divergence, BETA)
    theirs = dpo_loss_of_trl("DPOConfig()", batch, f_divergence_type=divergence)
    check(loss, hidden, weight, batch.policy, batch.ids, theirs)


def test_losses_page_batch_tells_formulas_apart(batch):
    """Pairs on both sides of hinge's margin; margins in another order than the reference's."""
    assert batch.policy(batch.ids).logits.abs().max() < 8  # see TOLERANCE
    logps = LOSSES["reference_logps"](*head_of(batch.policy, batch.ids), batch.labels)
    margins, ref_margins = (x[::2] - x[1::2] for x in (logps, batch.ref_logps))
    gaps = BETA * (margins - ref_margins)
    assert (gaps > 1).any() and (gaps < 1).any()
    assert not torch.equal(margins.argsort(), ref_margins.argsort())
    assert batch.desirable.any() and not batch.desirable.all()


@pytest.mark.parametrize(
    ("loss_type", "dims", "is_clamped"),
    [("kto", (0, 1), False), ("kto", (0,), True), ("apo_zero_unpaired", (0,), None)],
    ids=["kto", "kto, negative baseline", "apo_zero_unpaired"],
)
def test_linear_token_logps_kto_equals_trl(loss_type, dims, is_clamped, batch):
    x, weights = batch, (1.3, 0.7)
    config = trl.KTOConfig(
        **OPTIONS,
        loss_type=loss_type,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        per_device_train_batch_size=S,
    )
    trainer = trainer_of(trl.KTOTrainer, config, x)
    trainer.loss_type, trainer.calculate_KL = loss_type, loss_type == "kto"
    trainer.desirable_weight, trainer.undesirable_weight = weights
    others = x.ids.flip(dims)  # other tokens at each place
    inputs = {"attention_mask": x.attention, "completion_mask": x.responses}
    inputs |= {f"KL_{name}": tensor for name, tensor in inputs.items()}
    inputs |= {"input_ids": x.ids, "KL_input_ids": others, "label": x.desirable}
    theirs = trainer._compute_loss(x.policy, inputs, return_outputs=False)

    kl = 0.0
    if loss_type == "kto":
        labels = shift_labels(others, x.responses)
        ref_logps = LOSSES["reference_logps"](*head_of(x.reference, others), labels)
        kl = LOSSES["kl_baseline"](*head_of(x.policy, others), labels, ref_logps)
        assert (kl == 0) == is_clamped
    hidden, weight = head_of(x.policy, x.ids)
    loss = LOSSES["kto"](hidden, weight, x.labels, x.ref_logps, x.desirable, kl, BETA, weights)
    check(loss, hidden, weight, x.policy, x.ids, theirs)


def test_linear_token_logps_orpo_equals_trl(batch):
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    x = batch
    trainer = trainer_of(
        ORPOTrainer, eval(TABLE["orpo"][0], {"ORPOConfig": lambda: ORPOConfig(**OPTIONS)}), x
    )
    trainer.is_encoder_decoder, trainer.padding_value = False, 0
    tensors = {
        "input_ids": x.ids,
        "attention_mask": x.attention,
        "labels": x.ids.where(x.responses == 1, -100),
    }
    inputs = {
        f"{side}_{name}": tensor[i::2]
        for i, side in enumerate(("chosen", "rejected"))
        for name, tensor in tensors.items()
    }
    theirs, _ = trainer.get_batch_loss_metrics(x.policy, inputs)

    scored = x.responses.clone()
    scored[::2] = x.attention[::2]  # the prompts of chosen sequences too
    hidden, weight = head_of(x.policy, x.ids)
    loss = LOSSES["orpo"](hidden, weight, shift_labels(x.ids, scored), x.labels != -100, BETA)
    check(loss, hidden, weight, x.policy, x.ids, theirs)


def test_linear_token_logps_slic_equals_its_formula(batch):
    x, delta, sft_weight = batch, 2.0, 0.3
    hidden, weight = head_of(x.policy, x.ids)
    loss = LOSSES["slic"](hidden, weight, x.labels, delta, sft_weight)
    model = x.policy.double()
    logps = model(x.ids).logits.log_softmax(-1).gather(-1, x.labels.clamp(min=0)[..., None])[..., 0]
    better, worse = (logps * (x.labels != -100)).sum(1).view(-1, 2).unbind(1)
    hinges = (delta - better + worse).clamp(min=0)
    assert (hinges > 0).any() and (hinges == 0).any()
    check(loss, hidden, weight, model, x.ids, (hinges - sft_weight * better).mean())


def test_linear_token_logps_my_loss_equals_preference_loss(batch):
    x = batch
    hidden, weight = head_of(x.policy, x.ids)
    loss = LOSSES["my_loss"](hidden, weight, x.labels, x.ref_logps, BETA)
    logps = LOSSES["reference_logps"](hidden, weight, x.labels)
    expected = preference_loss(logps, None, RPOObjective.dpo(BETA), ref_logps=x.ref_logps).loss
    assert worst(loss, expected) <= TOLERANCE


def test_model_token_logps_takes_the_place_of_linear_token_logps(batch):
    model = attach(llama())
    ids, responses = batch.ids, batch.responses
    inputs = {"input_ids": ids, "attention_mask": batch.attention}
    logps = model_token_logps(model, {**inputs, "labels": ids.where(responses == 1, -100)}).logps
    hidden = model.base_model(**inputs).last_hidden_state
    expected = linear_token_logps(hidden, model.lm_head.weight, batch.labels)
    assert logps.requires_grad and logps.any() and worst(logps, expected) <= TOLERANCE


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("name", TABLE)
def test_linear_token_logps_gemms_of_a_loss_are_those_of_the_page(name, frozen, batch):
    hidden, weight = head_of(batch.policy, batch.ids, frozen)
    arguments = more_arguments(name, batch)
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiler:
        loss = LOSSES[name](hidden, weight, batch.labels, **arguments)
        if loss.requires_grad:
            loss.backward()
    flops = [event.flops for event in gemms_of(profiler)]
    assert all(flops)  # the profiler counts none of GEMMs in place
    scored = int((batch.labels != -100).sum())
    assert sum(flops) / (2 * scored * H * V) == TABLE[name][1 + frozen]


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_linear_token_logps_gemms_of_trl_are_those_of_the_page(frozen, batch):
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(batch.policy)
    batch.policy.lm_head.weight.requires_grad_(not frozen)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        out = batch.policy(input_ids=batch.ids, labels=batch.ids, fused_lm_head=True)
        out.log_probs.sum().backward()
    expected = re.search(r"TRL's head computes the logits again: (\d) and (\d)", PAGE).groups()
    calls = sum(event.count for event in gemms_of(profiler))  # each on all rows and columns
    assert calls == int(expected[frozen])
