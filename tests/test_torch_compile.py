"""The operators are good citizens of PyTorch: torch.library, torch.compile, checkpointing, autocast and autograd's rules.

What is compiled here is the graph around the operators (they are opaque), so small shapes and one engine say it all.
"""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from rpo_kernels import (
    RPOObjective,
    preference_loss,
    rpo_loss,
    sequence_logps,
    shift_labels,
    token_logps,
    token_logps_and_entropy,
)

from .helpers import HAS_GPU

IGNORE = -100
OBJECTIVE = RPOObjective(beta=0.5)
OPS = torch.ops.rpo_kernels


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def ints(*values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def batch(device, S=4, T=3, V=5):
    """logits, labels, rewards, ref_logps; one token and one sequence are not scored."""
    labels = torch.randint(V, (S, T), device=device)
    labels[0, 1] = labels[1] = IGNORE
    logits = torch.randn(S, T, V, device=device, requires_grad=True)
    return logits, labels, torch.randn(S, device=device), torch.randn(S, device=device)


def gradient(loss, x, **options):
    return torch.autograd.grad(loss, x, **options)[0]


# ---- torch.library ----------------------------------------------------------------------------------------------------


def operator_calls(device, backend):
    logits, labels, rewards, ref_logps = batch(device)
    objective, options = OBJECTIVE.spec, (1.0, 1.0, 0.0, IGNORE)
    packed = logits.detach().view(12, 5).requires_grad_(), labels.view(12)
    cu_seqlens, cu_groups = ints(0, 3, 6, 6, 12, device=device), ints(0, 1, 4, device=device)
    logps, lse, entropies = (x.detach() for x in OPS.token_logps(logits, labels, *options, True, False, backend))
    coef, upstream = torch.randn_like(logps), torch.tensor(2.0, device=device)
    group = rewards, ref_logps[None], None
    return {
        "token_logps": (OPS.token_logps, (logits, labels, *options, False, False, backend)),
        "token_logps with entropy": (OPS.token_logps, (logits, labels, 0.7, 1.0, 2.0, IGNORE, True, False, backend)),
        "preference_loss": (
            OPS.preference_loss,
            (logps.sum(1).requires_grad_(), None, *group, None, None, 2, objective, True, backend),
        ),
        "rpo_loss": (OPS.rpo_loss, (logits, labels, None, *group, None, None, 2, objective, True, backend, *options, False)),
        "rpo_loss of packed, ragged": (
            OPS.rpo_loss,
            (*packed, cu_seqlens, *group, cu_groups, upstream, 2, objective, False, backend, *options, False),
        ),
        "vocabulary_backward": (
            OPS.vocabulary_backward,
            (logits.detach(), labels, logps, lse, coef, upstream, None, None, *options, backend),
        ),
        "vocabulary_backward with entropy": (
            OPS.vocabulary_backward,
            (logits.detach(), labels, logps, lse, coef, None, entropies, coef, *options, backend),
        ),
        "vocabulary_backward in place": (
            OPS.vocabulary_backward_,
            (logits.detach(), labels, logps, lse, coef, None, None, None, *options, backend),
        ),
    }


@pytest.mark.parametrize("name", operator_calls("cpu", "torch"))
def test_operators_keep_the_promises_they_registered(name, device, backend):
    """Schema (what is written, what aliases), fake tensors, autograd registration, and tracing with dynamic shapes."""
    operator, arguments = operator_calls(device, backend)[name]
    torch.library.opcheck(operator.default, arguments)


# ---- torch.compile ----------------------------------------------------------------------------------------------------


def public_calls(device):
    """Name to (function of one tensor, that tensor's shape): each public function, each way to lay out its input."""
    _, labels, rewards, ref_logps = batch(device)
    flat, ref_tokens = labels.view(12), torch.randn(12, device=device)
    cu_seqlens, cu_groups = ints(0, 3, 6, 6, 12, device=device), ints(0, 1, 4, device=device)
    several = RPOObjective(reference="harmonic", average=True)
    loss = partial(rpo_loss, rewards=rewards, objective=OBJECTIVE, ref_logps=ref_logps)

    def every_output(out):
        values = out.metrics()
        return out.loss.sum() + sum(x.detach() for name, x in values.items()) + out.rewards.sum() + out.losses.sum()

    return {
        "token_logps": (lambda x: token_logps(x, labels, softcap=2.0), (4, 3, 5)),
        "token_logps_and_entropy": (lambda x: torch.stack(token_logps_and_entropy(x, labels, temperature=0.7)), (4, 3, 5)),
        "rpo_loss": (lambda x: every_output(loss(x, labels)), (4, 3, 5)),
        "rpo_loss, packed and ragged": (
            lambda x: every_output(loss(x, flat, ref_logps=ref_tokens, cu_seqlens=cu_seqlens, cu_groups=cu_groups)),
            (12, 5),
        ),
        "rpo_loss, reduction none": (lambda x: loss(x, labels, reduction="none").loss.square(), (4, 3, 5)),
        "rpo_loss, in place": (lambda x: loss(x * 1.0, labels, normalizer=3, inplace_backward=True).loss, (4, 3, 5)),
        "preference_loss": (
            lambda x: every_output(
                preference_loss(
                    x, rewards, several, ref_logps=torch.stack([ref_logps, -ref_logps]), lengths=ints(1, 2, 0, 3, device=device)
                )
            ),
            (4,),
        ),
        "sequence_logps": (lambda x: sequence_logps(x, labels=labels, average=True), (4, 3)),
        "sequence_logps, packed": (lambda x: sequence_logps(x, cu_seqlens=cu_seqlens), (12,)),
        "shift_labels": (lambda x: token_logps(x, shift_labels(labels.abs() % 5, labels >= 0)), (4, 3, 5)),
        "shift_labels, packed": (
            lambda x: token_logps(x, shift_labels(flat.abs() % 5, flat >= 0, cu_seqlens=cu_seqlens)),
            (12, 5),
        ),
    }


def compiled_equals_eager(name, device, **options):
    function, shape = public_calls(device)[name]
    x = torch.randn(shape, device=device, requires_grad=True)
    eager, compiled = function(x), torch.compile(function, fullgraph=True, **options)(x)
    upstream = torch.randn_like(eager)
    torch.testing.assert_close(compiled, eager, equal_nan=True)
    torch.testing.assert_close(gradient(compiled, x, grad_outputs=upstream), gradient(eager, x, grad_outputs=upstream))


@pytest.mark.parametrize("name", public_calls("cpu"))
def test_a_compiled_call_is_one_graph_and_equals_an_eager_one(name, device):
    compiled_equals_eager(name, device, backend="aot_eager")


@pytest.mark.skipif(
    not HAS_GPU and not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler"
)
@pytest.mark.filterwarnings("ignore")  # inductor is made of pieces that torch deprecates
def test_the_default_compiler_takes_the_operators(device):
    compiled_equals_eager("rpo_loss, in place", device)


@pytest.mark.parametrize("name", ["token_logps", "rpo_loss", "preference_loss"])
def test_another_number_of_tokens_needs_no_other_graph(name, device):
    """Batches of a training run differ in length; a recompilation each would cost more than the kernels save."""

    def call(logits, labels, rewards, ref_logps):
        if name == "token_logps":
            return token_logps(logits, labels).sum()
        if name == "rpo_loss":
            normalizer = 0.5 * len(rewards)
            return rpo_loss(logits, labels, rewards, OBJECTIVE, ref_logps=ref_logps, normalizer=normalizer).loss
        return preference_loss(logits.sum((1, 2)), rewards, OBJECTIVE, ref_logps=ref_logps).loss

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for S, T in ((4, 3), (6, 7), (8, 5)):
            inputs = batch(device, S, T)
            torch.testing.assert_close(gradient(compiled(*inputs), inputs[0]), gradient(call(*inputs), inputs[0]))


@pytest.mark.parametrize("bad", ["labels", "cu_seqlens"])
def test_bad_values_raise_from_a_compiled_call_too(bad):
    """On a CPU: the checks that tracing skips are made when the graph runs."""
    logits, labels, rewards, ref_logps = batch("cpu")
    arguments = {"labels": labels.view(12), "cu_seqlens": ints(0, 3, 6, 9, 12, device="cpu")}
    arguments[bad][-1] = 11
    call = partial(rpo_loss, logits.detach().view(12, 5), rewards=rewards, objective=OBJECTIVE, ref_logps=ref_logps)
    with pytest.raises(ValueError, match=f"^rpo_loss: `{bad}` must"):
        torch.compile(call, fullgraph=True, backend="aot_eager")(**arguments)


# ---- autograd ---------------------------------------------------------------------------------------------------------


def test_checkpointing_gives_the_same_gradients(device, backend):
    logits, labels, rewards, ref_logps = batch(device)
    weight = torch.randn(5, 5, device=device, requires_grad=True)

    def head(x):
        return rpo_loss(x @ weight, labels, rewards, OBJECTIVE, ref_logps=ref_logps, backend=backend).loss

    plain = torch.autograd.grad(head(logits), (logits, weight))
    again = torch.autograd.grad(checkpoint(head, logits, use_reentrant=False), (logits, weight))
    assert all(torch.equal(a, b) for a, b in zip(plain, again))
    assert plain[0].abs().sum() > 0


def differentiable_calls(device, backend="auto", **options):
    """Each operator with a gradient, as a function of the logits that gives one number that is not linear in its output."""
    _, labels, rewards, ref_logps = batch(device)
    shared = {"rewards": rewards, "objective": OBJECTIVE, "ref_logps": ref_logps, "backend": backend}
    return {
        "token_logps": lambda x: token_logps(x, labels, backend=backend, **options).square().sum(),
        "token_logps_and_entropy": lambda x: sum(token_logps_and_entropy(x, labels, backend=backend, **options)).square().sum(),
        "rpo_loss": lambda x: rpo_loss(x, labels, **shared, **options).loss.square(),
        "rpo_loss, reduction none": lambda x: rpo_loss(x, labels, **shared, reduction="none", **options).loss.square().sum(),
    }


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", differentiable_calls("cpu"))
@pytest.mark.parametrize("penalty", [lambda g, loss: g.square().sum(), lambda g, loss: loss + g.square().sum()])
def test_second_derivatives_raise(name, inplace, penalty, device):
    """They are not implemented; a gradient penalty that went missing without a word would train another objective."""
    leaf = batch(device)[0]
    loss = differentiable_calls(device, inplace_backward=inplace)[name](leaf * 1.0)
    dlogits = gradient(loss, leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not implemented"):
        penalty(dlogits, loss).backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("power", [1, 2])
def test_second_derivatives_of_sequence_log_probs_raise(reduction, power, device):
    _, _, rewards, ref_logps = batch(device)
    logps = torch.randn(4, device=device, requires_grad=True)
    loss = preference_loss(logps, rewards, OBJECTIVE, ref_logps=ref_logps, reduction=reduction).loss.pow(power).sum()
    with pytest.raises(NotImplementedError, match="second derivatives are not implemented"):
        gradient(gradient(loss, logps, create_graph=True).square().sum(), logps)


@pytest.mark.parametrize("name", differentiable_calls("cpu"))
def test_a_gradient_in_place_is_the_same_and_lies_over_the_logits(name, device, backend):
    leaf = batch(device)[0]
    torch.manual_seed(0)
    expected = gradient(differentiable_calls(device, backend)[name](leaf * 1.0), leaf)
    torch.manual_seed(0)
    logits, seen = leaf * 1.0, []
    logits.register_hook(lambda g: seen.append(g.data_ptr()))
    loss = differentiable_calls(device, backend, inplace_backward=True)[name](logits)
    torch.testing.assert_close(gradient(loss, leaf), expected, rtol=0, atol=0)
    assert seen == [logits.data_ptr()]
    torch.testing.assert_close(logits.detach(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", differentiable_calls("cpu"))
def test_a_second_backward_over_overwritten_logits_raises(name, device, backend):
    loss = differentiable_calls(device, backend, inplace_backward=True)[name](batch(device)[0] * 1.0)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", differentiable_calls("cpu"))
def test_logits_that_are_needed_after_they_were_overwritten_raise(name, device, backend):
    logits = batch(device)[0] * 1.0
    penalty = logits.square().mean()  # saves the logits, and runs its backward after that of the loss
    loss = differentiable_calls(device, backend, inplace_backward=True)[name](logits)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + penalty).backward()


@pytest.mark.parametrize("layout", ["rows", "packed, ragged"])
def test_a_loss_of_each_group_weights_its_own_gradient(layout, device, backend):
    """Reduction "none" under any upstream w: the gradient is sum_g w_g dL_g."""
    logits, labels, rewards, ref_logps = batch(device, S=6 if layout == "rows" else 5)  # two groups with a loss, one without
    shared = {"rewards": rewards, "objective": OBJECTIVE, "ref_logps": ref_logps, "backend": backend, "reduction": "none"}
    if layout == "rows":
        losses = rpo_loss(logits, labels, **shared).loss
    else:  # groups of 2, 0 and 3 responses
        cu_seqlens, cu_groups = ints(0, 2, 5, 9, 12, 15, device=device), ints(0, 2, 2, 5, device=device)
        shared |= {"cu_seqlens": cu_seqlens, "cu_groups": cu_groups}
        losses = rpo_loss(logits.view(15, 5), labels.view(15), **shared).loss
    weights = torch.randn_like(losses)
    together = gradient(losses, logits, grad_outputs=weights, retain_graph=True)
    alone = [w * gradient(loss, logits, retain_graph=True) for w, loss in zip(weights, losses)]
    torch.testing.assert_close(together, sum(alone))
    assert (losses > 0).sum() == 2


def test_only_logits_get_a_gradient(device, backend):
    """Also below the public functions, which refuse constants that require one."""
    logits, labels, rewards, ref_logps = batch(device)
    constants = [x.clone().requires_grad_() for x in (rewards, ref_logps[None], torch.tensor(2.0, device=device))]
    rewards, ref_logps, normalizer = constants
    group = (rewards, ref_logps, None, None, normalizer, 2, OBJECTIVE.spec, True, backend)
    loss = OPS.rpo_loss(logits, labels, None, *group, 1.0, 1.0, 0.0, IGNORE, False)[0]
    grads = torch.autograd.grad(loss, (logits, *constants), allow_unused=True)
    assert [g is not None for g in grads] == [True, False, False, False]
    logps = logits.detach().sum((1, 2)).requires_grad_()
    grads = torch.autograd.grad(OPS.preference_loss(logps, None, *group)[0], (logps, *constants), allow_unused=True)
    assert [g is not None for g in grads] == [True, False, False, False]


def test_no_graph_is_built_where_no_gradient_is_wanted(device, backend):
    logits, labels, rewards, ref_logps = batch(device)
    call = partial(rpo_loss, labels=labels, rewards=rewards, objective=OBJECTIVE, ref_logps=ref_logps, backend=backend)
    assert not call(logits.detach()).loss.requires_grad
    with torch.no_grad():
        assert not call(logits).loss.requires_grad


# ---- autocast ---------------------------------------------------------------------------------------------------------


def test_autocast_around_a_call_leaves_float32_logits_alone(device, backend):
    logits, *_ = batch(device)
    call = differentiable_calls(device, backend)["rpo_loss"]
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = call(logits)
    assert loss.dtype == torch.float32 and torch.equal(loss, call(logits))
    assert torch.equal(gradient(loss, logits), gradient(call(logits), logits))


def test_a_head_under_autocast_trains_through_its_bfloat16_logits(device, backend):
    _, labels, rewards, ref_logps = batch(device)
    hidden, weight = torch.randn(4, 3, 8, device=device), torch.randn(5, 8, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        logits = F.linear(hidden, weight)
        loss = rpo_loss(logits, labels, rewards, OBJECTIVE, ref_logps=ref_logps, backend=backend).loss
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    dweight = gradient(loss, weight)
    exact = rpo_loss(F.linear(hidden, weight), labels, rewards, OBJECTIVE, ref_logps=ref_logps, backend="torch").loss
    expected = gradient(exact, weight)
    assert dweight.dtype == torch.float32
    assert (dweight - expected).norm() < 0.05 * expected.norm()  # two roundings to bf16, 2^-8 each
