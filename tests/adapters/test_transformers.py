"""The transformers adapter: tiny random models of many families against their own logits, with and
without PEFT.
"""

import contextlib
import copy
import inspect
import pickle
from types import MethodType

import pytest
import torch

transformers = pytest.importorskip("transformers")

from rpo_kernels import RPOObjective, preference_loss, reference  # noqa: E402
from rpo_kernels.adapters.transformers import (  # noqa: E402
    TokenLogps,
    attach,
    detach,
    model_rpo_loss,
    model_token_logps,
)

from ..helpers import worst  # noqa: E402

# of ModernBERT in transformers 5.0
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

IMAGE, V, T = 90, 97, 12
SIZE = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.5}
EYES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
OBJECTIVE = RPOObjective("backward_kl", beta=0.3)
NO_AUX = {"output_router_logits": False}  # what is no mixture of experts ignores it

# Each family for a way from hidden states to logits, and a word on it.
TEXT = {
    "Llama": {},
    "Qwen3": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 4.0, "tie_word_embeddings": True},
    "Cohere2": {"head_dim": 8, "logit_scale": 0.3, "tie_word_embeddings": True},
    "Granite": {"logits_scaling": 3.3},  # divides
    "HyperCLOVAX": {"logits_scaling": 3.3},  # multiplies
    "Phi": {},  # bias
    "GPT2": {
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 32,
        "tie_word_embeddings": True,
    },
    "ModernBertDecoder": {
        "pad_token_id": 0,
        "cls_token_id": 1,
        "sep_token_id": 2,
    },  # layers between backbone and head
    "Qwen3Moe": {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16, **EXPERTS},
    "Mixtral": {"num_local_experts": 4, **EXPERTS},
}
VISION = ["Qwen2VL", "Llava", "Gemma3"]


def text_model(family: str, **more):
    config = getattr(transformers, f"{family}Config", None)
    if config is None:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    kind = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}{kind}")(config(**{**SIZE, **TEXT[family], **more}))
    return filled(model)


def filled(model):
    for parameter in model.parameters():
        if not parameter.any():  # zeros, of a bias say, would hide that it is ignored
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def vision_model(family: str):
    torch.manual_seed(0)
    if family == "Qwen2VL":
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
        eyes = {
            "depth": 1,
            "embed_dim": 16,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 4,
        }
        ids = {
            "image_token_id": IMAGE,
            "video_token_id": 91,
            "vision_start_token_id": 92,
            "vision_end_token_id": 93,
        }
        config = transformers.Qwen2VLConfig(
            text_config=SIZE | {"rope_parameters": rope}, vision_config=eyes, **ids
        )
    elif family == "Llava":
        text, eyes = transformers.LlamaConfig(**SIZE), transformers.CLIPVisionConfig(**EYES)
        config = transformers.LlavaConfig(
            text_config=text, vision_config=eyes, image_token_index=IMAGE
        )
    else:
        ids = {"image_token_index": IMAGE, "boi_token_index": 92, "eoi_token_index": 93}
        config = transformers.Gemma3Config(
            text_config=SIZE | {"head_dim": 8}, vision_config=EYES, mm_tokens_per_image=4, **ids
        )
    return filled(getattr(transformers, f"{family}ForConditionalGeneration")(config))


