"""Every snippet of docs/trainers.md and docs/hosts.md, against its host's calling convention."""

from __future__ import annotations

import copy
import enum
import importlib
import sys
import types
from collections import defaultdict

import pytest
import torch

pytest.importorskip("transformers")

from rpo_kernels import RPOObjective, preference_loss, shift_labels, token_logps

from .snippets import SNIPPETS, snippets_of
from .tiny_models import llama

S, T, V = 4, 9, 60
OBJECTIVE = RPOObjective("squared", 0.3, 2.0)


def fake(monkeypatch, **modules) -> None:
    """Put modules of a host in place; ``a__b`` stands for ``a.b``."""
    for name, contents in modules.items():
        parts = name.replace("__", ".").split(".")
        for i in range(1, len(parts)):
            monkeypatch.setitem(
                sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i]))
            )
        module = types.ModuleType(".".join(parts))
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, ".".join(parts), module)


def snippet(title: str, monkeypatch=None, **modules) -> dict:
    """The names that a section's snippet defines, with its host's modules faked."""
    fake(monkeypatch, **modules)
    (source,) = SNIPPETS[title]
    names: dict = {"__name__": "snippet"}
    exec(compile(source, title, "exec"), names)
    return names


def test_trainers_pages_have_a_tested_snippet_for_each_trainer():
    hosts = ["LlamaFactory", "ms-swift", "axolotl", "verl", "OpenRLHF", "NeMo-RL"]
    for page, titles in {"trainers.md": ["A bare loop", "Lightning"], "hosts.md": hosts}.items():
        found = {title: len(sources) for title, sources in snippets_of(page).items()}
        assert found == dict.fromkeys(titles, 1)


@pytest.fixture
def batch() -> dict:
    """Two pairs, right padded."""
    torch.manual_seed(0)
    lengths, prompts = torch.tensor([9, 6, 7, 8]), torch.tensor([3, 3, 2, 2])
    at = torch.arange(T)
    mask = (at < lengths[:, None]).long()
    input_ids = torch.randint(4, V, (S, T)) * mask
    labels = torch.where((at >= prompts[:, None]) & (mask == 1), input_ids, -100)
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "labels": labels,
        "group_size": 2,
        "rewards": torch.tensor([1.0, 0.2, -0.5, 0.4]),
    }


