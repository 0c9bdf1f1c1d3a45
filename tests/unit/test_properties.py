"""What holds for any batch: drawn at random, the same on every machine.

Finite where the mathematics is, equal to float64, coefficients that sum to zero over a group, and
results that do not depend on the order of groups or on a constant added to a row of logits.
"""

import itertools

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rpo_kernels import RPOObjective, preference_loss, reference, rpo_loss, token_logps_and_entropy
from rpo_kernels.objectives import COMPARISONS
from rpo_kernels.tools.cases import (
    EPS,
    FAMILY,
    OPTIONS,
    PRESETS,
    TRANSFORMS,
    in_float64,
    size,
    worst,
)

INF = float("inf")
# what float64 rounds away of logits of 1e4: ours may be nearer to 0 than that
TRUTH = 1e4 * torch.finfo(torch.float64).eps
OBJECTIVES = [getattr(RPOObjective, name)() for name in PRESETS] + [
    RPOObjective(d, 0.3, 0.7, c, **options)
    for (d, c), options in itertools.product(FAMILY, OPTIONS.values())
]
ROWS = [
    "ordinary",
    "extreme",
    "constant",
    "banned",
    "confident",
    "all but the label banned",
    "ignored",
]


def holds(backend, strategy, property, *, torch_examples, triton_examples):
    """The interpreter takes some 50 ms a launch."""
    n = torch_examples if backend == "torch" else triton_examples
    options = settings(
        max_examples=n,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    options(given(strategy)(property))()


@st.composite
def logits_and_labels(draw, shape, V, kinds=ROWS):
    """Rows of the kinds drawn, values from a seed that is drawn too."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    rows = int(torch.tensor(shape).prod())
    x, labels = torch.randn(rows, V, generator=g) * 3, torch.randint(0, V, (rows,), generator=g)
    picked = draw(st.lists(st.sampled_from(kinds), min_size=rows, max_size=rows))
    for i, kind in enumerate(picked):
        if kind == "extreme":
            x[i] = 1e4 * torch.randint(-1, 2, (V,), generator=g)
        elif kind == "constant":
            x[i] = 7.0
        elif kind == "banned":  # some tokens, perhaps the label, never all
            x[i, torch.rand(V, generator=g) < 0.4] = -INF
            x[i, 0] = 0.5
        elif kind == "confident":
            x[i, labels[i]] += 60
        elif kind == "all but the label banned":
            x[i], x[i, labels[i]] = -INF, 2.0
        elif kind == "ignored":
            labels[i], x[i] = -100, float("nan")
    return x.view(*shape, V), labels.view(shape), g


def agree(name, ours, theirs, truth, rounding):
    """Finite exactly where the truth is, and no further from it than PyTorch in fp32, give or take
    a rounding.
    """
    assert torch.equal(ours.isfinite(), truth.isfinite()), (name, ours, truth)
    both = theirs.isfinite() == truth.isfinite()  # where PyTorch overflows it sets no standard
    pytorch = worst(torch.where(both, theirs, truth), truth)
    assert worst(ours, truth) <= 1.5 * pytorch + rounding + TRUTH, (name, ours, theirs, truth)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_token_logps_and_entropy_of_any_rows_equal_float64(backend, transform, device):
    options = TRANSFORMS[transform]
    shapes = st.sampled_from([1, 2, 5, 33, 300]).flatmap(lambda V: logits_and_labels((2, 4), V))

    def pytorch(x, labels, weights):
        x = x.clone().requires_grad_()
        y = (
            reference.token_logps(x, labels, **options),
            reference.token_entropy(x, labels, **options),
        )
        # infinite where a label is banned; its gradient is not
        total = sum((a * w.to(a)).sum() for a, w in zip(y, weights))
        return y[0].detach(), y[1].detach(), torch.autograd.grad(total, x)[0]

    def equal(drawn):
        x, labels, g = drawn
        weights = torch.randn(2, *labels.shape, generator=g)
        truth, theirs = pytorch(x.double(), labels, weights), pytorch(x, labels, weights)
        x, labels, weights = x.to(device).requires_grad_(), labels.to(device), weights.to(device)
        y = token_logps_and_entropy(x, labels, backend=backend, **options)
        (grad,) = torch.autograd.grad(sum((a * w).sum() for a, w in zip(y, weights)), x)
        agree("logps", y[0].detach().cpu(), theirs[0], truth[0], 2 * EPS * size(truth[0]))
        agree("entropies", y[1].detach().cpu(), theirs[1], truth[1], 4 * EPS * 8.3)
        agree("dlogits", grad.cpu(), theirs[2], truth[2], 4 * EPS * (size(truth[2]) + 8.3))

    holds(backend, shapes, equal, torch_examples=25, triton_examples=6)


@st.composite
def preference_batches(draw):
    """Ragged or even groups, packed or padded sequences, any mask, rewards that are ordinary,
    extreme or tied.
    """
    objective = draw(st.sampled_from(OBJECTIVES))
    ragged = objective.label is None and draw(st.booleans())
    if ragged:
        sizes = draw(
            st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(lambda x: sum(x) > 0)
        )
    else:
        least = 1 if objective.comparison == "pointwise" else 2
        sizes = [2 if objective.label is not None else draw(st.integers(least, 4))] * draw(
            st.integers(1, 3)
        )
    S, kwargs = sum(sizes), {}
    if draw(st.booleans()):
        lengths = draw(
            st.lists(st.integers(0, 4), min_size=S, max_size=S).filter(lambda x: sum(x) > 0)
        )
        kwargs["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        shape = (sum(lengths),)
    else:
        shape = (S, draw(st.integers(1, 4)))
    x, labels, g = draw(
        logits_and_labels(
            shape, 6, ["ordinary", "ordinary", "extreme", "constant", "confident", "ignored"]
        )
    )
    if ragged:
        kwargs["cu_groups"] = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)
    else:
        kwargs["group_size"] = sizes[0]
    rewards = None
    if objective.uses_rewards:
        scale = draw(st.sampled_from([0.0, 1.0, 100.0, 1e4]))
        rewards = scale * torch.randn(S, generator=g)
        if draw(st.booleans()):
            rewards = rewards.round()
    if objective.reference != "none":
        R = (2,) if objective.reference in ("harmonic", "geometric") else ()
        kwargs["ref_logps"] = -4 * torch.rand(
            (*R, *shape) if draw(st.booleans()) else (*R, S), generator=g
        )
    return x, labels, rewards, objective, kwargs


def test_preference_loss_of_any_batch_equals_float64(backend, device):
    def pytorch(x, labels, rewards, objective, kwargs):
        x = x.clone().requires_grad_()
        wide = in_float64(kwargs) if x.dtype == torch.float64 else kwargs
        out = reference.rpo_loss(
            x, labels, None if rewards is None else rewards.to(x), objective, **wide
        )
        return out, torch.autograd.grad(out.loss, x)[0]

    def equal(drawn):
        x, labels, rewards, objective, kwargs = drawn
        (truth, true_grad), (theirs, their_grad) = (
            pytorch(x.double(), *drawn[1:]),
            pytorch(x, *drawn[1:]),
        )
        x = x.to(device).requires_grad_()
        on = {k: v.to(device) if torch.is_tensor(v) else v for k, v in kwargs.items()}
        ours = rpo_loss(
            x,
            labels.to(device),
            None if rewards is None else rewards.to(device),
            objective,
            backend=backend,
            **on,
        )
        (grad,) = torch.autograd.grad(ours.loss, x)
        # s = a (l - lref) and t = eta r round once each; a loss moves with its slope in them, or
        # with their square
        moved = EPS * (size(truth.rewards) + size(truth.targets) + 1)
        slope = objective.scale * (
            1 + size(truth.rewards) + size(truth.targets)
            if objective.distance != "backward_kl"
            else 2
        )
        for name, rounding in [
            ("logps", 4 * EPS * size(truth.logps)),
            ("rewards", 8 * EPS * size(truth.rewards)),
            ("losses", 16 * moved * slope * 4 + 16 * EPS * size(truth.losses)),
            ("loss", 16 * moved * slope * 4 + 16 * EPS * size(truth.losses)),
        ]:
            agree(
                name,
                getattr(ours, name).detach().cpu(),
                getattr(theirs, name).detach(),
                getattr(truth, name).detach(),
                rounding,
            )
        bound = (32 * EPS + 16 * moved) * (size(true_grad) + objective.beta * slope)
        agree("dlogits", grad.cpu(), their_grad, true_grad, bound)

    holds(backend, preference_batches(), equal, torch_examples=50, triton_examples=10)


@st.composite
def groups_of_sums(draw):
    objective = draw(st.sampled_from([x for x in OBJECTIVES if x.reference in ("single", "none")]))
    K = 2 if objective.label is not None else draw(st.integers(2, 9))
    G = draw(st.integers(1, 5))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    scale = draw(st.sampled_from([1e-3, 1.0, 30.0, 1e4]))
    logps, ref, rewards = torch.randn(3, G, K, generator=g) * scale
    lengths = torch.randint(0, 9, (G, K), generator=g)
    order = torch.randperm(G, generator=g)
    return objective, logps, ref, rewards, lengths, order


def test_preference_loss_coefficients_sum_to_zero_in_any_order(backend, device):
    def loss(objective, logps, ref, rewards, lengths):
        x = logps.flatten().to(device).requires_grad_()
        out = preference_loss(
            x,
            rewards.flatten().to(device) if objective.uses_rewards else None,
            objective,
            group_size=logps.shape[1],
            ref_logps=None if objective.reference == "none" else ref.flatten().to(device),
            lengths=lengths.flatten().to(device),
            reduction="sum",
            backend=backend,
        )
        return out.losses.detach(), torch.autograd.grad(out.loss, x)[0].view(logps.shape)

    def invariant(drawn):
        objective, *batch, order = drawn
        losses, grad = loss(objective, *batch)
        permuted, permuted_grad = loss(objective, *(x[order] for x in batch))
        order = order.to(device)
        if not (
            objective.sft_weight and objective.sft_normalizer == "tokens"
        ):  # whose share is a sum over the batch
            assert torch.equal(losses[order], permuted) and torch.equal(grad[order], permuted_grad)
        if (
            objective.comparison != "pointwise"
            and not objective.sft_weight
            and not objective.average
        ):
            assert (grad.double().sum(1).abs() <= 8 * EPS * grad.double().abs().sum(1)).all(), (
                objective,
                grad,
            )

    holds(backend, groups_of_sums(), invariant, torch_examples=60, triton_examples=15)


def test_token_logps_ignore_a_constant_added_to_a_row(backend, device):
    """Logits in steps of 1/64 and a constant of the same kind: the sum is exact, so results may
    differ by roundings of the rest.
    """

    def invariant(drawn):
        (x, labels, _), shift = drawn
        x = (x.nan_to_num() * 64).round() / 64
        near, far = (y.to(device).requires_grad_() for y in (x, x + shift))
        results = []
        for y in (near, far):
            logps, entropies = token_logps_and_entropy(y, labels.to(device), backend=backend)
            results.append(
                (
                    logps.detach(),
                    entropies.detach(),
                    torch.autograd.grad((logps + entropies).sum(), y)[0],
                )
            )
        for a, b in zip(*results):
            assert worst(a, b) <= 4 * EPS * (size(a) + abs(shift) + 8.3)

    drawn = st.tuples(
        logits_and_labels((8,), 33, ["ordinary", "constant", "confident", "ignored"]),
        st.sampled_from([-512.0, 0.5, 4096.0]),
    )
    holds(backend, drawn, invariant, torch_examples=25, triton_examples=6)


@pytest.mark.parametrize("comparison", COMPARISONS)
@pytest.mark.parametrize("distance", ["backward_kl", "forward_kl"])
@given(
    s=st.lists(st.floats(-30, 30, width=32), min_size=3, max_size=3),
    noise=st.lists(st.floats(-(2**-10), 2**-10, width=32), min_size=3, max_size=3),
)
@settings(max_examples=20, deadline=None)
def test_reference_divergences_are_never_negative_in_float32(distance, comparison, s, noise):
    logps = torch.tensor(s)
    rewards = logps + torch.tensor(noise)
    objective = RPOObjective(distance, beta=1.0, comparison=comparison, reference="none")
    assert reference.preference_loss(logps, rewards, objective, group_size=3).loss >= 0