def text_batch(padding="right") -> dict:
    """Two pairs: prompt of three tokens, responses of different lengths, padded."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 80, (4, T), generator=generator)
    lengths = torch.tensor([T, T - 3, T - 5, T - 1])
    mask = (torch.arange(T) < lengths[:, None]).long()
    labels = torch.where((mask == 1) & (torch.arange(T) >= 3), ids, -100)
    ids = torch.where(mask == 1, ids, 0)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if padding == "left":
        batch = {
            name: torch.stack([row.roll(T - int(n)) for row, n in zip(x, lengths)])
            for name, x in batch.items()
        }
    return batch | {"rewards": torch.tensor([1.0, 0.2, -0.5, 2.0])}


def vision_batch(family: str) -> dict:
    batch = text_batch()
    batch["input_ids"][:, :6] = torch.tensor([92, IMAGE, IMAGE, IMAGE, IMAGE, 93])
    batch["labels"][:, :6] = -100
    image = batch["input_ids"] == IMAGE
    generator = torch.Generator().manual_seed(2)
    if family == "Qwen2VL":
        extra = {
            "pixel_values": torch.randn(4 * 16, 96, generator=generator),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * 4),
        }
        forward = transformers.Qwen2VLForConditionalGeneration.forward
        if "mm_token_type_ids" in inspect.signature(forward).parameters:  # not yet in 5.0
            extra["mm_token_type_ids"] = image.long()
        return batch | extra
    batch["pixel_values"] = torch.randn(4, 3, 8, 8, generator=generator)
    return batch | ({"token_type_ids": image.long()} if family == "Gemma3" else {})


def own_results(model, batch: dict):
    """The model's own logits, aligned labels, and token log-probabilities [S, T] of these by the
    reference.
    """
    logits = model(
        **{name: x for name, x in batch.items() if name not in ("labels", "rewards")}
    ).logits
    labels = torch.cat([batch["labels"][:, 1:], torch.full((4, 1), -100)], 1)
    return logits, labels, reference.token_logps(logits.detach(), labels)


def own_loss(model, batch: dict, ref_logps):
    logits, labels, _ = own_results(model, batch)
    return reference.rpo_loss(logits, labels, batch["rewards"], OBJECTIVE, ref_logps=ref_logps).loss


def gradients(model, loss) -> dict:
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: grad for name, grad in zip(names, grads) if grad is not None}


def assert_same_gradients(ours: dict, theirs: dict, tolerance=1e-5):
    """Relative to the largest gradient of the model: small ones are sums of large numbers."""
    assert ours.keys() == theirs.keys()
    largest = max(float(grad.abs().max()) for grad in theirs.values())
    assert largest > 0
    for name, grad in theirs.items():
        assert worst(ours[name], grad) <= tolerance * largest, name


def assert_equal_to_own_logits(model, batch, tolerance=1e-5):
    """Loss, log-probabilities, entropies and every gradient, of an attached model."""
    ref_logps = torch.tensor([-30.0, -22.0, -15.0, -31.0])
    logits, labels, logps = own_results(model, batch)
    entropies = reference.token_entropy(logits.detach(), labels)
    loss = reference.rpo_loss(logits, labels, batch["rewards"], OBJECTIVE, ref_logps=ref_logps).loss
    out = model(**batch, objective=OBJECTIVE, ref_logps=ref_logps, **NO_AUX)
    tokens = model_token_logps(model, batch, output_entropies=True)
    for ours, theirs in [
        (out.loss, loss),
        (out.logps, logps.sum(1)),
        (tokens.logps, logps),
        (tokens.entropies, entropies),
    ]:
        assert worst(ours, theirs) <= tolerance * float(theirs.detach().abs().max())
    assert torch.equal(out.lengths, (labels != -100).sum(1).int())
    assert_same_gradients(gradients(model, out.loss), gradients(model, loss), tolerance)


# ---- families ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TEXT)
def test_attach_gives_the_loss_and_gradients_of_the_models_own_logits(family):
    assert_equal_to_own_logits(attach(text_model(family)), text_batch())


@pytest.mark.parametrize("family", VISION)
def test_attach_passes_images_to_the_model(family):
    model, batch = attach(vision_model(family)), vision_batch(family)
    assert_equal_to_own_logits(model, batch)
    other = batch | {"pixel_values": batch["pixel_values"] + 1}
    assert (
        worst(model_token_logps(model, batch).logps, model_token_logps(model, other).logps) > 1e-3
    )


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_attach_takes_left_padding(family):
    model, batch = attach(text_model(family)), text_batch("left")
    assert_equal_to_own_logits(model, batch)
    if family == "Llama":  # positions are relative
        a, b = (
            model_token_logps(model, text_batch(side)).logps.sum(1) for side in ("left", "right")
        )
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_attach_takes_packed_sequences():
    model, batch = attach(text_model("Llama")), text_batch()
    present = batch["attention_mask"].bool()
    lengths = present.sum(1)
    packed = {name: batch[name][present][None] for name in ("input_ids", "labels")}
    packed["position_ids"] = torch.cat([torch.arange(n) for n in lengths.tolist()])[None]
    packed["cu_seqlens"] = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    packed["labels"][0, 0] = packed["labels"][0, T] = (
        7  # a sequence's first token follows nothing, whatever its label
    )
    ref_logps = torch.randn(4)
    rows = model(**batch, objective=OBJECTIVE, ref_logps=ref_logps)
    out = model(**packed, rewards=batch["rewards"], objective=OBJECTIVE, ref_logps=ref_logps)
    torch.testing.assert_close(out.logps, rows.logps, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(model, out.loss), gradients(model, rows.loss))
    tokens = model_token_logps(model, packed)
    torch.testing.assert_close(
        tokens.logps, model_token_logps(model, batch).logps[present], rtol=1e-5, atol=1e-5
    )
    per_token = model(
        **packed, rewards=batch["rewards"], objective=OBJECTIVE, ref_logps=tokens.logps.detach()
    )
    assert worst(per_token.rewards, torch.zeros(4)) < 1e-5
    with pytest.raises(ValueError, match="`cu_seqlens` needs `position_ids` that start at 0"):
        model(
            **packed, attention_mask=torch.ones_like(packed["input_ids"]), output_token_logps=True
        )


def test_attach_takes_shifted_labels():
    model, batch = attach(text_model("Llama")), text_batch()
    expected = model_token_logps(model, batch).logps
    shifted = batch.pop("labels").roll(-1, 1).index_fill(1, torch.tensor([T - 1]), -100)
    assert torch.equal(model_token_logps(model, batch | {"shift_labels": shifted}).logps, expected)


# ---- precision, memory, hosts' machinery ---------------------------------------------------------


def test_attach_under_bf16_autocast_is_closer_to_the_truth_than_the_model():
    model, batch = attach(text_model("Llama")), text_batch()
    with torch.no_grad():
        hidden = {}
        with torch.autocast("cpu", torch.bfloat16), capture(model.lm_head, hidden):
            _, labels, rounded = own_results(model, batch)
            ours = model_token_logps(model, batch).logps
    weight = model.lm_head.weight.bfloat16().double()
    truth = reference.linear_token_logps(hidden["head"].bfloat16().double(), weight, labels)
    assert 50 * worst(ours, truth) < worst(rounded, truth) and worst(ours, truth) < 1e-4
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch, objective=OBJECTIVE, ref_logps=torch.zeros(4)).loss
    assert all(grad.dtype == torch.float32 for grad in gradients(model, loss).values())


@contextlib.contextmanager
def capture(head, into):
    handle = head.register_forward_pre_hook(
        lambda _, args: into.setdefault("head", args[0].detach())
    )
    yield
    handle.remove()


def test_attach_takes_a_bf16_model():
    model, batch = attach(text_model("Llama").bfloat16()), text_batch()
    out = model(**batch, objective=OBJECTIVE, ref_logps=torch.zeros(4))
    out.loss.backward()
    assert out.loss.dtype == torch.float32 and model.lm_head.weight.grad.dtype == torch.bfloat16
    assert (
        worst(
            out.logps,
            attach(text_model("Llama"))(
                **batch, objective=OBJECTIVE, ref_logps=torch.zeros(4)
            ).logps,
        )
        < 1
    )


def test_attach_under_gradient_checkpointing():
    model, batch = attach(text_model("Qwen3").train()), text_batch()
    loss = lambda: model(**batch, objective=OBJECTIVE, ref_logps=torch.zeros(4)).loss
    plain = gradients(model, loss())
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = gradients(model, loss())
    assert len(calls) == 2  # forward, and once more in the backward
    for name, grad in plain.items():
        assert torch.equal(grad, again[name]), name


def test_attach_compiles_into_one_graph():
    model, batch = attach(text_model("Llama", num_hidden_layers=1)), text_batch()
    eager = model(**batch, objective=OBJECTIVE, ref_logps=torch.zeros(4)).loss
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(**batch, objective=OBJECTIVE, ref_logps=torch.zeros(4)).loss
    assert worst(loss, eager) < 1e-6
    assert_same_gradients(gradients(model, loss), gradients(model, eager))


def test_attach_fires_the_hooks_of_the_head():
    hooks = pytest.importorskip("accelerate.hooks")
    model, batch, fired = text_model("Llama"), text_batch(), []

    class Hook(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            fired.append(type(module).__name__)
            return args, kwargs

    for module in (model, model.lm_head):
        hooks.add_hook_to_module(module, Hook())
    model.lm_head.register_forward_hook(lambda *_: fired.append("hook"))
    passed = []

    def watch(module, args, out):
        if out.requires_grad:
            out.register_hook(lambda grad: passed.append(1))

    model.lm_head.register_forward_hook(watch)  # as FSDP2 does, to gather weights before a backward
    before, signature = model.forward, inspect.signature(model.forward)
    attach(model)
    assert inspect.signature(model.forward) == signature
    fired.clear()
    assert_equal_to_own_logits(model, batch)
    assert fired == ["LlamaForCausalLM", "Linear", "hook"] * 3
    assert len(passed) == 2  # backward of the own loss, and of ours
    assert detach(model).forward is before


def test_attach_takes_parts_of_sequences_with_shifted_labels():
    model = attach(text_model("Llama"))
    with pytest.raises(ValueError, match="`context_group` needs `shift_labels`"):
        model(**text_batch(), objective=OBJECTIVE, context_group=object())


class Noted(torch.autograd.Function):
    """What ZeRO-3 puts behind a module, to gather its weights before a backward."""

    @staticmethod
    def forward(ctx, x, seen):
        ctx.seen = seen
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.seen.append("gathered")
        return grad, None


def test_attach_runs_functions_behind_the_head_before_its_gradient_arrives():
    model, batch, seen = attach(text_model("Llama")), text_batch(), []
    model.lm_head.register_forward_hook(lambda module, args, out: Noted.apply(out, seen))
    model.lm_head.weight.register_hook(lambda grad: seen.append("gradient"))
    model(**batch, objective=OBJECTIVE, ref_logps=torch.zeros(4)).loss.backward()
    assert seen == ["gathered", "gradient"]
    assert not [
        hook for hook in model.lm_head._forward_hooks.values() if "after_head" in repr(hook)
    ]


def test_attach_adds_the_auxiliary_loss_of_the_model():
    model, batch = attach(text_model("Mixtral")), text_batch()
    inputs = {name: x for name, x in batch.items() if name != "rewards"}
    added = model(**inputs).loss - model(**inputs, output_router_logits=False).loss
    options = {"objective": OBJECTIVE, "ref_logps": torch.zeros(4)}
    out, plain = model(**batch, **options), model(**batch, **options, output_router_logits=False)
    assert added > 0.1
    torch.testing.assert_close(out.loss - plain.loss, added, rtol=1e-4, atol=1e-5)
    assert torch.equal(out.losses, plain.losses)
    torch.testing.assert_close(
        model_token_logps(model, batch).aux_loss, added, rtol=1e-4, atol=1e-5
    )
    for other in ({"reduction": "sum"}, {"normalizer": 2.0}, {"reduction": "none"}):
        with pytest.raises(ValueError, match="auxiliary loss is a mean"):
            model(**batch, **options, **other)


@pytest.fixture
def one_process():
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_attach_under_ddp_with_adapters_off_for_the_reference(one_process):
    model, batch = attach(peft_model(target_modules=["q_proj"])), text_batch()
    randomise(model)
    expected = model_rpo_loss(model, batch, OBJECTIVE)
    grads = gradients(model, expected.loss)
    out = model_rpo_loss(torch.nn.parallel.DistributedDataParallel(model), batch, OBJECTIVE)
    assert torch.equal(out.loss, expected.loss) and (out.rewards != 0).all()
    out.loss.backward()
    assert_same_gradients(
        {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, grads
    )


@pytest.mark.parametrize("own_unit", [False, True])
def test_attach_under_fsdp2_gathers_the_head(own_unit, one_process):
    """An lm_head that is its own unit is a plain tensor inside its own forward alone."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model, batch = text_model("Llama"), text_batch()
    expected = gradients(model, own_loss(model, batch, torch.zeros(4)))
    for module in [*model.model.layers, *([model.lm_head] if own_unit else [])]:
        fully_shard(module)
    fully_shard(model)
    assert isinstance(model.lm_head.weight, DTensor)
    attach(model)
    model(**batch, objective=OBJECTIVE, ref_logps=torch.zeros(4)).loss.backward()
    assert isinstance(model.lm_head.weight.grad, DTensor)
    ours = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    assert_same_gradients(ours, expected)


