"""accelerate_trl: TRL's own trainers take the same steps, faster and undone when asked."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch

import rpo_kernels

from ..helpers import worst
from .tiny_models import llama, pairs, text, tokenizer

pytestmark = [pytest.mark.xdist_group("trl"), pytest.mark.filterwarnings("ignore")]

trl = pytest.importorskip("trl")
import trl.trainer.utils as host  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402

from rpo_kernels.adapters.trl import accelerate_trl  # noqa: E402
from rpo_kernels.adapters.trl import patch as adapter  # noqa: E402

from .test_trl_trainer import options  # noqa: E402

PAIRS = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in pairs(8)]
LABELED = [
    {"prompt": text(i, 3) + " ", "completion": text(50 + i, 4), "label": i % 2 == 0}
    for i in range(8)
]
PROMPTS = [{"prompt": text(i, 4)} for i in range(8)]
TEXTS = [{"prompt": text(i, 3) + " ", "completion": text(70 + i, 5)} for i in range(8)]


def preference(cls, config, rows, **more):
    return lambda args: cls(
        llama(),
        llama(seed=1),
        config(**args, **more),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )


def online(cls, config, **more):
    sampling = {
        "num_generations": 2,
        "max_completion_length": 6,
        "beta": 0.1,
        "temperature": 0.9,
        "seed": 1,
        **more,
    }

    def build(args):
        model = llama()
        model.config._name_or_path = args["output_dir"]  # the reference is loaded from there
        llama(seed=1).save_pretrained(args["output_dir"])
        reward = lambda completions, **_: [float(len(set(c))) for c in completions]
        return cls(
            model,
            reward_funcs=reward,
            args=config(**args, **sampling),
            train_dataset=Dataset.from_list(PROMPTS),
            processing_class=tokenizer(),
        )

    return build


TRAINERS = {
    "DPO": preference(trl.DPOTrainer, trl.DPOConfig, PAIRS),
    "DPO, weighted (log sum p^2)": preference(
        trl.DPOTrainer, trl.DPOConfig, PAIRS, use_weighting=True
    ),
    "DPO, a weighted list of losses": preference(
        trl.DPOTrainer,
        trl.DPOConfig,
        PAIRS,
        loss_type=["sigmoid", "bco_pair", "sft"],
        loss_weights=[0.8, 0.2, 1.0],
    ),
    "KTO": preference(trl.KTOTrainer, trl.KTOConfig, LABELED),
    "SFT": lambda args: trl.SFTTrainer(
        llama(),
        trl.SFTConfig(**args),
        train_dataset=Dataset.from_list(TEXTS),
        processing_class=tokenizer(),
    ),
    "RLOO": online(trl.RLOOTrainer, trl.RLOOConfig),
    "GRPO, entropy bonus, fp32 head": online(
        trl.GRPOTrainer, trl.GRPOConfig, entropy_coef=0.01, cast_lm_head_to_fp32=True
    ),
}


def steps(build, args) -> list[dict]:
    trainer = build(args)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", TRAINERS)
def test_accelerate_trl_keeps_losses_and_metrics_of_six_steps(name, tmp_path, monkeypatch):
    args = options(tmp_path)
    expected = steps(TRAINERS[name], args)
    calls = []
    ours = adapter.LogProbs.apply
    monkeypatch.setattr(
        adapter.LogProbs, "apply", staticmethod(lambda *a: calls.append(1) or ours(*a))
    )
    with accelerate_trl():
        logged = steps(TRAINERS[name], args)
    assert len(calls) >= 6, "our function was not used"
    assert len(logged) == len(expected) == 6
    for step, (a, b) in enumerate(zip(logged, expected)):
        assert a.keys() == b.keys()
        for metric in b:
            if "time" not in metric:
                assert a[metric] == pytest.approx(b[metric], rel=1e-5, abs=1e-5), (step, metric)


@pytest.fixture
def rows():
    hidden, weight, bias = torch.randn(37, 16), torch.randn(53, 16), torch.randn(53)
    return [x.requires_grad_() for x in (hidden, weight, bias)], torch.randint(53, (37,))


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_accelerate_trl_gives_every_output_and_gradient_of_TRL(rows, softcap, monkeypatch):
    chunks = functools.partial(
        rpo_kernels.linear_token_logps_and_entropy, workspace_bytes=10 * 4 * 53
    )
    monkeypatch.setattr(adapter, "linear_token_logps_and_entropy", chunks)  # of 10 rows
    inputs, targets = rows
    theirs, ours = [], []
    for results, context in ((theirs, torch.no_grad()), (ours, accelerate_trl())):
        function = host._ChunkedLogProbFunction
        with torch.enable_grad():
            out = function.apply(*inputs, targets, 0.7, 20, softcap, 1.3)
            grads = torch.autograd.grad(out[0].sum() + 0.3 * out[1].sum(), inputs)
        results += [*out, *grads]
        if results is ours:
            context.undo()
    for a, b in zip(ours, theirs):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert worst(a, b) <= 1e-5


def test_accelerate_trl_gives_None_for_outputs_that_are_not_requested(rows):
    (hidden, weight, bias), targets = rows
    with accelerate_trl():
        apply = host._ChunkedLogProbFunction.apply
        logps, *others = apply(hidden, weight, None, targets, 1.0, 20, None, 1.0, ("log_probs",))
        assert others == [None] * 4 and logps.shape == (37,)
        nothing = apply(hidden[:0], weight, bias, targets[:0], 1.0, 20)
        assert [x.shape for x in nothing] == [(0,)] * 5
        nothing[0].sum().backward()  # an all-masked microbatch is a differentiable zero
        assert weight.grad is not None and not weight.grad.any()
        frozen = apply(
            hidden[:0], weight.detach(), None, targets[:0], 1.0, 20, None, 1.0, ("log_probs",)
        )[0]  # under LoRA
        hidden.grad = None
        frozen.sum().backward()
        assert hidden.grad.shape == hidden.shape and not hidden.grad.any()


def test_accelerate_trl_takes_a_micro_batch_of_LoRA_with_nothing_scored():
    base = llama()
    host.add_fused_lm_head(base)
    model = get_peft_model(
        base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    ids = torch.randint(4, 60, (2, 7))
    results = []
    for labels in (torch.full_like(ids, -100), ids):
        with accelerate_trl():
            out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        model.zero_grad()
        out.log_probs.sum().backward()
        results.append([p.grad.abs().max().item() for p in model.parameters() if p.requires_grad])
    assert not any(results[0]) and all(results[1])


def test_accelerate_trl_leaves_other_calls_to_TRL_and_says_so_once(rows, monkeypatch):
    inputs, targets = rows
    said = []
    monkeypatch.setattr(adapter.logger, "warning_once", said.append)
    expected = host._ChunkedLogProbFunction.apply(*inputs, targets, 1.0, 20, None, -0.5)
    with accelerate_trl():
        out = host._ChunkedLogProbFunction.apply(*inputs, targets, 1.0, 20, None, -0.5)
    assert all(torch.equal(a, b) for a, b in zip(out, expected))
    assert said and "not positive" in said[0]


def test_accelerate_trl_undo_restores_TRL():
    theirs = host._ChunkedLogProbFunction, host._use_triton
    handle = accelerate_trl()
    with accelerate_trl():
        assert host._ChunkedLogProbFunction is adapter.LogProbs
    assert host._ChunkedLogProbFunction is adapter.LogProbs  # the first still holds
    handle.undo()
    handle.undo()
    assert (host._ChunkedLogProbFunction, host._use_triton) == theirs


THEIRS = host._ChunkedLogProbFunction


def later_release(monkeypatch, change):
    """A TRL whose function is ``change(ctx, *arguments)``, with the arguments that it declares."""
    later = type("Later", (torch.autograd.Function,), {"forward": staticmethod(change)})
    later.backward = THEIRS.backward
    monkeypatch.setattr(host, "_ChunkedLogProbFunction", later)
    monkeypatch.setattr(trl, "__version__", "1.99.0")  # decides nothing
    return later


def lacks(ctx, hidden, weight, targets):
    return hidden


def needs(ctx, hidden, weight, bias, targets, temperature, chunk_size, kept, *options):
    return hidden


def divides_twice(
    ctx,
    hidden,
    weight,
    bias,
    targets,
    temperature,
    chunk_size,
    final_logit_softcapping=None,
    logit_scale=1.0,
    outputs=adapter.OUTPUTS,
):
    return THEIRS.forward(
        ctx,
        hidden,
        weight,
        bias,
        targets,
        temperature**2,
        chunk_size,
        final_logit_softcapping,
        logit_scale,
        outputs,
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (lacks, r"takes \(ctx, hidden, weight, targets\); it has no `bias`, `temperature`"),
        (needs, r"it has no `final_logit_softcapping`.*it needs `kept`"),
        (divides_twice, r"_ChunkedLogProbFunction returns another `log_probs` \(\[.*not \["),
    ],
)
def test_accelerate_trl_refuses_a_function_that_is_another_and_says_how(
    change, message, monkeypatch
):
    later = later_release(monkeypatch, change)
    with pytest.raises(RuntimeError, match=rf"trl \(1\.99\.0\) .*tested with 1\.16.*{message}"):
        accelerate_trl()
    assert host._ChunkedLogProbFunction is later


def test_accelerate_trl_refuses_a_TRL_whose_models_call_another_function(monkeypatch):
    later_release(monkeypatch, THEIRS.forward)
    monkeypatch.setattr(host, "add_fused_lm_head", lambda model: None)
    with pytest.raises(RuntimeError, match="add_fused_lm_head does not call _Chunked"):
        accelerate_trl()


def test_accelerate_trl_takes_a_later_TRL_with_an_argument_more(rows, monkeypatch):
    """Calls that use it are TRL's own."""

    def more(
        ctx,
        hidden,
        weight,
        bias,
        targets,
        temperature,
        chunk_size,
        final_logit_softcapping=None,
        logit_scale=1.0,
        outputs=(*adapter.OUTPUTS, "rank"),
        kept=None,
    ):
        options = temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
        out = THEIRS.forward(ctx, hidden, weight, bias, targets, *options)
        ctx.kept = kept
        return *out, None if kept is None else kept.float()

    later_release(monkeypatch, more)
    monkeypatch.delattr(host, "_use_triton")  # a private name that only saves time
    inputs, targets = rows
    said = []
    monkeypatch.setattr(adapter.logger, "warning_once", said.append)
    with accelerate_trl():
        apply = host._ChunkedLogProbFunction.apply
        ours = apply(*inputs, targets, 1.0, 20, None, 1.0, adapter.OUTPUTS)
        assert ours[-1] is None and len(ours) == 6 and not said
        kept = torch.arange(37)
        theirs = apply(*inputs, targets, 1.0, 20, None, 1.0, adapter.OUTPUTS, kept)
    assert torch.equal(theirs[-1], kept.float()) and "`kept` is given" in said[0]
    assert not hasattr(host, "_use_triton")
    torch.testing.assert_close(ours[:5], theirs[:5])


