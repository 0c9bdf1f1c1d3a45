"""The group pass against float64 truth on both backends: every objective, every layout."""

import itertools
import math

import pytest
import torch

from rpo_kernels import (
    RPOObjective,
    checks,
    linear_rpo_loss,
    preference_loss,
    reference,
    rpo_loss,
    sequence_logps,
    token_logps,
)
from rpo_kernels.inputs import Groups, Sequences
from rpo_kernels.objectives import COMPARISONS, DISTANCES, PRESETS

from ..helpers import HAS_GPU, poisoned_memory, worst

FAMILY = list(itertools.product(DISTANCES, COMPARISONS))
# Options that meet in the kernel's constexprs, one of each kind per set.
OPTIONS = {
    "plain": {},
    "average-margin-sft": {
        "average": True,
        "margin": 0.3,
        "sft_weight": 0.2,
        "sft_normalizer": "mean",
    },
    "harmonic-sft": {"reference": "harmonic", "sft_weight": 0.2, "sft_normalizer": "tokens"},
    "geometric-sft": {"reference": "geometric", "sft_weight": 0.2},
    "no-reference": {"reference": "none", "average": True},
}
OBJECTIVES = [pytest.param(getattr(RPOObjective, name)(), id=name) for name in PRESETS] + [
    pytest.param(RPOObjective(d, 0.3, 0.7, c, **options), id=f"{d}-{c}-{name}")
    for (d, c), (name, options) in itertools.product(FAMILY, OPTIONS.items())
]


def batch(objective, device, packed, ragged):
    """Sequences of 0 to 6 scored tokens, a group of one and an empty group among the ragged."""
    V, S = 5, 12
    counts = [3, 1, 0, 5, 3, 3, 2, 2, 3, 2, 5, 3]  # tokens, of which some are ignored
    kwargs = {}
    if packed:
        offsets = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=device)
        kwargs["cu_seqlens"] = offsets
        shape = (int(offsets[-1]),)
    else:
        shape = (S, 3)
    logits = torch.randn(*shape, V, device=device) * 3
    labels = torch.randint(0, V, shape, device=device)
    labels[torch.rand(shape, device=device) < 0.25] = -100
    if not packed:
        labels[5] = -100
    groups = 6
    if ragged and objective.label is None:
        kwargs["cu_groups"] = torch.tensor([0, 2, 3, 9, 9, 12], dtype=torch.int32, device=device)
        groups = 5
    rewards = torch.randn(S, device=device) * 2 if objective.uses_rewards else None
    if objective.reference != "none":
        several = objective.reference != "single"
        kwargs["ref_logps"] = -5 * torch.rand((3, *shape) if several else shape, device=device)
        if several:
            weights = torch.rand(3, groups, device=device)
            kwargs["ref_weights"] = weights / weights.sum(0)
    return logits, labels, rewards, kwargs


def in_float64(kwargs):
    return {
        k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in kwargs.items()
    }


LAYOUTS = ("rows-pairs", "packed-ragged")
# the interpreter is slow: it gets one layout of an objective, and the next one the other
CASES = [
    pytest.param(*objective.values, layout, backend, id=f"{objective.id}-{layout}-{backend}")
    for i, objective in enumerate(OBJECTIVES)
    for j, layout in enumerate(LAYOUTS)
    for backend in ("torch", "triton")
    if HAS_GPU or backend == "torch" or i % 2 == j
]


@pytest.mark.parametrize(("objective", "layout", "backend"), CASES)
def test_rpo_loss_equals_the_reference_in_every_output_and_gradient(
    objective, layout, backend, device
):
    logits, labels, rewards, kwargs = batch(
        objective, device, "packed" in layout, "ragged" in layout
    )
    x64 = logits.double().requires_grad_()
    truth = reference.rpo_loss(
        x64, labels, None if rewards is None else rewards.double(), objective, **in_float64(kwargs)
    )
    truth.loss.backward()
    logits.requires_grad_()
    with poisoned_memory():
        ours = rpo_loss(logits, labels, rewards, objective, backend=backend, **kwargs)
        ours.loss.backward()
    eps = torch.finfo(torch.float32).eps

    def close(a, b, roundings, scale=None):
        scale = (
            float(b.detach().abs().nan_to_num(posinf=0, neginf=0).max()) if scale is None else scale
        )
        assert worst(a, b) <= roundings * eps * scale

    close(ours.logps, truth.logps, 4)
    assert torch.equal(ours.lengths.long(), truth.lengths)
    close(ours.targets, truth.targets, 4)
    # rewards, losses and slopes pass through s = a (l - lref), whose own rounding is that of sums
    # of some ten nats
    close(ours.rewards, truth.rewards, 8)
    spread = 1 + float(truth.rewards.detach().abs().max())
    close(
        ours.losses,
        truth.losses,
        16,
        float(truth.losses.detach().abs().max()) * spread + objective.scale,
    )
    close(
        ours.loss,
        truth.loss,
        16,
        float(truth.losses.detach().abs().max()) * spread + objective.scale,
    )
    close(logits.grad, x64.grad, 32, float(x64.grad.abs().max()) * spread)