# ---- PEFT ----------------------------------------------------------------------------------------


def peft_model(family="Llama", **config):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        text_model(family), peft.LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **config)
    )
    return model.eval()


def randomise(model, name="lora_B"):
    for key, parameter in model.named_parameters():
        if name in key:
            torch.nn.init.normal_(parameter, std=0.3)


ADAPTERS = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "modules to save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
}


@pytest.mark.parametrize("where", ADAPTERS)
@pytest.mark.parametrize("first", ["attach", "adapt"])
def test_attach_trains_adapters_whose_absence_is_the_reference(where, first):
    """Also when the adapters come after the attachment."""
    peft = pytest.importorskip("peft")
    batch = text_batch()
    base = text_model("Llama")
    base_logps = own_results(base, batch)[2].sum(1)
    if first == "attach":
        attach(base)
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **ADAPTERS[where])
    ).eval()
    if first == "adapt":
        attach(model)
    start = model_rpo_loss(model, batch, OBJECTIVE)
    assert (start.rewards == 0).all()
    randomise(model, "modules_to_save" if where == "modules to save" else "lora_B")
    assert_equal_to_own_logits(model, batch)
    out = model_rpo_loss(model, batch, OBJECTIVE)
    loss = own_loss(model, batch, base_logps)
    assert (out.rewards != 0).all() and worst(out.loss, loss) < 1e-5 * abs(loss.item())


