"""The operators are good citizens of PyTorch: torch.library, torch.compile, checkpointing, autocast
and autograd's rules.

What is compiled here is the graph around the operators (they are opaque), so small shapes and one
backend say it all.
"""

from __future__ import annotations

import shutil
from functools import partial
from itertools import pairwise
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from rpo_kernels import (
    RPOObjective,
    distributed,
    linear_rpo_loss,
    linear_token_logps,
    preference_loss,
    rpo_loss,
    sequence_logps,
    shift_labels,
    token_logps,
    token_logps_and_entropy,
)
from rpo_kernels.inputs import Groups, LogitTransform, Sequences
from rpo_kernels.ops.preference import _preference_loss
from rpo_kernels.ops.rpo_loss import _rpo_loss

from ..helpers import HAS_GPU, operator_calls

IGNORE = -100
OBJECTIVE = RPOObjective(beta=0.5)


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


# ---- torch.library -------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="torch 2.9 brings the tag")
def test_operators_that_may_wait_for_the_device_stay_out_of_cuda_graphs():
    """Under mode="reduce-overhead", which captures the graph around them."""
    tagged = {
        name
        for name in dir(torch.ops.rpo_kernels)
        if isinstance(packet := getattr(torch.ops.rpo_kernels, name), torch._ops.OpOverloadPacket)
        and torch.Tag.cudagraph_unsafe in packet.default.tags
    }
    linear = {"token_logps", "settle", "rpo_loss", "rpo_loss_per_group"}
    assert tagged == {f"linear_{name}" for name in linear}


def test_a_linear_call_that_would_wait_in_a_cuda_graph_says_what_it_lacks():
    hidden, weight = torch.randn(4, 3, 8), torch.randn(7, 8)
    labels, bounds = torch.randint(7, (4, 3)), ints(0, 2, 4, device="cpu")
    call = partial(linear_rpo_loss, hidden, weight, labels, None, RPOObjective.dpo())
    call = partial(call, ref_logps=torch.zeros(4))
    with mock.patch.object(distributed, "_capturing", lambda: True):
        call(counts=[3] * 4)
        linear_token_logps(hidden, weight, labels, count=12)
        for waits, lacks in (
            (lambda: linear_token_logps(hidden, weight, labels), "linear_token_logps: `count`"),
            (call, "linear_rpo_loss: `counts`"),
            (partial(call, counts=[3] * 4, cu_groups=bounds), "linear_rpo_loss: `group_size`"),
        ):
            with pytest.raises(RuntimeError, match=f"^{lacks} must be given while a CUDA graph"):
                waits()


@pytest.mark.parametrize(
    ("inplace", "backend"), [(False, "torch"), (True, "torch"), (False, "triton")]
)
def test_operators_pass_opcheck(inplace, backend, device):
    """Schema (what is written, what aliases), fake tensors, autograd registration, and tracing with
    dynamic shapes.
    """
    logits, labels, rewards, ref_logps = batch(device)
    flat, ref_tokens = labels.view(12), torch.randn(12, device=device)
    ragged = {
        "cu_seqlens": ints(0, 3, 6, 6, 12, device=device),
        "cu_groups": ints(0, 1, 4, device=device),
    }
    options = {"inplace_backward": inplace, "backend": backend}
    leaf = lambda x: x.detach().clone().requires_grad_() * 1
    with operator_calls() as seen:
        logps, entropies = token_logps_and_entropy(
            leaf(logits), labels, softcap=2.0, temperature=0.7, **options
        )
        out = rpo_loss(leaf(logits), labels, rewards, OBJECTIVE, ref_logps=ref_logps, **options)
        packed = rpo_loss(
            leaf(logits.view(12, 5)),
            flat,
            rewards,
            OBJECTIVE,
            ref_logps=ref_tokens,
            normalizer=2.0,
            reduction="sum",
            **ragged,
            **options,
        )
        sums = preference_loss(
            leaf(ref_logps), rewards, OBJECTIVE, ref_logps=ref_logps, backend=backend
        )
        plain = token_logps(leaf(logits), labels, **options)
        (
            logps.sum() + entropies.sum() + 2 * out.loss + packed.loss + sums.loss + plain.sum()
        ).backward()
    backward = "vocabulary_backward_" if inplace else "vocabulary_backward"
    assert {x.name for x, _ in seen} == {"token_logps", "rpo_loss", "preference_loss", backward}
    assert len(seen) == 9
    for operator, args in seen:
        if operator.name == backward:  # has no derivative
            args = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
        torch.library.opcheck(operator._operator, operator.packed(args))