@pytest.mark.parametrize("K", [1, 3, 64, 70])
@pytest.mark.parametrize(
    "objective", [pytest.param(RPOObjective(d, 1.0, 1.0, c), id=f"{d}-{c}") for d, c in FAMILY]
)
def test_preference_loss_of_groups_of_one_to_seventy_responses(objective, K, backend, device):
    if K == 1 and objective.comparison != "pointwise":
        pytest.skip("a single response has nothing to be compared with")
    logps = torch.randn(2 * K, device=device, requires_grad=True)
    ref, rewards = torch.randn(2, 2 * K, device=device)
    x64 = logps.detach().double().requires_grad_()
    truth = reference.preference_loss(
        x64, rewards.double(), objective, ref_logps=ref.double(), group_size=K
    )
    ours = preference_loss(logps, rewards, objective, ref_logps=ref, group_size=K, backend=backend)
    (expected,) = torch.autograd.grad(truth.loss, x64)
    (grad,) = torch.autograd.grad(ours.loss, logps)
    assert worst(ours.losses, truth.losses) <= 2e-6 * float(truth.losses.detach().abs().max())
    assert worst(grad, expected) <= 4e-6 * float(expected.abs().max())
    if objective.comparison != "pointwise":
        assert abs(float(grad.double().sum())) <= 1e-6 * float(grad.double().abs().sum())


@pytest.mark.parametrize("reference_kind", ["none", "geometric"])
def test_rpo_loss_does_not_depend_on_the_default_dtype(reference_kind, backend, device):
    objective = RPOObjective(
        reference=reference_kind, sft_weight=0.3, sft_normalizer="tokens", target=1.0, margin=0.3
    )
    logits = torch.randn(6, 3, 7, device=device, requires_grad=True)
    labels = torch.randint(7, (6, 3), device=device)
    ref = None if reference_kind == "none" else -torch.rand(3, 6, device=device)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            out = rpo_loss(logits, labels, None, objective, ref_logps=ref, backend=backend)
        finally:
            torch.set_default_dtype(torch.float32)
        results.append((out.loss, out.rewards, *torch.autograd.grad(out.loss, logits)))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("distance", ["backward_kl", "forward_kl", "squared"])
def test_preference_loss_gradients_of_confident_pairs_keep_their_digits(distance, backend, device):
    """sigmoid(20) - sigmoid(19) is 0 in fp32 if subtracted; the coefficient is 3.5e-9."""
    logps = torch.tensor([20.0, 0.0, -30.0, 0.0, 1e-4, 0.0], device=device, requires_grad=True)
    rewards = torch.tensor([19.0, 0.0, -31.0, 0.0, 2e-4, 0.0], device=device)
    objective = RPOObjective(distance, 1.0, reference="none")
    x64 = logps.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(
        reference.preference_loss(x64, rewards.double(), objective).loss, x64
    )
    out = preference_loss(logps, rewards, objective, backend=backend)
    (grad,) = torch.autograd.grad(out.loss, logps)
    torch.testing.assert_close(grad.double(), expected, rtol=2e-5, atol=1e-16)
    assert (out.losses >= 0).all()


@pytest.mark.parametrize("comparison", ["listwise", "pairwise", "pointwise"])
@pytest.mark.parametrize("distance", ["backward_kl", "forward_kl"])
def test_preference_loss_is_finite_where_a_probability_is_subnormal(
    distance, comparison, backend, device
):
    """q = e^-95 is above 0 in fp32 and e^95 is infinite; q (e^95 - 1 - 95) is 1."""
    s, t = torch.tensor([[-3.0, 0, 2, 0], [95.0, 0, -97, 0]], device=device)
    s, t = (t, s) if distance == "forward_kl" else (s, t)
    objective = RPOObjective(distance, 1.0, comparison=comparison, reference="none")
    truth = reference.preference_loss(s.double(), t.double(), objective)
    ours = preference_loss(s, t, objective, backend=backend)
    assert worst(ours.losses, truth.losses) <= 1e-6 * float(truth.losses.max())