def test_attach_takes_several_adapters_on_the_head():
    peft = pytest.importorskip("peft")
    model = peft_model(target_modules=["lm_head"], lora_dropout=0.4)
    model.add_adapter(
        "second", peft.LoraConfig(r=5, lora_alpha=2, use_rslora=True, target_modules=["lm_head"])
    )
    model.base_model.set_adapter(["default", "second"])
    randomise(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
    attach(model)
    batch = text_batch()
    assert_equal_to_own_logits(model, batch)
    model.train()  # own logits and ours draw the same dropout
    torch.manual_seed(3)
    ours = model(**batch, objective=OBJECTIVE, ref_logps=torch.zeros(4)).loss
    torch.manual_seed(3)
    theirs = own_loss(model, batch, torch.zeros(4))
    assert worst(ours, theirs) < 1e-5 * abs(theirs.item())
    assert_same_gradients(gradients(model, ours), gradients(model, theirs))
    assert worst(ours, own_loss(model.eval(), batch, torch.zeros(4))) > 1e-3


@pytest.mark.parametrize("tuner", ["PromptTuning", "PrefixTuning", "IA3"])
def test_attach_takes_tuners_of_other_layers(tuner):
    peft = pytest.importorskip("peft")
    options = {} if tuner == "IA3" else {"num_virtual_tokens": 3}
    model = peft.get_peft_model(
        text_model("Llama"), getattr(peft, f"{tuner}Config")(task_type="CAUSAL_LM", **options)
    )
    attach(model.eval())
    batch = text_batch()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[
        :, -T:
    ]  # after soft prompts
    labels = batch["labels"].roll(-1, 1).index_fill(1, torch.tensor([T - 1]), -100)
    out = model(**batch, objective=OBJECTIVE, ref_logps=torch.zeros(4))
    logps = reference.token_logps(logits, labels).sum(1)
    assert worst(out.logps, logps) < 1e-4
    assert gradients(model, out.loss)
    with model.disable_adapter():
        off = model_token_logps(model, batch).logps.detach()
    ref = attach(text_model("Qwen3"))
    for given, ref_logps in ((None, off), (ref, model_token_logps(ref, batch).logps.detach())):
        out = model_rpo_loss(model, batch, OBJECTIVE, reference=given)
        expected = OBJECTIVE.beta * (logps - ref_logps.sum(1))
        assert worst(out.rewards, expected) < 1e-4
    shifted = {name: x for name, x in batch.items() if name != "labels"} | {"shift_labels": labels}
    if tuner != "PromptTuning":
        assert torch.equal(model_rpo_loss(model, shifted, OBJECTIVE, reference=ref).loss, out.loss)
        return
    with pytest.raises(ValueError, match=r"`shift_labels` must be \[4, 15\], .* got \[4, 12\]"):
        model_rpo_loss(model, shifted, OBJECTIVE)


# merging it would be another matter
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("autocast", [False, True])
def test_attach_takes_fp32_adapters_on_a_16_bit_head(autocast):
    """As PEFT leaves them: B A is not rounded to the model's dtype before it is used."""
    peft = pytest.importorskip("peft")
    # soft cap, and a tied head
    base = text_model("Gemma2") if autocast else text_model("Gemma2").bfloat16()
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["lm_head"])
    model, batch = attach(peft.get_peft_model(base, config).eval()), text_batch()
    randomise(model)
    lora = [p for name, p in model.named_parameters() if "lora" in name]
    assert all(p.dtype == torch.float32 for p in lora)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model_rpo_loss(model, batch, OBJECTIVE)
        own = own_results(model, batch)[2].sum(1)
    assert (out.rewards != 0).all() and worst(out.logps, own) < 0.02 * float(own.abs().max())
    assert all(
        grad.dtype == torch.float32 and grad.any() for grad in torch.autograd.grad(out.loss, lora)
    )