# ---- torch.compile -------------------------------------------------------------------------------


def public_calls(device):
    """Name to (function of one tensor, that tensor's shape): each public function, each way to lay
    out its input.
    """
    _, labels, rewards, ref_logps = batch(device)
    flat, ref_tokens = labels.view(12), torch.randn(12, device=device)
    cu_seqlens, cu_groups = ints(0, 3, 6, 6, 12, device=device), ints(0, 1, 4, device=device)
    several, weight = (
        RPOObjective(reference="harmonic", average=True),
        torch.randn(8, 5, device=device),
    )
    loss = partial(rpo_loss, rewards=rewards, objective=OBJECTIVE, ref_logps=ref_logps)

    def every_output(out):
        values = out.metrics()
        return (
            out.loss.sum()
            + sum(x.detach() for name, x in values.items())
            + out.rewards.sum()
            + out.losses.sum()
        )

    return {
        "token_logps": (lambda x: token_logps(x, labels, softcap=2.0), (4, 3, 5)),
        "token_logps_and_entropy": (
            lambda x: torch.stack(token_logps_and_entropy(x, labels, temperature=0.7)),
            (4, 3, 5),
        ),
        "rpo_loss": (lambda x: every_output(loss(x, labels)), (4, 3, 5)),
        "rpo_loss, packed and ragged": (
            lambda x: every_output(
                loss(x, flat, ref_logps=ref_tokens, cu_seqlens=cu_seqlens, cu_groups=cu_groups)
            ),
            (12, 5),
        ),
        "rpo_loss, reduction none": (
            lambda x: loss(x, labels, reduction="none").loss.square(),
            (4, 3, 5),
        ),
        "rpo_loss after a head": (lambda x: loss(x @ weight, labels).loss, (4, 3, 8)),
        "rpo_loss, in place after a head": (
            lambda x: loss(x @ weight, labels, inplace_backward=True).loss,
            (4, 3, 8),
        ),
        "preference_loss": (
            lambda x: every_output(
                preference_loss(
                    x,
                    rewards,
                    several,
                    ref_logps=torch.stack([ref_logps, -ref_logps]),
                    lengths=ints(1, 2, 0, 3, device=device),
                )
            ),
            (4,),
        ),
        "sequence_logps": (lambda x: sequence_logps(x, labels=labels, average=True), (4, 3)),
        "sequence_logps, packed": (lambda x: sequence_logps(x, cu_seqlens=cu_seqlens), (12,)),
        "shift_labels": (
            lambda x: token_logps(x, shift_labels(labels.abs() % 5, labels >= 0)),
            (4, 3, 5),
        ),
        "shift_labels, packed": (
            lambda x: token_logps(
                x, shift_labels(flat.abs() % 5, flat >= 0, cu_seqlens=cu_seqlens)
            ),
            (12, 5),
        ),
    }


def compiled_equals_eager(name, device, **options):
    function, shape = public_calls(device)[name]
    x = torch.randn(shape, device=device, requires_grad=True)
    eager, compiled = function(x), torch.compile(function, fullgraph=True, **options)(x)
    upstream = torch.randn_like(eager)
    torch.testing.assert_close(compiled, eager, equal_nan=True)
    torch.testing.assert_close(
        gradient(compiled, x, grad_outputs=upstream), gradient(eager, x, grad_outputs=upstream)
    )


@pytest.mark.parametrize("name", public_calls("cpu"))
def test_public_functions_compile_into_one_graph(name, device):
    compiled_equals_eager(name, device, backend="aot_eager")