def test_preference_loss_takes_infinite_rewards_as_hard_targets(backend, device):
    """One +inf is a one-hot target, several share the mass; -inf has none; all -inf is a tie."""
    inf = math.inf
    rewards = torch.tensor(
        [0, inf, 1, inf, 2, inf, -inf, 1.0, 2.0, -inf, -inf, -inf], device=device
    )
    for comparison in ("listwise", "pairwise"):
        objective = RPOObjective("backward_kl", 1.0, comparison=comparison, reference="none")
        logps = torch.randn(12, device=device, requires_grad=True)
        x64 = logps.detach().double().requires_grad_()
        truth = reference.preference_loss(x64, rewards.double(), objective, group_size=3)
        ours = preference_loss(logps, rewards, objective, group_size=3, backend=backend)
        assert worst(ours.losses, truth.losses) < 2e-6
        expected = torch.autograd.grad(truth.loss, x64)[0]
        assert worst(torch.autograd.grad(ours.loss, logps)[0], expected) < 1e-6


def test_group_pass_of_131072_tokens_keeps_the_log_ratio(backend, device):
    """Policy and reference near -0.7 nats a token differ by 1e-3: the ratio is 1e-3 of the sums."""
    T = 131_072
    lp = -torch.rand(2, T, device=device) * 1.4
    ref = lp - 1e-3 * torch.rand(2, T, device=device)
    labels = torch.zeros(2, T, dtype=torch.int64, device=device)
    truth = (lp.double() - ref.double()).sum(1)
    if backend == "triton":
        from rpo_kernels.kernels.group_pass import group_pass
    else:
        from rpo_kernels.torch_backend.group_pass import group_pass
    rewards = torch.zeros(2, device=device)
    groups = Groups(
        RPOObjective("squared", 1.0),
        rewards,
        ref.view(1, -1),
        None,
        None,
        None,
        2,
        True,
        ref_per_token=True,
    )
    _, _, (s, l, *_), _, _ = group_pass(
        lp.flatten(), labels.flatten(), None, Sequences(2), groups, -100
    )
    assert float(((s.double() - truth) / truth).abs().max()) <= 1e-6
    assert float((l.double() / lp.double().sum(1) - 1).abs().max()) <= 1e-6


def test_rpo_loss_of_equal_policy_and_reference_has_rewards_of_exactly_zero(backend, device):
    logits = torch.randn(4, 5, 37, device=device)
    labels = torch.randint(0, 37, (4, 5), device=device)
    ref = token_logps(logits, labels, backend=backend)
    objective = RPOObjective("squared", 0.1)
    out = rpo_loss(
        logits, labels, torch.zeros(4, device=device), objective, ref_logps=ref, backend=backend
    )
    assert (out.rewards == 0).all() and out.loss == 0


def test_rpo_loss_equals_preference_loss_of_token_logps(backend, device):
    objective = RPOObjective("forward_kl", 0.5, sft_weight=0.1)
    logits, labels, rewards, kwargs = batch(objective, device, packed=True, ragged=True)
    ref = sequence_logps(kwargs.pop("ref_logps"), labels=labels, cu_seqlens=kwargs["cu_seqlens"])
    fused_in, composed_in = (logits.clone().requires_grad_() for _ in range(2))
    fused = rpo_loss(fused_in, labels, rewards, objective, ref_logps=ref, backend=backend, **kwargs)
    lp = token_logps(composed_in, labels, backend=backend)
    logps = sequence_logps(lp, cu_seqlens=kwargs["cu_seqlens"])
    composed = preference_loss(
        logps,
        rewards,
        objective,
        ref_logps=ref,
        lengths=fused.lengths,
        cu_groups=kwargs["cu_groups"],
        backend=backend,
    )
    fused.loss.backward()
    composed.loss.backward()
    torch.testing.assert_close(fused.losses, composed.losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fused_in.grad, composed_in.grad, rtol=1e-5, atol=1e-7)


def test_preference_loss_reductions_and_normalizer_are_one_sum(backend, device):
    objective = RPOObjective("squared", 0.3, sft_weight=0.1, sft_normalizer="tokens")
    logits, labels, rewards, kwargs = batch(objective, device, packed=True, ragged=True)

    def run(**options):
        x = logits.clone().requires_grad_()
        out = rpo_loss(x, labels, rewards, objective, backend=backend, **kwargs, **options)
        out.loss.sum().backward()
        return out, x.grad

    total, total_grad = run(reduction="sum")
    each, each_grad = run(reduction="none")
    mean, mean_grad = run()
    bounds = kwargs["cu_groups"].tolist()
    counted = sum((total.lengths[a:b] > 0).sum() >= 2 for a, b in itertools.pairwise(bounds))
    assert 0 < counted <= 3  # of five groups one is empty and one has a single response
    for out, grad, factor in [
        (each, each_grad, 1),
        (mean, mean_grad, 1 / counted),
        (*run(normalizer=7.0), 1 / 7),
        (*run(normalizer=torch.tensor(7, device=device)), 1 / 7),
    ]:
        torch.testing.assert_close(out.loss.sum(), total.loss * factor, rtol=1e-6, atol=0)
        torch.testing.assert_close(grad, total_grad * factor, rtol=1e-5, atol=1e-8)
    assert each.loss.shape == (5,) and torch.equal(each.loss, each.losses)