def test_attach_takes_a_merged_adapter():
    model, batch = attach(peft_model(target_modules=["q_proj", "lm_head"])), text_batch()
    randomise(model)
    before = model_token_logps(model, batch).logps
    model.merge_adapter()
    torch.testing.assert_close(model_token_logps(model, batch).logps, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "plain LoRA is supported on the head, but adapter 'default' has Dora"),
        (
            {"lora_bias": True},
            "plain LoRA is supported on the head, but adapter 'default' has lora_bias",
        ),
    ],
)
def test_attach_refuses_variants_of_lora_on_the_head(config, message):
    model = peft_model("Phi", target_modules=["lm_head"], **config)
    with pytest.raises(TypeError, match=message):
        attach(model)
    with pytest.raises(ValueError, match="not attached"):
        detach(model)


def test_attach_refuses_other_tuners_on_the_head():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(text_model("Llama"), peft.LoHaConfig(target_modules=["lm_head"]))
    with pytest.raises(TypeError, match=r"head may be only LoRA's Linear, got peft.tuners.loha"):
        attach(model)


# ---- what does not change, and what is refused ---------------------------------------------------


def test_attach_leaves_other_calls_of_the_model_unchanged():
    model, batch = text_model("Llama"), text_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    before, attributes, signature = (
        model(**inputs),
        set(vars(model)),
        inspect.signature(model.forward),
    )
    prompt = {"input_ids": batch["input_ids"][:1, :4], "max_new_tokens": 5, "do_sample": False}
    text = model.generate(**prompt)
    attach(model.train())
    assert model.training and inspect.signature(model.forward) == signature
    model.eval()
    after = model(**inputs)
    assert torch.equal(before.logits, after.logits) and torch.equal(before.loss, after.loss)
    assert torch.equal(model.generate(**prompt), text)
    assert detach(model) is model
    assert (
        set(vars(model)) == attributes
        and "forward" not in vars(model)
        and "forward" not in vars(model.lm_head)
    )
    with pytest.raises(ValueError, match="LlamaForCausalLM is not attached"):
        detach(model)


def test_attach_survives_a_deep_copy():
    model, batch = attach(text_model("Llama")), text_batch()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    assert_equal_to_own_logits(twin, batch)
    assert worst(model_token_logps(twin, batch).logps, model_token_logps(model, batch).logps) > 0.1
    out = model_rpo_loss(model, batch, OBJECTIVE, reference=twin)
    expected = own_loss(model, batch, own_results(twin, batch)[2].sum(1))
    assert worst(out.loss, expected) < 1e-5 * expected.item()


def as_accelerate_wraps(model):
    """What `Accelerator(mixed_precision="bf16").prepare` makes of a forward."""
    operations = pytest.importorskip("accelerate.utils.operations")
    under_autocast = torch.autocast("cpu", torch.bfloat16)(model.forward.__func__)
    model.forward = MethodType(operations.convert_outputs_to_fp32(under_autocast), model)
    return model.forward


def test_attach_goes_on_top_of_what_has_wrapped_the_forward_since():
    model, batch = attach(text_model("Gemma2")), text_batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model_token_logps(model, batch).logps
    wrapped = as_accelerate_wraps(model)
    with pytest.raises(ValueError, match="is not attached; something has wrapped its forward"):
        detach(model)
    for _ in range(2):  # the second replaces the first
        attach(model)
        torch.testing.assert_close(model_token_logps(model, batch).logps, expected)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(model_token_logps(twin, batch).logps, expected)
    assert detach(model).forward == wrapped
    torch.testing.assert_close(model_token_logps(model, batch).logps, expected)