@pytest.mark.skipif(
    not HAS_GPU and not (shutil.which("g++") or shutil.which("clang++")),
    reason="inductor needs a C++ compiler",
)
@pytest.mark.filterwarnings("ignore")  # inductor is made of pieces that torch deprecates
def test_public_functions_compile_with_inductor(device):
    # no pointwise operation beside ours: C++ would take 15 s
    compiled_equals_eager("rpo_loss after a head", device)


@pytest.mark.parametrize(
    "name", ["token_logps", "token_logps in place", "rpo_loss", "preference_loss"]
)
def test_public_functions_compile_into_one_dynamic_graph(name, device):
    """Batches of a training run differ in length; a recompilation each would cost more than the
    kernels save.
    """

    def call(logits, labels, rewards, ref_logps):
        if name == "token_logps":
            return token_logps(logits, labels).sum()
        if name == "token_logps in place":
            return token_logps(logits * 1, labels, inplace_backward=True).sum()
        if name == "rpo_loss":
            normalizer = 0.5 * len(rewards)
            return rpo_loss(
                logits, labels, rewards, OBJECTIVE, ref_logps=ref_logps, normalizer=normalizer
            ).loss
        return preference_loss(logits.sum((1, 2)), rewards, OBJECTIVE, ref_logps=ref_logps).loss

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for S, T in ((4, 3), (6, 7), (8, 5)):
            inputs = batch(device, S, T)
            torch.testing.assert_close(
                gradient(compiled(*inputs), inputs[0]), gradient(call(*inputs), inputs[0])
            )


@pytest.mark.parametrize("bad", ["labels", "cu_seqlens"])
def test_public_functions_raise_for_bad_values_when_compiled(bad):
    """On a CPU: the checks that tracing skips are made when the graph runs."""
    logits, labels, rewards, ref_logps = batch("cpu")
    arguments = {"labels": labels.view(12), "cu_seqlens": ints(0, 3, 6, 9, 12, device="cpu")}
    arguments[bad][-1] = 11
    call = partial(
        rpo_loss,
        logits.detach().view(12, 5),
        rewards=rewards,
        objective=OBJECTIVE,
        ref_logps=ref_logps,
    )
    with pytest.raises(ValueError, match=f"^rpo_loss: `{bad}` must"):
        torch.compile(call, fullgraph=True, backend="aot_eager")(**arguments)


@pytest.mark.parametrize(
    "bad", [(0, 3, 5_000_000), (0, 7, 3, 12), (-9_000_000, 12), (0, 11), (1, 12)]
)
def test_cu_seqlens_that_no_check_saw_give_nan(bad, device):
    """A compiled call, and any call on a GPU, does not look at values."""
    tokens = torch.randn(12, device=device, requires_grad=True)
    logps = torch.compile(sequence_logps, fullgraph=True, backend="aot_eager")(
        tokens, cu_seqlens=ints(*bad, device=device)
    )
    assert logps.isnan().all()
    logps.sum().backward()


# ---- autograd ------------------------------------------------------------------------------------


def test_public_functions_under_checkpoint_have_the_same_gradients(device, backend):
    logits, labels, rewards, ref_logps = batch(device)
    weight = torch.randn(5, 5, device=device, requires_grad=True)

    def head(x):
        return rpo_loss(
            x @ weight, labels, rewards, OBJECTIVE, ref_logps=ref_logps, backend=backend
        ).loss

    plain = torch.autograd.grad(head(logits), (logits, weight))
    again = torch.autograd.grad(checkpoint(head, logits, use_reentrant=False), (logits, weight))
    assert all(torch.equal(a, b) for a, b in zip(plain, again))
    assert plain[0].abs().sum() > 0


def squares(x):
    return x.square().sum()


def differentiable_calls(device, backend="auto", to_number=squares, **options):
    """Each operator with a gradient, as a function of the logits that gives one number."""
    _, labels, rewards, ref_logps = batch(device)
    shared = {
        "rewards": rewards,
        "objective": OBJECTIVE,
        "ref_logps": ref_logps,
        "backend": backend,
    }
    calls = {
        "token_logps": lambda x: token_logps(x, labels, backend=backend, **options),
        "token_logps_and_entropy": lambda x: sum(
            token_logps_and_entropy(x, labels, backend=backend, **options)
        ),
        "rpo_loss": lambda x: rpo_loss(x, labels, **shared, **options).loss,
        "rpo_loss, reduction none": lambda x: (
            rpo_loss(x, labels, **shared, reduction="none", **options).loss
        ),
    }
    return {name: lambda x, call=call: to_number(call(x)) for name, call in calls.items()}