def test_preference_loss_with_nothing_to_compare_is_zero(backend, device):
    logits = torch.randn(4, 3, 7, device=device, requires_grad=True)
    labels = torch.randint(0, 7, (4, 3), device=device)
    labels[1], labels[2] = -100, -100
    out = rpo_loss(
        logits,
        labels,
        None,
        RPOObjective.dpo(),
        ref_logps=torch.zeros(4, device=device),
        backend=backend,
    )
    out.loss.backward()
    assert out.loss == 0 and (out.losses == 0).all() and (logits.grad == 0).all()
    assert out.lengths.tolist() == [3, 0, 0, 3]


def test_preference_loss_of_permuted_groups_is_permuted(backend, device):
    objective = RPOObjective("backward_kl", 0.5)
    logps, rewards, ref = torch.randn(3, 8, 4, device=device)
    order = torch.randperm(8, device=device)
    a = preference_loss(
        logps.flatten(),
        rewards.flatten(),
        objective,
        ref_logps=ref.flatten(),
        group_size=4,
        backend=backend,
    )
    b = preference_loss(
        logps[order].flatten(),
        rewards[order].flatten(),
        objective,
        ref_logps=ref[order].flatten(),
        group_size=4,
        backend=backend,
    )
    assert torch.equal(a.losses[order], b.losses)


def test_preference_loss_repeats_bit_for_bit(backend, device):
    objective = RPOObjective("backward_kl", 0.5, sft_weight=0.1)
    logits, labels, rewards, kwargs = batch(objective, device, packed=True, ragged=True)
    runs = []
    for _ in range(2):
        x = logits.clone().requires_grad_()
        out = rpo_loss(x, labels, rewards, objective, backend=backend, **kwargs)
        out.loss.backward()
        runs.append((out.loss, out.losses, out.rewards, x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


# ---- what no check sees on a GPU -----------------------------------------------------------------


@pytest.fixture
def unseen(monkeypatch):
    """Values are not looked at, as on a GPU."""
    monkeypatch.setattr(checks, "may_read", lambda _: False)


def test_preference_loss_reads_strided_lengths_and_offsets(device):
    logps, rewards, ref_logps = torch.randn(3, 4, device=device)
    lengths = torch.randint(1, 9, (4, 2), device=device)[:, 0]
    cu_groups = torch.tensor([[0, 9], [2, 9], [4, 9]], dtype=torch.int32, device=device)[:, 0]
    objective = RPOObjective("squared", average=True)
    strided, plain = (
        preference_loss(
            logps, rewards, objective, ref_logps=ref_logps, lengths=a, cu_groups=b, backend="triton"
        ).loss
        for a, b in ((lengths, cu_groups), (lengths.contiguous(), cu_groups.contiguous()))
    )
    assert torch.equal(strided, plain)


@pytest.mark.parametrize("distance, comparison", list(itertools.product(DISTANCES, COMPARISONS)))
@pytest.mark.parametrize(
    "rewards", [[math.nan] * 4, [math.nan, math.nan, 0.0, 1.0], [0.0, 1.0, math.nan, 1.0]]
)
def test_preference_loss_of_unchecked_nan_rewards_is_nan(
    unseen, distance, comparison, rewards, device
):
    """A group whose rewards are all NaN is no group with nothing to compare."""
    objective = RPOObjective(distance, comparison=comparison)
    logps = torch.randn(4, device=device, requires_grad=True)
    out = preference_loss(
        logps,
        torch.tensor(rewards, device=device),
        objective,
        ref_logps=logps.detach() * 0.9,
        backend="triton",
    )
    assert out.loss.isnan()
    (gradient,) = torch.autograd.grad(out.loss, logps)
    assert gradient.isnan().any()


@pytest.mark.parametrize("offsets", [(0, 2, 3), (1, 3, 4), (0, 2, 7), (0, 3, 2, 4)])
def test_linear_rpo_loss_raises_for_bad_groups_that_no_check_saw(unseen, offsets, device):
    """Each chunk would see offsets that are good for it."""
    hidden, weight = (
        torch.randn(4, 3, 8, device=device, requires_grad=True),
        torch.randn(11, 8, device=device),
    )
    cu_groups = torch.tensor(offsets, dtype=torch.int32, device=device)
    labels, values = torch.randint(0, 11, (4, 3), device=device), torch.randn(4, device=device)
    with pytest.raises(ValueError, match="`cu_groups` must begin at 0"):
        linear_rpo_loss(
            hidden,
            weight,
            labels,
            values,
            RPOObjective(),
            ref_logps=values,
            cu_groups=cu_groups,
            backend="triton",
        )