@pytest.mark.xdist_group("trl")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["plain", "bf16", "PEFT"])
def test_attach_serves_one_trainer_after_another(kind, tmp_path):
    """On one model, which is attached before the first and after the last."""
    pytest.importorskip("trl")
    from datasets import Dataset

    from rpo_kernels.adapters.trl import RPOConfig, RPOTrainer

    from .test_trl_trainer import LORA, options
    from .tiny_models import llama, pairs, tokenizer

    def new_model():
        if kind != "PEFT":
            return llama()
        return pytest.importorskip("peft").get_peft_model(llama(), LORA)

    def train(model):
        args = RPOConfig(**options(tmp_path, max_steps=1, bf16=kind == "bf16"))
        data = {"train_dataset": Dataset.from_list(pairs(4)), "processing_class": tokenizer()}
        trainer = RPOTrainer(model, llama(1), args, **data)
        return trainer.train().training_loss

    model, losses = attach(new_model()), []
    for _ in range(2):
        fresh = new_model()
        fresh.load_state_dict(model.state_dict())
        losses.append(train(model))
        assert losses[-1] == train(fresh)
    assert losses[0] != losses[1]
    if kind == "plain":
        with pytest.raises(ValueError, match="LlamaForCausalLM must run its own head"):
            attach(copy.deepcopy(model))
    ids = torch.arange(3, 27).view(2, 12)
    before = model_token_logps(model, {"input_ids": ids, "labels": ids}).logps
    after = model_token_logps(attach(model), {"input_ids": ids, "labels": ids}).logps
    assert torch.equal(after, before) and before.any()


def test_attach_takes_references_of_every_kind():
    model, twin, batch = attach(text_model("Llama")), attach(text_model("Qwen3")), text_batch()
    given = model_rpo_loss(model, batch | {"ref_logps": torch.zeros(4)}, OBJECTIVE)
    assert torch.equal(
        given.loss, model(**batch, objective=OBJECTIVE, ref_logps=torch.zeros(4)).loss
    )
    free = model_rpo_loss(model, batch | {"rewards": None}, RPOObjective.simpo())
    assert free.loss.requires_grad
    several = model_rpo_loss(
        model, batch, RPOObjective(reference="geometric"), reference=[model, twin], temperature=2.0
    )
    one = model_rpo_loss(model, batch, RPOObjective(beta=0.05), reference=twin, temperature=2.0)
    torch.testing.assert_close(several.rewards, one.rewards, rtol=1e-4, atol=1e-5)
    with pytest.raises(
        ValueError,
        match=r"`reference` must be an attached.*put `ref_logps` into the batch, or train a PEFT",
    ):
        model_rpo_loss(model, batch, OBJECTIVE)


def test_model_rpo_loss_shows_on_logits_the_policy_only():
    model, twin, seen = attach(text_model("Llama")), attach(text_model("Llama")), []
    batch = text_batch()
    on_logits = lambda logits, labels, transform: seen.append(len(logits))
    model_rpo_loss(model, batch, OBJECTIVE, reference=twin, on_logits=on_logits)
    assert sum(seen) == (batch["labels"] != -100).sum()


@pytest.mark.parametrize("count", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("objective", "fits", "expected"),
    [
        (OBJECTIVE, [1], "one model for an objective with reference='single'"),
        (RPOObjective(reference="none"), [0], "None for an objective with reference='none'"),
        (
            RPOObjective(reference="geometric"),
            [1, 2, 3],
            "at least one model for an objective with reference='geometric'",
        ),
    ],
)
def test_attach_needs_as_many_references_as_the_objective_has(count, objective, fits, expected):
    calls, seen = [], []

    def model(**inputs):
        calls.append(inputs.get("objective"))
        if "objective" not in inputs:
            return TokenLogps(torch.full((4, T), float(len(calls))))
        seen.append(inputs.get("ref_logps"))
        return preference_loss(torch.zeros(4), torch.zeros(4), RPOObjective(reference="none"))

    run = lambda: model_rpo_loss(model, text_batch(), objective, reference=[model] * count)
    if count not in fits:
        with pytest.raises(ValueError, match=f"`reference` must be {expected}, got {count}"):
            run()
        assert not calls, "something ran"
        return
    run()
    (ref_logps,) = seen
    assert len(calls) == count + 1
    if objective.reference == "geometric":
        assert ref_logps[:, 0, 0].tolist() == [1.0, 2.0, 3.0][:count]
    else:
        assert ref_logps is None if count == 0 else ref_logps.shape == (4, T)


def test_attach_notices_that_the_vocabulary_was_resized():
    model, batch = attach(text_model("Llama")), text_batch()
    model.resize_token_embeddings(V + 8, mean_resizing=False)
    with pytest.raises(ValueError, match=rf"must keep its {V} rows, got {V + 8}; call attach"):
        model_token_logps(model, batch)
    batch["input_ids"][:, 4] = batch["labels"][:, 4] = V + 7
    assert_equal_to_own_logits(attach(model), batch)