@pytest.mark.parametrize("inplace", [False, True])
# upstream constant, or depending on the logits
@pytest.mark.parametrize("to_number", [torch.sum, squares])
@pytest.mark.parametrize("name", differentiable_calls("cpu"))
def test_public_functions_raise_for_second_derivatives(name, to_number, inplace, device):
    """They are not implemented; a gradient penalty that went missing without a word would train
    another objective.
    """
    leaf = batch(device)[0]
    loss = differentiable_calls(device, to_number=to_number, inplace_backward=inplace)[name](
        leaf * 1.0
    )
    dlogits = gradient(loss, leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not implemented"):
        (loss + squares(dlogits)).backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("to_number", [torch.sum, squares])
def test_sequence_logps_raises_for_second_derivatives(reduction, to_number, device):
    _, _, rewards, ref_logps = batch(device)
    logps = torch.randn(4, device=device, requires_grad=True)
    loss = to_number(
        preference_loss(logps, rewards, OBJECTIVE, ref_logps=ref_logps, reduction=reduction).loss
    )
    with pytest.raises(NotImplementedError, match="second derivatives are not implemented"):
        (loss + squares(gradient(loss, logps, create_graph=True))).backward()


@pytest.mark.parametrize("name", differentiable_calls("cpu"))
def test_inplace_backward_writes_the_same_gradient_over_the_logits(name, device, backend):
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
def test_inplace_backward_raises_the_second_time(name, device, backend):
    loss = differentiable_calls(device, backend, inplace_backward=True)[name](
        batch(device)[0] * 1.0
    )
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward is not possible, the first has"):
        loss.backward()


@pytest.mark.parametrize("name", differentiable_calls("cpu"))
def test_inplace_backward_raises_where_logits_are_needed_afterwards(name, device, backend):
    logits = batch(device)[0] * 1.0
    # saves the logits, and runs its backward after that of the loss
    penalty = logits.square().mean()
    loss = differentiable_calls(device, backend, inplace_backward=True)[name](logits)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + penalty).backward()


