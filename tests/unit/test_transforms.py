"""What torch.func and torch.autograd.forward_ad make of our functions: the right numbers, or an
error, never zeros.
"""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

import rpo_kernels
from rpo_kernels import RPOObjective, sequence_logps

# of torch.func.jvp itself
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

S, T, H, V, R = 4, 3, 5, 7, 2
LABELS = torch.tensor([[0, 1, 2], [3, -100, 4], [5, 6, 0], [1, 2, -100]])
SEVERAL = RPOObjective(beta=0.5, reference="geometric")
LINEAR = {
    "hidden": torch.randn(S, T, H),
    "weight": torch.randn(V, H),
    "bias": torch.randn(V),
    "lora_hidden": torch.randn(S, T, R),
    "lora_weight": torch.randn(V, R),
}
CONSTANTS = {
    "rewards": torch.randn(S),
    "ref_logps": torch.randn(2, S),
    "ref_weights": torch.tensor([0.3, 0.7]),
    "normalizer": torch.tensor(3.0),
}
LIVE = {
    "ref_hidden": torch.randn(S, T, H),
    "ref_weight": torch.randn(V, H),
    "ref_bias": torch.randn(V),
}
ON_LOGITS, ON_LOGPS = {"logits": torch.randn(S, T, V)}, {"logps": torch.randn(S)}
LOSS = {"objective": SEVERAL}
LABELLED = {"labels": LABELS}
# name, arguments with derivatives, tensors without, the rest
CALLS = {
    "token_logps": ("token_logps", ON_LOGITS, {}, LABELLED),
    "token_logps_and_entropy": ("token_logps_and_entropy", ON_LOGITS, {}, LABELLED),
    "linear_token_logps": ("linear_token_logps", LINEAR, {}, LABELLED),
    "linear_token_logps_and_entropy": ("linear_token_logps_and_entropy", LINEAR, {}, LABELLED),
    "rpo_loss": ("rpo_loss", ON_LOGITS, CONSTANTS, LABELLED | LOSS),
    "preference_loss": ("preference_loss", ON_LOGPS, CONSTANTS, LOSS),
    "linear_rpo_loss": ("linear_rpo_loss", LINEAR, CONSTANTS, LABELLED | LOSS),
    "linear_rpo_loss per group": (
        "linear_rpo_loss",
        LINEAR,
        {"rewards": CONSTANTS["rewards"], "ref_logps": CONSTANTS["ref_logps"]},
        LABELLED | LOSS | {"reduction": "none"},
    ),
    "linear_rpo_loss with a live reference": (
        "linear_rpo_loss",
        LINEAR,
        LIVE,
        LABELLED | {"rewards": CONSTANTS["rewards"], "objective": RPOObjective(beta=0.5)},
    ),
}
LEAVES = [(call, name) for call, (_, leaves, _, _) in CALLS.items() for name in leaves]
ALL = LEAVES + [(call, name) for call, (_, _, others, _) in CALLS.items() for name in others]


def called(call: str, argument: str):
    """The name of the function; its sum as a function of one argument; that argument."""
    op, leaves, others, rest = CALLS[call]
    tensors = leaves | others

    def function(x):
        out = getattr(rpo_kernels, op)(**tensors | rest | {argument: x})
        out = getattr(out, "loss", out)
        return sum(y.sum() for y in (out if isinstance(out, tuple) else (out,)))

    return op, function, tensors[argument].clone()