class Odd(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def with_head(change):
    model = text_model("Llama")
    change(model)
    return model


def odd_head(model):
    model.lm_head = Odd(32, V)


def integer_head(model):
    model.lm_head.weight = torch.nn.Parameter(
        torch.zeros(V, 32, dtype=torch.int8), requires_grad=False
    )
    model.lm_head.forward = lambda x: x @ torch.zeros(32, V)


def masked_logits(model):
    forward = model.forward

    def masking(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits[..., 5] = -torch.inf
        return out

    model.forward = masking


def squared_logits(model):
    forward = model.forward

    def squaring(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits**2
        return out

    model.forward = squaring


def hooked_head(model):
    model.lm_head.register_forward_hook(
        lambda module, args, out: out * torch.linspace(1, 2, out.shape[-1]).to(out)
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            odd_head,
            TypeError,
            "the head must be torch.nn.Linear, got tests.adapters.test_transformers.Odd",
        ),
        (
            integer_head,
            TypeError,
            "must be a plain floating-point tensor, got Parameter, torch.int8",
        ),
        (masked_logits, ValueError, "must only scale and cap .* got -inf"),
        (squared_logits, ValueError, "must only scale and cap the logits of its head; of"),
        (hooked_head, ValueError, "must only scale and cap the logits of its head"),
    ],
)
def test_attach_refuses_heads_that_the_kernels_do_not_compute(change, error, message):
    model = with_head(change)
    before = dict(vars(model))
    with pytest.raises(error, match=message):
        attach(model)
    assert vars(model).keys() == before.keys() and vars(model).get("forward") is before.get(
        "forward"
    )


def test_attach_names_log_probs_that_are_not_the_models_own(monkeypatch):
    """As if the adapter did not know that this head has a bias."""
    from rpo_kernels.adapters.transformers import forward

    inner = forward.head_weights
    monkeypatch.setattr(forward, "head_weights", lambda *args: inner(*args) | {"bias": None})
    with pytest.raises(
        ValueError, match=r"expected the token log-probability -\d+\.\d+ .* got -\d+\.\d+"
    ):
        attach(text_model("Phi"))


BERT_SIZE = {name: x for name, x in SIZE.items() if name != "num_key_value_heads"}
# of XLNet
BERT_SIZE |= {"d_model": SIZE["hidden_size"], "n_head": SIZE["num_attention_heads"]}
BERT_SIZE["d_head"] = BERT_SIZE["d_model"] // BERT_SIZE["n_head"]


@pytest.mark.parametrize("family", ["Bert", "Roberta", "ModernBert", "Electra"])
@pytest.mark.parametrize("wrap", [False, True])
def test_attach_refuses_masked_language_models_and_says_what_to_load(family, wrap):
    config = getattr(transformers, f"{family}Config")(**BERT_SIZE | {"cls_token_id": 1})
    model = getattr(transformers, f"{family}ForMaskedLM")(config)
    if wrap:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    with pytest.raises(
        TypeError, match=f"can generate, got {family}ForMaskedLM, .*AutoModelForCausalLM"
    ):
        attach(model)


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("BertLMHeadModel", "is_decoder"),
        ("RobertaForCausalLM", "is_decoder"),
        ("ElectraForCausalLM", "is_decoder"),
        ("XLMWithLMHeadModel", "causal"),
        ("FlaubertWithLMHeadModel", "causal"),
        ("XLNetLMHeadModel", None),
    ],
)
def test_attach_refuses_decoders_whose_tokens_see_those_that_follow(name, cure):
    model = getattr(transformers, name)
    config = model.config_class(**BERT_SIZE)
    with pytest.raises(
        ValueError, match=rf"attach: .* {name} whose .*config.is_decoder = True .*config.causal"
    ):
        attach(model(config))
    if cure is not None:
        setattr(config, cure, True)
        assert_attached_equals_own_logits(attach(filled(model(config))))


def assert_attached_equals_own_logits(model):
    batch = text_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    own = model(**inputs).logits[:, :-1].log_softmax(-1)
    own = own.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    scored = batch["labels"][:, 1:] != -100
    ours = model_token_logps(model, batch).logps[:, :-1]
    torch.testing.assert_close(ours[scored], own[scored], atol=1e-4, rtol=1e-4)