def token_log_probs(model, batch) -> torch.Tensor:
    """``[S, T]``, at t the log-probability of token t + 1 (0 at the end), of every token."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return token_logps(
        logits, shift_labels(batch["input_ids"], torch.ones_like(batch["input_ids"]))
    )


def scored(batch) -> torch.Tensor:
    """``[S, T]``, at t whether token t + 1 is scored."""
    return shift_labels(batch["input_ids"], batch["labels"] != -100) != -100


def expected(policy, reference, batch, objective=OBJECTIVE):
    mask = scored(batch)
    sums = [(token_log_probs(model, batch) * mask).sum(1) for model in (policy, reference)]
    rewards = batch["rewards"] if objective.uses_rewards else None
    return preference_loss(
        sums[0], rewards, objective, ref_logps=sums[1].detach(), lengths=mask.sum(1)
    )


def gradient(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def close(a, b) -> bool:
    return torch.allclose(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-4, atol=1e-6)


def test_bare_loop(batch, monkeypatch):
    names = snippet("A bare loop")
    names["train"].__globals__["objective"] = OBJECTIVE
    policy, reference, twin = llama(), llama(seed=1), llama()
    first = expected(twin, reference, batch)
    first.loss.backward()
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (policy, twin)]
    optimizers[1].step()
    metrics = next(names["train"](policy, reference, [batch], optimizers[0]))
    assert close(metrics["rewards/margins"], first.metrics()["rewards/margins"])
    assert all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(policy.parameters(), twin.parameters())
    )


def test_lightning(batch, monkeypatch):
    logged = {}

    class LightningModule(torch.nn.Module):
        device = torch.device("cpu")

        def log_dict(self, dictionary, sync_dist=False, batch_size=None):
            logged.update(dictionary)

    names = snippet("Lightning", monkeypatch, lightning={"LightningModule": LightningModule})
    twin, reference = llama(), llama(seed=1)
    truth = expected(twin, reference, batch)
    truth.loss.backward()
    module = names["RPOModule"](llama(), reference, OBJECTIVE)
    optimizer = module.configure_optimizers()
    loss = module.training_step(batch, 0)
    loss.backward()
    assert close(loss, truth.loss) and close(gradient(module.policy), gradient(twin))
    assert close(logged["rewards/margins"], truth.metrics()["rewards/margins"])
    assert len(optimizer.param_groups[0]["params"]) == len(list(twin.parameters()))
    assert not any(name.startswith("reference") for name in module.state_dict())


def test_nemo_rl_in_two_microbatches(batch, monkeypatch):
    interfaces = {
        "LossType": enum.Enum(
            "LossType", {"TOKEN_LEVEL": "token_level", "SEQUENCE_LEVEL": "sequence_level"}
        ),
        "LossInputType": enum.Enum("LossInputType", {"LOGIT": "logit", "LOGPROB": "logprob"}),
    }
    names = snippet("NeMo-RL", monkeypatch, nemo_rl__algorithms__loss__interfaces=interfaces)
    loss_fn = names["RPOLossFn"](OBJECTIVE)
    assert loss_fn.input_type.value == "logprob" and loss_fn.loss_type.value == "sequence_level"
    policy, twin, reference = llama(), llama(), llama(seed=1)
    truth = expected(twin, reference, batch)
    truth.loss.backward()
    data = {
        "input_ids": batch["input_ids"],
        "token_mask": (batch["labels"] != -100).long(),
        "sample_mask": torch.ones(S),
        "rewards": batch["rewards"],
        "reference_policy_logprobs": token_log_probs(reference, batch).detach(),
    }
    total, metrics = 0.0, defaultdict(float)
    for pair in (slice(0, 2), slice(2, 4)):  # the host sums losses and metrics over micro-batches
        part = {name: x[pair] for name, x in data.items()}
        logprobs = token_log_probs(
            policy, {name: batch[name][pair] for name in ("input_ids", "attention_mask")}
        )[:, :-1]
        loss, found = loss_fn(
            data=part,
            global_valid_seqs=torch.tensor(4),
            global_valid_toks=part["token_mask"].sum(),
            next_token_logprobs=logprobs,
        )
        loss.backward()
        total += loss.item()
        for name, x in found.items():
            metrics[name] += x
    assert (
        close(total, truth.loss)
        and close(metrics["loss"], truth.loss)
        and metrics["num_valid_samples"] == 4
    )
    assert close(gradient(policy), gradient(twin))
    assert close(metrics["rewards/margins"], truth.metrics()["rewards/margins"])


def test_nemo_rl_masks_a_sample_with_its_group(batch, monkeypatch):
    kinds = {
        "LossType": types.SimpleNamespace(SEQUENCE_LEVEL=0),
        "LossInputType": types.SimpleNamespace(LOGPROB=0),
    }
    loss_fn = snippet("NeMo-RL", monkeypatch, nemo_rl__algorithms__loss__interfaces=kinds)[
        "RPOLossFn"
    ](OBJECTIVE)
    logprobs = torch.full((S, T - 1), -1.0, requires_grad=True)
    data = {
        "token_mask": torch.ones(S, T),
        "sample_mask": torch.tensor([1.0, 1.0, 0.0, 0.0]),
        "rewards": batch["rewards"],
        "reference_policy_logprobs": torch.full((S, T), -2.0),
    }
    loss, _ = loss_fn(data, torch.tensor(2), torch.tensor(16), next_token_logprobs=logprobs)
    loss.backward()
    assert loss > 0 and logprobs.grad[:2].any() and not logprobs.grad[2:].any()


class LlamaFactoryDPO:
    """What ``llamafactory.train.dpo.trainer.CustomDPOTrainer`` does with log-probabilities."""

    loss_type, ld_alpha = "sigmoid", None

    def __init__(self, model, ref_model, finetuning_args=None):
        self.model, self.ref_model = model, ref_model

    def concatenated_forward(self, model, batch, is_ref_model=False):
        logits = model(**without(batch, "labels"), return_dict=True, use_cache=False).logits
        labels = batch["labels"][:, 1:]
        mask = labels != -100
        tokens = logits[:, :-1].log_softmax(-1).gather(2, labels.where(mask, 0)[..., None])[..., 0]
        logps = (tokens * mask).sum(-1)
        if self.loss_type in ["ipo", "orpo", "simpo"]:
            logps = logps / mask.sum(-1)
        averages = logps if self.loss_type in ["ipo", "orpo", "simpo"] else logps / mask.sum(-1)
        chosen, rejected = logps.split(len(labels) // 2)
        parts = dict(zip(("chosen_logits", "rejected_logits"), logits.split(len(labels) // 2)))
        parts |= {"chosen_logps": chosen, "rejected_logps": rejected}
        return parts | {"chosen_logps_avg": averages[: len(labels) // 2]}


def without(batch: dict, *names: str) -> dict:
    return {name: x for name, x in batch.items() if name not in names}


def halves(batch: dict) -> dict:
    """Both chosen responses, then both rejected ones."""
    rows = torch.tensor([0, 2, 1, 3])
    return {name: batch[name][rows] for name in ("input_ids", "attention_mask", "labels")}


def dpo(found: dict) -> torch.Tensor:
    margins = found["chosen_logps"] - found["rejected_logps"]
    return -torch.nn.functional.logsigmoid(0.1 * margins).sum()


@pytest.mark.parametrize("loss_type, ld_alpha", [("sigmoid", None), ("simpo", None), ("ipo", 0.5)])
def test_llamafactory(loss_type, ld_alpha, batch, monkeypatch):
    host = {"CustomDPOTrainer": LlamaFactoryDPO}
    tuner = {"run_exp": None}
    names = snippet(
        "LlamaFactory",
        monkeypatch,
        llamafactory__train__tuner=tuner,
        llamafactory__train__dpo__trainer=host,
    )
    assert sys.modules["llamafactory.train.dpo.trainer"].CustomDPOTrainer is names["Trainer"]
    monkeypatch.setattr(LlamaFactoryDPO, "loss_type", loss_type)
    monkeypatch.setattr(LlamaFactoryDPO, "ld_alpha", ld_alpha)
    found = []
    for trainer in (
        names["Trainer"](model=llama(), ref_model=None, finetuning_args=0),
        LlamaFactoryDPO(llama(), None),
    ):
        found.append(trainer.concatenated_forward(trainer.model, halves(batch)))
        (dpo(found[-1]) + found[-1]["chosen_logps_avg"].sum()).backward()
        found[-1]["gradient"] = gradient(trainer.model)
    for name in ("chosen_logps", "rejected_logps", "chosen_logps_avg", "gradient"):
        assert close(found[0][name], found[1][name]), name
    assert found[0].keys() == found[1].keys()
    assert found[0]["chosen_logits"].isnan().all() == (ld_alpha is None)


class SwiftDPO:
    """What ``swift.rlhf_trainers.DPOTrainer`` does with log-probabilities."""

    def __init__(self, model=None, ref_model=None, *args, **options):
        self.model, self.ref_model = model, ref_model

    def get_use_logits_to_keep(self, default_value=True):
        return default_value

    def get_per_token_logps(self, logits, labels, label_pad_token_id=-100, reduction="mean"):
        mask = labels != label_pad_token_id
        logps = logits.log_softmax(-1).gather(2, labels.where(mask, 0)[..., None])[..., 0]
        return logps * mask, logits.mean(-1) * mask, mask

    def concatenated_forward(self, model, batch, is_ref_model=False):
        batch = batch.copy()
        if self.get_use_logits_to_keep(True):
            keep = batch["labels"].shape[-1] - (batch["labels"] != -100).int().argmax(-1).min() + 1
            batch |= {"labels": batch["labels"][:, -keep:], "logits_to_keep": int(keep)}
        labels = torch.roll(batch.pop("labels"), shifts=-1, dims=1)
        logits = model(**batch, use_cache=False).logits
        logps, mean_logits, mask = self.get_per_token_logps(logits, labels, label_pad_token_id=-100)
        half = len(labels) // 2
        return {
            "nll_loss": -logps[:half][mask[:half]].mean(),
            "chosen_logps": logps.sum(-1)[:half],
            "rejected_logps": logps.sum(-1)[half:],
            "mean_chosen_logits": mean_logits[:half][mask[:half]].mean(),
        }


def test_ms_swift(batch, monkeypatch):
    host = {"DPOTrainer": SwiftDPO}
    names = snippet("ms-swift", monkeypatch, swift__rlhf_trainers=host)
    assert sys.modules["swift.rlhf_trainers"].DPOTrainer is names["Trainer"]
    found = []
    for trainer in (names["Trainer"](llama(), None, args=0), SwiftDPO(llama())):
        found.append(trainer.concatenated_forward(trainer.model, halves(batch)))
        (dpo(found[-1]) + found[-1]["nll_loss"]).backward()
        found[-1]["gradient"] = gradient(trainer.model)
    for name in ("chosen_logps", "rejected_logps", "nll_loss", "gradient"):
        assert close(found[0][name], found[1][name]), name
    assert found[0]["mean_chosen_logits"].isnan() and not found[1]["mean_chosen_logits"].isnan()


class VerlFusedLinear(torch.nn.Module):
    """``verl.utils.experimental.torch_functional.FusedLinearForPPO``, its ``torch`` backend."""

    def __init__(self, chunk_size=512, impl_backend="torch"):
        super().__init__()
        if impl_backend not in ("torch", "liger"):
            raise ValueError(f"Unsupported FusedLinearForPPO backend: {impl_backend}")
        self.chunk_size, self.impl_backend = chunk_size, impl_backend

    def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
        logps = ((hidden_states @ vocab_weights.t()) / temperature).log_softmax(-1)
        entropies = -(logps.exp() * logps).sum(-1)
        return logps.gather(-1, input_ids[..., None])[..., 0], entropies


def test_verl_plugin_adds_a_backend_by_name(monkeypatch):
    def patch_forward_with_backends(
        model, use_fused_kernels=False, fused_kernels_backend=None
    ):  # verl's, as far as it is to be seen
        if use_fused_kernels and fused_kernels_backend in ["triton", "torch", "liger"]:
            model._verl_fused_kernels_backend = fused_kernels_backend
            model.patched = True

    functions = {"FusedLinearForPPO": VerlFusedLinear}
    patches = {"patch_forward_with_backends": patch_forward_with_backends}
    fake(
        monkeypatch,
        verl__utils__experimental__torch_functional=functions,
        verl__models__transformers__monkey_patch=patches,
    )
    monkeypatch.delitem(sys.modules, "rpo_kernels.adapters.verl", raising=False)
    importlib.import_module("rpo_kernels.adapters.verl")
    monkeypatch.delitem(sys.modules, "rpo_kernels.adapters.verl")
    host = sys.modules["verl.utils.experimental.torch_functional"]
    patch = sys.modules["verl.models.transformers.monkey_patch"].patch_forward_with_backends

    found = {}
    for name in ("torch", "rpo_kernels"):
        model = types.SimpleNamespace()
        patch(model, use_fused_kernels=True, fused_kernels_backend=name)
        assert model.patched
        torch.manual_seed(0)
        hidden, weight = torch.randn(2, 5, 8), torch.randn(40, 8)
        hidden.requires_grad_(), weight.requires_grad_()
        fused = host.FusedLinearForPPO(impl_backend=model._verl_fused_kernels_backend)
        logps, entropies = fused(hidden, weight, torch.arange(10).view(2, 5), temperature=0.7)
        (logps.square().sum() + entropies.sum()).backward()
        found[name] = logps, entropies, hidden.grad, weight.grad
    assert all(close(a, b) for a, b in zip(*found.values()))
    for options in ({}, {"use_fused_kernels": False, "fused_kernels_backend": "rpo_kernels"}):
        model = types.SimpleNamespace()
        patch(model, **options)
        assert not vars(model)  # off unless asked for
    with pytest.raises(ValueError, match="Unsupported"):
        host.FusedLinearForPPO(impl_backend="rpo")


@pytest.mark.parametrize("ranks", [1, 2])
def test_verl_over_data_parallel_ranks(ranks, batch):
    names = snippet("verl")
    worker = types.SimpleNamespace()
    worker.set_loss_fn = lambda loss_fn: setattr(worker, "loss_fn", loss_fn)
    names["use_rpo"](worker, OBJECTIVE, 2)
    policy, twin, reference = llama(), llama(), llama(seed=1)
    truth = expected(twin, reference, batch)
    truth.loss.backward()
    lengths = batch["attention_mask"].sum(1).tolist()
    jagged = lambda x, rows: torch.nested.nested_tensor_from_jagged(
        torch.cat([x[i, : lengths[i]] for i in rows]),
        torch.tensor([0, *torch.tensor([lengths[i] for i in rows]).cumsum(0)]),
    )
    ref_logps = (token_log_probs(reference, batch) * scored(batch)).sum(1).detach()
    losses = []
    for rank in range(ranks):  # each holds its share; gradients are averaged over ranks
        rows = range(rank * S // ranks, (rank + 1) * S // ranks)
        data = {
            "loss_mask": jagged((batch["labels"] != -100).long(), rows),
            "rewards": batch["rewards"][list(rows)],
            "ref_logps": ref_logps[list(rows)],
            "global_batch_size": S,
            "dp_size": ranks,
        }
        model_output = {"log_probs": jagged(token_log_probs(policy, batch), rows)}
        loss, metrics = worker.loss_fn(model_output=model_output, data=data, dp_group=None)
        (loss / ranks).backward()
        losses.append(loss.item())
    assert close(sum(losses) / ranks, truth.loss) and close(gradient(policy), gradient(twin))
    assert all(isinstance(x, float) for x in metrics.values())


def test_openrlhf(monkeypatch):
    trainer = types.SimpleNamespace()
    objective = RPOObjective.exo(0.3, 0.1)
    host = {"log_probs_from_logits": None}
    names = snippet("OpenRLHF", monkeypatch, openrlhf__models__actor=host)
    names["use_rpo"](trainer, objective)
    logits, labels = torch.randn(2, 3, V, requires_grad=True), torch.randint(V, (2, 3))
    tokens = sys.modules["openrlhf.models.actor"].log_probs_from_logits(logits, labels)
    assert close(tokens, logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0])
    chosen, rejected, ref_chosen, ref_rejected = torch.randn(4, 5).requires_grad_()
    loss, chosen_reward, reject_reward = trainer.loss_fn(
        chosen, rejected, ref_chosen.detach(), ref_rejected.detach()
    )
    logps, refs = (
        torch.stack(pair, 1).flatten() for pair in ((chosen, rejected), (ref_chosen, ref_rejected))
    )
    assert close(loss, preference_loss(logps, None, objective, ref_logps=refs.detach()).loss)
    assert close(chosen_reward, 0.3 * (chosen - ref_chosen)) and close(
        reject_reward, 0.3 * (rejected - ref_rejected)
    )
    # what the host logs
    assert loss.requires_grad and (chosen_reward > reject_reward).float().mean().item() >= 0


def test_axolotl(batch, monkeypatch):
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    class AxolotlDPOTrainer:
        def __init__(self, model, args=None, peft_config=None):
            self.model = get_peft_model(model, peft_config)  # TRL wraps it
            self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
            self.accelerator = types.SimpleNamespace(gather=lambda x: x)

    names = snippet(
        "axolotl",
        monkeypatch,
        axolotl__core__trainers__dpo__trainer={"AxolotlDPOTrainer": AxolotlDPOTrainer},
        axolotl__integrations__base={"BasePlugin": type("BasePlugin", (), {})},
    )
    plugin = names["RPOPlugin"]()
    plugin.post_model_load({}, llama())
    adapter = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    trainer = plugin.get_trainer_cls({})(*[], args=None, peft_config=adapter)
    halves = torch.tensor([0, 2, 1, 3])  # chosen, chosen, rejected, rejected
    inputs = {name: batch[name][halves] for name in ("input_ids", "attention_mask")}
    inputs["completion_mask"] = (batch["labels"] != -100).long()[halves]
    loss = trainer._compute_loss(trainer.model, inputs, False)
    loss.backward()
    twin = llama()
    torch.manual_seed(1)
    twin = get_peft_model(twin, copy.deepcopy(adapter))
    with torch.no_grad(), twin.disable_adapter():
        ref = (token_log_probs(twin, batch) * scored(batch)).sum(1)
    truth = preference_loss(
        (token_log_probs(twin, batch) * scored(batch)).sum(1),
        None,
        trainer.objective,
        ref_logps=ref,
    )
    truth.loss.backward()
    assert close(loss, truth.loss) and close(gradient(trainer.model), gradient(twin))
    assert set(trainer._metrics["train"]) == set(truth.metrics())