def dual(function, x, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent


# Ways to a forward-mode derivative; each gives one for functions that PyTorch differentiates.
FORWARD_MODE = {
    "jvp": lambda f, x, t: torch.func.jvp(f, (x,), (t,))[1],
    "jacfwd": lambda f, x, t: torch.func.jacfwd(f)(x),
    "dual": dual,
    "dual without gradients": torch.no_grad()(dual),
    "dual float64": lambda f, x, t: dual(lambda y: f(y.float()), x.double(), t.double()),
    "below another grad": lambda f, x, t: torch.func.jvp(
        lambda y: torch.func.grad(lambda w: w.sin() * f(y))(torch.ones(())), (x,), (t,)
    )[1],
}
ASKED_FOR_GRADIENTS = {
    "dual of a parameter": lambda f, x, t: dual(f, x.requires_grad_(), t),
    "hessian": lambda f, x, t: torch.func.hessian(f)(x),
    "jvp of grad": lambda f, x, t: torch.func.jvp(torch.func.grad(f), (x,), (t,))[1],
}


def refuses(way, call: str, argument: str) -> None:
    op, function, x = called(call, argument)
    with pytest.raises(NotImplementedError, match=r"^\w+: forward-mode derivatives") as caught:
        way(function, x, torch.randn_like(x))
    assert str(caught.value).startswith(op)


@pytest.mark.parametrize("way", FORWARD_MODE)
@pytest.mark.parametrize(("call", "argument"), ALL)
def test_public_functions_refuse_forward_mode_in_any_tensor(call, argument, way):
    refuses(FORWARD_MODE[way], call, argument)


@pytest.mark.parametrize("way", ASKED_FOR_GRADIENTS)
@pytest.mark.parametrize(("call", "argument"), LEAVES)
def test_public_functions_refuse_forward_mode_with_gradients(call, argument, way):
    refuses(ASKED_FOR_GRADIENTS[way], call, argument)


@pytest.mark.parametrize(("call", "argument"), LEAVES)
def test_public_functions_refuse_tangents_of_the_upstream_gradient(call, argument):
    _, function, x = called(call, argument)
    out = function(x.requires_grad_())
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(torch.ones(()), torch.ones(()))
        with pytest.raises(NotImplementedError, match="forward-mode derivatives"):
            torch.autograd.grad(out, x, upstream)


@pytest.mark.parametrize(("call", "argument"), LEAVES)
def test_public_functions_have_the_same_gradient_under_torch_func(call, argument):
    _, function, x = called(call, argument)
    value, gradient = torch.func.vjp(function, x)
    (gradient,) = gradient(torch.tensor(3.0))
    leaf = x.clone().requires_grad_()
    ours = function(leaf)
    assert torch.equal(value, ours.detach())
    assert torch.equal(gradient, torch.autograd.grad(3 * ours, leaf)[0])
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("transform", [lambda f: f, torch.func.grad])
@pytest.mark.parametrize(("call", "argument"), ALL)
def test_public_functions_refuse_vmap_or_are_right(call, argument, transform):
    _, function, x = called(call, argument)
    function, xs = transform(function), torch.stack([x, 2 * x])
    try:
        ours = torch.func.vmap(function)(xs)
    except (RuntimeError, ValueError):
        return
    torch.testing.assert_close(ours, torch.stack([function(x) for x in xs]))


@pytest.mark.parametrize("way", [way for way in FORWARD_MODE if way != "below another grad"])
def test_sequence_logps_have_forward_mode_derivatives(way):
    x, tangent = torch.randn(S, T), torch.randn(S, T)
    ours = FORWARD_MODE[way](
        lambda x: sequence_logps(x, labels=LABELS, average=True)[1], x, tangent
    )
    if way == "jacfwd":
        ours = (ours * tangent).sum()
    torch.testing.assert_close(ours.float(), (tangent[1, 0] + tangent[1, 2]) / 2)


def test_sequence_logps_of_packed_tokens_refuse_forward_mode():
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="forward AD"):
        dual(
            lambda x: sequence_logps(x, cu_seqlens=cu_seqlens).sum(), torch.randn(5), torch.ones(5)
        )


@pytest.mark.parametrize(
    ("call", "argument"), [("token_logps", "logits"), ("linear_rpo_loss", "weight")]
)
def test_public_functions_refuse_forward_mode_when_compiled(call, argument):
    op, function, x = called(call, argument)
    compiled = torch.compile(function, backend="aot_eager")
    torch.testing.assert_close(compiled(x), function(x))
    inside = torch.compile(lambda x: FORWARD_MODE["jvp"](function, x, torch.ones_like(x)))
    for refused in (lambda: dual(compiled, x, torch.ones_like(x)), lambda: inside(x)):
        with pytest.raises(NotImplementedError, match=f"{op}: forward-mode"):
            refused()


def test_public_functions_work_next_to_forward_mode_of_others():
    with forward_ad.dual_level():
        for call, argument in LEAVES:
            _, function, x = called(call, argument)
            (gradient,) = torch.autograd.grad(function(x.requires_grad_()), x)
            assert gradient.abs().max() > 0