@pytest.mark.parametrize("bounds", [[0, 2, 4, 6], [0, 3, 3, 5, 6]], ids=["pairs", "ragged"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_rpo_loss_of_each_group_weights_its_own_gradient(bounds, packed, device, backend):
    """Reduction "none" under any upstream w: the gradient is the sum of w_g dL_g, each group on its
    own.
    """
    logits, labels, rewards, ref_logps = batch(device, S=6)
    groups = {} if bounds == [0, 2, 4, 6] else {"cu_groups": ints(*bounds, device=device)}
    call = partial(rpo_loss, objective=OBJECTIVE, backend=backend)
    tokens = {"logits": logits, "labels": labels}
    if packed:
        cu_seqlens = ints(0, 3, 5, 9, 12, 15, 18, device=device)
        tokens = {"logits": logits.view(18, 5), "labels": labels.view(18), "cu_seqlens": cu_seqlens}
    losses = call(**tokens, rewards=rewards, ref_logps=ref_logps, reduction="none", **groups).loss
    weights = torch.randn_like(losses)
    alone = []
    for w, (first, last) in zip(weights, pairwise(bounds)):
        if last - first < 2:
            continue  # nothing to compare
        own = {
            name: x[first:last]
            for name, x in (tokens | {"rewards": rewards, "ref_logps": ref_logps}).items()
        }
        if packed:
            own |= {
                name: tokens[name][cu_seqlens[first] : cu_seqlens[last]]
                for name in ("logits", "labels")
            }
            own["cu_seqlens"] = cu_seqlens[first : last + 1] - cu_seqlens[first]
        alone.append(w * call(**own, reduction="sum", group_size=last - first).loss)
    assert sum(x != 0 for x in alone) == 2
    expected = gradient(sum(alone), logits)
    torch.testing.assert_close(gradient(losses, logits, grad_outputs=weights), expected)


@pytest.mark.parametrize("bounds", [[0, 2, 4, 6], [0, 3, 3, 5, 6]], ids=["pairs", "ragged"])
def test_preference_loss_of_each_group_weights_its_own_gradient(bounds, device, backend):
    logps, rewards, ref_logps = torch.randn(3, 6, device=device).unbind()
    logps.requires_grad_()
    groups = {} if bounds == [0, 2, 4, 6] else {"cu_groups": ints(*bounds, device=device)}
    call = partial(preference_loss, objective=OBJECTIVE, backend=backend)
    losses = call(logps, rewards, ref_logps=ref_logps, reduction="none", **groups).loss
    weights = torch.randn_like(losses)
    alone = [
        w
        * call(
            logps[a:b], rewards[a:b], ref_logps=ref_logps[a:b], reduction="sum", group_size=b - a
        ).loss
        for w, (a, b) in zip(weights, pairwise(bounds))
        if b - a > 1
    ]
    expected = gradient(sum(alone), logps)
    torch.testing.assert_close(gradient(losses, logps, grad_outputs=weights), expected)


def test_rpo_loss_gives_only_logits_a_gradient(device, backend):
    """Also below the public functions, which refuse constants that require one."""
    logits, labels, rewards, ref_logps = batch(device)
    constants = [
        x.clone().requires_grad_()
        for x in (rewards, ref_logps[None], torch.tensor(2.0, device=device))
    ]
    rewards, ref_logps, normalizer = constants
    groups = Groups(OBJECTIVE, rewards, ref_logps, None, None, normalizer, group_size=2, mean=True)
    logps = logits.detach().sum((1, 2)).requires_grad_()
    for of_logits, of_logps in [
        (_rpo_loss.eager, _preference_loss.eager),
        (_rpo_loss._traced, _preference_loss._traced),
    ]:
        loss = of_logits(
            logits, labels, Sequences(4), groups, LogitTransform(), False, backend, ""
        )[0]
        grads = torch.autograd.grad(loss, (logits, *constants), allow_unused=True)
        assert [g is not None for g in grads] == [True, False, False, False]
        grads = torch.autograd.grad(
            of_logps(logps, None, groups, backend)[0], (logps, *constants), allow_unused=True
        )
        assert [g is not None for g in grads] == [True, False, False, False]


def test_public_functions_build_no_graph_without_gradients(device, backend):
    logits, labels, rewards, ref_logps = batch(device)
    call = partial(
        rpo_loss,
        labels=labels,
        rewards=rewards,
        objective=OBJECTIVE,
        ref_logps=ref_logps,
        backend=backend,
    )
    assert not call(logits.detach()).loss.requires_grad
    with torch.no_grad():
        assert not call(logits).loss.requires_grad


# ---- autocast ------------------------------------------------------------------------------------


def test_token_logps_under_autocast_keep_float32_logits(device, backend):
    logits, *_ = batch(device)
    call = differentiable_calls(device, backend)["rpo_loss"]
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = call(logits)
    assert loss.dtype == torch.float32 and torch.equal(loss, call(logits))
    assert torch.equal(gradient(loss, logits), gradient(call(logits), logits))


def test_rpo_loss_under_autocast_trains_through_bfloat16_logits(device, backend):
    _, labels, rewards, ref_logps = batch(device)
    hidden, weight = (
        torch.randn(4, 3, 8, device=device),
        torch.randn(5, 8, device=device, requires_grad=True),
    )
    with torch.autocast(device, dtype=torch.bfloat16):
        logits = F.linear(hidden, weight)
        loss = rpo_loss(
            logits, labels, rewards, OBJECTIVE, ref_logps=ref_logps, backend=backend
        ).loss
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    dweight = gradient(loss, weight)
    exact = rpo_loss(
        F.linear(hidden, weight), labels, rewards, OBJECTIVE, ref_logps=ref_logps, backend="torch"
    ).loss
    expected = gradient(exact, weight)
    assert dweight.dtype == torch.float32
    assert (dweight - expected).norm() < 0.05 * expected.norm()  # two roundings to bf16, 2^-8 each