def test_attach_refuses_what_is_no_model():
    with pytest.raises(
        TypeError, match="expected a model of transformers, or a PEFT model of one, got Linear"
    ):
        attach(torch.nn.Linear(2, 2))
    t5 = transformers.T5Config(vocab_size=V, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(
        TypeError, match="got T5ForConditionalGeneration; encoder-decoder models are not supported"
    ):
        attach(transformers.T5ForConditionalGeneration(t5))
    with pytest.raises(TypeError, match=r"got LlamaModel; load .* AutoModelForCausalLM"):
        attach(text_model("Llama").model)
    with pytest.raises(ValueError, match="must be on a device, got the meta device; load them"):
        attach(text_model("Llama").to("meta"))


def test_model_rpo_loss_refuses_models_that_are_not_attached():
    """They would drop our keywords, and return the loss of their own."""
    model, batch = text_model("Llama"), text_batch()
    refused = lambda name: pytest.raises(ValueError, match=f"`{name}` must be an attached model")
    with refused("model"):
        model_rpo_loss(model, batch | {"ref_logps": torch.zeros(4)}, OBJECTIVE)
    with refused("model"):
        model_token_logps(model, batch)
    with refused("reference"):
        model_rpo_loss(attach(text_model("Llama")), batch, OBJECTIVE, reference=model)


def unpickled(model):
    return pickle.loads(pickle.dumps(model))


def unwrapped(model):
    from accelerate.utils import extract_model_from_parallel

    model._original_forward = model.forward
    as_accelerate_wraps(model)
    return extract_model_from_parallel(model, keep_fp32_wrapper=False)


def patched(model):
    model.forward = MethodType(type(model).forward, model)
    return model


@pytest.mark.parametrize("replace", [unpickled, unwrapped, patched])
def test_model_rpo_loss_refuses_models_whose_forward_was_replaced(replace):
    """They would return cross-entropy as the loss."""
    model, batch = attach(text_model("Llama")), text_batch()
    expected = model_token_logps(model, batch).logps
    lost = replace(model)
    given = batch | {"ref_logps": torch.zeros(4)}
    refused = lambda name, result: pytest.raises(
        ValueError, match=f"`{name}` must return {result}, got CausalLM.* call attach.model. again"
    )
    with refused("model", "RPOOutput"):
        model_rpo_loss(lost, given, OBJECTIVE)
    with refused("model", "TokenLogps"):
        model_token_logps(lost, batch)
    with refused("reference", "TokenLogps"):
        model_rpo_loss(attach(text_model("Llama")), batch, OBJECTIVE, reference=lost)
    assert torch.equal(model_token_logps(attach(lost), batch).logps, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": None}, "`ref_logps` belongs to a call with `objective`"),
        ({"rewards": None}, "`rewards`"),
        ({"rewards": torch.zeros(3)}, "`rewards`"),
        ({"group_size": 1}, "`group_size`"),
        ({"group_size": 3}, "`group_size`"),
        (
            {
                "cu_groups": torch.tensor([0, 3, 4], dtype=torch.int32),
                "objective": RPOObjective.robust_dpo(),
            },
            "group",
        ),
        ({"labels": None}, "expected `labels` .* or `shift_labels`, by keyword; got neither"),
        (
            {"shift_labels": torch.zeros(4, T).long()},
            "expected `labels` .unshifted, like input_ids. or `shift_labels`, .*; got both",
        ),
        ({"labels": torch.zeros(4, T + 1).long()}, "`labels` must be"),
        ({"logit_scale": 2.0}, "`logit_scale` must be left out; it is read from the model"),
        (
            {"ref_hidden": torch.zeros(2)},
            "`ref_hidden` must be left out; pass the reference as `ref_logps`",
        ),
        ({"output_token_logps": True}, "ask for two results"),
        (
            {"output_entropies": True},
            "`output_entropies` belongs to a call with `output_token_logps=True`",
        ),
        ({"num_items_in_batch": 12}, "`num_items_in_batch` counts tokens"),
        (
            {"cu_seqlens": torch.tensor([0, 4], dtype=torch.int32)},
            "`cu_seqlens` needs `position_ids`",
        ),
        ({"logits_to_keep": 3}, "`labels` must be"),
        (
            {"group_sizes": 4},
            "`group_sizes` is neither an argument of this model nor one of ours; did you mean "
            "`group_size`",
        ),
        ({"labels": None, "shifted_labels": torch.zeros(4, T).long()}, "expected `labels`"),
        (
            {"cu_group": torch.tensor([0, 4], dtype=torch.int32)},
            "`cu_group` is neither .* did you mean `cu_groups`",
        ),
        ({"ref_logp": torch.zeros(4), "ref_logps": None}, "did you mean `ref_logps`"),
        (
            {"prompt_ids": torch.zeros(4, 2)},
            "`prompt_ids` is neither an argument of this model nor one of ours; leave it out",
        ),
    ],
)
def test_attach_refuses_calls_that_do_not_fit(change, message):
    model = attach(text_model("Llama"))
    call = text_batch() | {"objective": OBJECTIVE, "ref_logps": torch.zeros(4)} | change
    with pytest.raises(ValueError, match=message):
        model(**call)
    assert "forward" not in vars(model.lm_head)


def test_attach_knows_the_keywords_of_a_model_and_of_what_is_inside():
    model, batch = attach(text_model("Llama")), text_batch()
    plain = model(**batch, objective=OBJECTIVE, ref_logps=torch.zeros(4))
    known = {
        "use_cache": False,
        "output_hidden_states": True,
        "return_dict": True,
        "max_length_q": T,
        "group_sizes": None,
    }
    assert torch.equal(
        model(**batch, **known, objective=OBJECTIVE, ref_logps=torch.zeros(4)).loss, plain.loss
    )
    with pytest.raises(
        ValueError, match=r"`output_entropy` is neither .* did you mean `output_entropies`"
    ):
        model_token_logps(model, batch, output_entropy=True)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    # a call that is not ours
    assert torch.equal(model(**inputs, group_sizes=4).logits, model(**inputs).logits)


def test_attach_knows_keywords_that_a_decorator_renames(monkeypatch):
    from transformers.utils.deprecation import deprecate_kwarg

    renaming = deprecate_kwarg("mask", "99.0", new_name="attention_mask")
    host = transformers.LlamaForCausalLM
    monkeypatch.setattr(host, "forward", renaming(host.forward))
    model, batch = attach(text_model("Llama")), text_batch("left")
    plain = model_token_logps(model, batch).logps
    batch["mask"] = batch.pop("attention_mask")
    with pytest.warns(FutureWarning, match="`mask` is deprecated"):
        assert torch.equal(model_token_logps(model, batch).logps, plain)