# ---- DeepSpeed ZeRO-3 ----------------------------------------------------------------------------


@pytest.mark.parametrize("workspace_bytes", [1 << 20, 8 * 4 * 53], ids=["P kept", "P dropped"])
def test_accelerate_trl_gathers_the_head_of_ZeRO_3_again_for_the_backward(
    workspace_bytes, rows, monkeypatch
):
    """A parameter is empty but inside TRL's gathering, as DeepSpeed leaves it."""
    for name in ("linear_token_logps", "linear_token_logps_and_entropy"):
        bounded = functools.partial(getattr(rpo_kernels, name), workspace_bytes=workspace_bytes)
        monkeypatch.setattr(adapter, name, bounded)
    inputs, targets = rows
    head = [torch.nn.Parameter(x.detach().clone()) for x in inputs[1:]]
    shards = {id(p): p.detach().clone() for p in head}
    gathered = []

    @contextlib.contextmanager
    def gather(*parameters):
        sharded = [p for p in parameters if id(p) in shards]
        gathered.extend([len(sharded)] if sharded else [])
        for p in sharded:
            p.data = shards[id(p)].clone()
        yield
        for p in sharded:
            p.data = p.new_empty(0)

    monkeypatch.setattr(host, "maybe_gather_lm_head_ctx", gather)
    for i, p in enumerate(head):
        p.ds_id, p.data = i, p.new_empty(0)

    def run(weight, bias):
        hidden = inputs[0].detach().requires_grad_()
        with gather(weight, bias):
            logps, entropy, *_ = host._ChunkedLogProbFunction.apply(
                hidden, weight, bias, targets, 1.0, 20
            )
        return entropy, *torch.autograd.grad(logps.square().sum(), (hidden, weight, bias))

    expected = run(*inputs[1:])
    said = []
    monkeypatch.setattr(adapter.logger, "warning_once", said.append)
    with accelerate_trl():
        ours = run(*head)
    assert not said, "TRL's own function was used"
    assert gathered == [2, 1, 1]  # around the forward, and each again for the backward
    assert all(p.numel() == 0 for p in head)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)
