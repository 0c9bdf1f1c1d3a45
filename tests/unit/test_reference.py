"""The reference is checked against mathematics, not against other code: finite differences, closed
forms, theorems.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck

from rpo_kernels import reference
from rpo_kernels.objectives import COMPARISONS, DISTANCES, RPOObjective
from rpo_kernels.reference import preference_loss

INF = math.inf
RAGGED = torch.tensor([0, 2, 5, 9], dtype=torch.int32)  # groups of 2, 3 and 4 responses
LENGTHS = torch.tensor([3, 7, 1, 4, 9, 2, 5, 5, 8])
EVERY_DISTANCE = [(d, c) for d in DISTANCES for c in COMPARISONS]


def close(actual, expected, *, rtol=1e-12, atol=1e-12):
    torch.testing.assert_close(
        actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=rtol, atol=atol
    )


def batch(seed=0, responses=9, dtype=torch.float64):
    """Log-probabilities, references and rewards of ``responses`` sequences: [S] each."""
    g = torch.Generator().manual_seed(seed)
    logps = -20 - 40 * torch.rand(responses, generator=g, dtype=torch.float64)
    ref_logps = logps + 3 * torch.randn(responses, generator=g, dtype=torch.float64)
    rewards = 2 * torch.randn(responses, generator=g, dtype=torch.float64)
    return logps.to(dtype).requires_grad_(), ref_logps.to(dtype), rewards.to(dtype)


def gradient(loss, *inputs):
    grads = torch.autograd.grad(loss, inputs)
    return grads[0] if len(inputs) == 1 else grads


# ---- tokens --------------------------------------------------------------------------------------

ROW_OPTIONS = [
    {},
    {"temperature": 0.7},
    {"softcap": 1.5},
    {"temperature": 1.3, "logit_scale": 0.4, "softcap": 2.0},
]


def rows(seed=0, shape=(2, 3), vocabulary=5):
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(*shape, vocabulary, generator=g, dtype=torch.float64)
    labels = torch.randint(vocabulary, shape, generator=g)
    labels[0, 1] = -100
    return logits.requires_grad_(), labels


@pytest.mark.parametrize("options", ROW_OPTIONS)
@pytest.mark.parametrize("function", [reference.token_logps, reference.token_entropy])
def test_reference_token_quantities_have_the_gradient_of_their_values(function, options):
    logits, labels = rows()
    assert gradcheck(lambda x: function(x, labels, **options), logits)


def test_reference_token_logps_follow_the_definition_of_the_capped_and_tempered_softmax():
    logits, labels = rows()
    got = reference.token_logps(logits, labels, temperature=1.3, logit_scale=0.4, softcap=2.0)
    for i, t in itertools.product(range(2), range(3)):
        if (i, t) == (0, 1):
            assert got[i, t] == 0
            continue
        z = [2.0 * math.tanh(0.4 * x / 2.0) / 1.3 for x in logits[i, t].tolist()]
        close(got[i, t], z[labels[i, t]] - math.log(sum(map(math.exp, z))))


def test_reference_token_entropy_is_the_mean_surprise_and_a_certain_token_has_none():
    logits, labels = rows()
    p = logits[1, 2].softmax(-1)
    close(reference.token_entropy(logits, labels)[1, 2], -(p * p.log()).sum())
    certain = torch.tensor(
        [[0.0, -INF, -INF], [0.0, 0.0, -INF]], dtype=torch.float64, requires_grad=True
    )
    entropy = reference.token_entropy(certain, torch.tensor([0, 0]))
    close(entropy, [0.0, math.log(2)])
    assert gradient(entropy.sum(), certain).isfinite().all()


def test_reference_linear_token_logps_are_differentiable_in_every_input():
    _, labels = rows()
    g = torch.Generator().manual_seed(1)
    hidden, weight, bias = (
        torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()
        for shape in [(2, 3, 4), (5, 4), (5,)]
    )
    options = {"temperature": 0.8, "softcap": 3.0}
    got = reference.linear_token_logps(hidden, weight, labels, bias=bias, **options)
    close(got, reference.token_logps(hidden @ weight.T + bias, labels, **options))
    assert gradcheck(
        lambda h, w, b: reference.linear_token_logps(h, w, labels, bias=b, **options),
        (hidden, weight, bias),
    )


@pytest.mark.parametrize("poison", [math.nan, INF, -INF])
def test_reference_an_ignored_row_is_exactly_zero_with_zero_gradient_whatever_it_holds(poison):
    logits, labels = rows()
    poisoned = logits.detach().clone()
    poisoned[0, 1] = poison
    poisoned.requires_grad_()
    for function in (reference.token_logps, reference.token_entropy):
        values = function(poisoned, labels, softcap=5.0)
        assert values[0, 1] == 0
        grad = gradient(values.sum(), poisoned)
        assert grad.isfinite().all() and (grad[0, 1] == 0).all()
    hidden = poisoned.detach().clone().requires_grad_()
    weight = torch.eye(5, dtype=torch.float64, requires_grad=True)
    dhidden, dweight = gradient(
        reference.linear_token_logps(hidden, weight, labels).sum(), hidden, weight
    )
    assert dhidden.isfinite().all() and (dhidden[0, 1] == 0).all() and dweight.isfinite().all()


@pytest.mark.parametrize(
    ("given_dtype", "computed"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_reference_half_precision_is_promoted_and_double_precision_stays(given_dtype, computed):
    logits, labels = rows()
    logps, _, rewards = batch()
    assert reference.token_logps(logits.to(given_dtype), labels).dtype == computed
    assert reference.token_entropy(logits.to(given_dtype), labels).dtype == computed
    out = preference_loss(
        logps.to(given_dtype), rewards, RPOObjective(reference="none"), cu_groups=RAGGED
    )
    assert out.loss.dtype == out.rewards.dtype == out.targets.dtype == computed


# ---- sequences -----------------------------------------------------------------------------------


def test_reference_sequences_as_rows_and_packed_give_the_same_sums_means_and_lengths():
    labels = torch.tensor([[1, 2, -100], [3, -100, -100], [-100, -100, -100]])
    tokens = torch.tensor(
        [[-1.0, -2.0, 9.0], [-3.0, 9.0, 9.0], [9.0, 9.0, 9.0]], dtype=torch.float64
    )
    close(reference.sequence_logps(tokens, labels), [-3.0, -3.0, 0.0])
    close(reference.sequence_logps(tokens, labels, average=True), [-1.5, -3.0, 0.0])
    assert reference.sequence_lengths(labels).tolist() == [2, 1, 0]
    packed, edges = {"cu_seqlens": torch.tensor([0, 3, 6, 9])}, (tokens.flatten(), labels.flatten())
    close(reference.sequence_logps(*edges, **packed), [-3.0, -3.0, 0.0])
    close(reference.sequence_logps(*edges, average=True, **packed), [-1.5, -3.0, 0.0])
    assert reference.sequence_lengths(edges[1], **packed).tolist() == [2, 1, 0]


def test_reference_equal_policy_and_reference_give_implicit_rewards_of_exactly_zero():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, 50, generator=g)  # float32: exact, not merely accurate
    labels = torch.randint(50, (4, 6), generator=g)
    tokens = reference.token_logps(logits, labels)
    for ref_logps in (tokens, reference.sequence_logps(tokens)):
        for objective in (RPOObjective.dpo(), RPOObjective.ipo(average=True), RPOObjective.bco()):
            out = reference.rpo_loss(logits, labels, None, objective, ref_logps=ref_logps)
            assert (out.rewards == 0).all()


def test_reference_references_given_per_token_are_subtracted_before_the_sum():
    labels = torch.zeros(2, 400, dtype=torch.long)
    tokens = torch.full((2, 400), -1000.0)
    ref = tokens + 0.01 * torch.rand(2, 400, generator=torch.Generator().manual_seed(0))
    got = reference.log_ratios(tokens, RPOObjective(), ref_logps=ref, labels=labels)
    expected = (tokens.double() - ref.double()).sum(-1)
    # The sums are near -4e5, where one float32 step is 0.03.
    assert (got.double() - expected).abs().max() < 1e-5


def test_reference_several_references_combine_as_the_harmonic_or_geometric_mean_of_the_policies():
    logps, _, _ = batch()
    refs = torch.stack([batch(seed)[1] for seed in (1, 2, 3)])
    alpha = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    harmonic = 1 / sum(a / ref.exp() for a, ref in zip(alpha, refs, strict=True))
    options = {"ref_logps": refs, "ref_weights": alpha, "cu_groups": RAGGED}
    close(
        reference.log_ratios(logps, RPOObjective(reference="harmonic"), **options),
        logps - harmonic.log(),
    )
    geometric = sum(a * ref for a, ref in zip(alpha, refs, strict=True))
    close(
        reference.log_ratios(logps, RPOObjective(reference="geometric"), **options),
        logps - geometric,
    )
    close(reference.log_ratios(logps, RPOObjective(reference="none"), cu_groups=RAGGED), logps)


def test_reference_weights_are_uniform_unless_given_and_may_differ_between_groups():
    logps, _, _ = batch()
    refs = torch.stack([batch(seed)[1] for seed in (1, 2)])
    objective = RPOObjective(reference="geometric")
    uniform = reference.log_ratios(logps, objective, ref_logps=refs, cu_groups=RAGGED)
    close(uniform, logps - refs.mean(0))
    one_hot = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)  # [R, G]
    picked = torch.tensor([0, 0, 1, 1, 1, 0, 0, 0, 0])
    for name in ("geometric", "harmonic"):
        objective = RPOObjective(reference=name)
        got = reference.log_ratios(
            logps, objective, ref_logps=refs, ref_weights=one_hot, cu_groups=RAGGED
        )
        close(got, logps - refs[picked, torch.arange(9)])


def test_reference_harmonic_references_combine_sequences_not_tokens():
    labels = torch.zeros(2, 3, dtype=torch.long)
    g = torch.Generator().manual_seed(0)
    tokens, first, second = -3 * torch.rand(3, 2, 3, generator=g, dtype=torch.float64)
    got = reference.log_ratios(
        tokens,
        RPOObjective(reference="harmonic"),
        ref_logps=torch.stack([first, second]),
        labels=labels,
    )
    ratio = tokens.sum(-1).exp() * (0.5 / first.sum(-1).exp() + 0.5 / second.sum(-1).exp())
    close(got, ratio.log())


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("distance", "comparison"), EVERY_DISTANCE)
@pytest.mark.parametrize(
    "settings_",
    [
        {},
        {"average": True, "beta": 1.7, "eta": 0.6, "margin": 0.3, "sft_weight": 0.2, "scale": 3.0},
        {"sft_weight": 0.5, "sft_normalizer": "mean"},
        {"sft_weight": 0.5, "sft_normalizer": "tokens"},
    ],
    ids=["plain", "averages", "mean NLL", "token NLL"],
)
def test_reference_every_distance_has_the_gradient_of_its_value(distance, comparison, settings_):
    logps, ref_logps, rewards = batch()
    objective = RPOObjective(distance, comparison=comparison, **settings_)

    def losses(x):
        return preference_loss(
            x,
            rewards,
            objective,
            ref_logps=ref_logps,
            lengths=LENGTHS,
            cu_groups=RAGGED,
            reduction="none",
        ).loss

    assert gradcheck(losses, logps)


@pytest.mark.parametrize(
    "objective",
    [
        RPOObjective(cross_entropy=True),
        RPOObjective(cross_entropy=True, comparison="pairwise"),
        RPOObjective.nca(beta=0.5),
        RPOObjective.softmax_dpo(),
        RPOObjective(target=INF, comparison="pairwise"),
        RPOObjective("squared", leave_one_out=False),
        RPOObjective(reference="harmonic"),
        RPOObjective(reference="geometric"),
    ],
    ids=lambda o: f"{o.distance} {o.comparison} {o.target} {o.reference}",
)
def test_reference_the_variants_of_an_objective_have_the_gradient_of_their_value(objective):
    logps, ref_logps, rewards = batch()
    ref_logps = (
        torch.stack([ref_logps, ref_logps.flip(0)])
        if objective.reference != "single"
        else ref_logps
    )
    assert gradcheck(
        lambda x: (
            preference_loss(x, rewards, objective, ref_logps=ref_logps, cu_groups=RAGGED).loss
        ),
        logps,
    )


def test_reference_the_loss_from_hidden_states_has_the_gradient_of_its_value():
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 3, 3, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, generator=g, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(5, (4, 3), generator=g)
    labels[1, 2] = labels[2, 0] = -100
    ref_logps = -torch.rand(4, 3, generator=g, dtype=torch.float64)
    rewards = torch.randn(4, generator=g, dtype=torch.float64)

    def loss(h, w):
        return reference.linear_rpo_loss(
            h, w, labels, rewards, RPOObjective(beta=0.7), ref_logps=ref_logps
        ).loss

    assert gradcheck(loss, (hidden, weight))


@pytest.mark.parametrize("distance", DISTANCES)
def test_reference_the_gradient_of_a_listwise_distance_is_its_closed_form(distance):
    logps, _, rewards = batch(responses=4)
    out = preference_loss(
        logps, rewards, RPOObjective(distance, beta=0.3, eta=0.5, reference="none"), group_size=4
    )
    s, t, K = 0.3 * logps.detach(), 0.5 * rewards, 4
    u, p, q = s - t, s.softmax(0), t.softmax(0)
    expected = {
        "squared": K / (K - 1) ** 2 * (u - u.mean()),
        "backward_kl": p - q,
        "forward_kl": p * (u - (p * u).sum()),
        "hellinger": 2 * (p * (p * q).sqrt().sum() - (p * q).sqrt()),
    }
    close(gradient(out.loss, logps) / 0.3, expected[distance])


@pytest.mark.parametrize("distance", DISTANCES)
def test_reference_the_gradient_of_a_pair_is_its_closed_form(distance):
    logps, _, rewards = batch(responses=2)
    objective = RPOObjective(distance, beta=0.1, reference="none", comparison="pairwise")
    d, tau = 0.1 * (logps[0] - logps[1]).item(), (rewards[0] - rewards[1]).item()
    p, q = 1 / (1 + math.exp(-d)), 1 / (1 + math.exp(-tau))
    slope = {
        "squared": d - tau,
        "backward_kl": p - q,
        "forward_kl": p * (1 - p) * (d - tau),
        "hellinger": 2 * (p * math.sqrt((1 - p) * (1 - q)) - (1 - p) * math.sqrt(p * q)),
    }[distance]
    close(
        gradient(preference_loss(logps, rewards, objective).loss, logps),
        [0.1 * slope, -0.1 * slope],
    )


# ---- identities ----------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", DISTANCES)
def test_reference_for_pairs_listwise_and_pairwise_agree_in_value_and_gradient(distance):
    logps, ref_logps, rewards = batch(responses=8)
    values = []
    for comparison in ("listwise", "pairwise"):
        objective = RPOObjective(distance, beta=0.4, comparison=comparison)
        out = preference_loss(logps, rewards, objective, ref_logps=ref_logps, reduction="none")
        values.append((out.loss.detach(), gradient(out.loss.sum(), logps)))
    for listwise, pairwise in zip(*values, strict=True):
        close(listwise, pairwise)


@pytest.mark.parametrize("comparison", ["listwise", "pairwise"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_reference_the_gradients_of_a_group_sum_to_zero_and_a_shift_of_the_group_changes_nothing(
    distance, comparison
):
    logps, ref_logps, rewards = batch()
    objective = RPOObjective(distance, comparison=comparison)
    options = {"ref_logps": ref_logps, "cu_groups": RAGGED, "reduction": "none"}
    out = preference_loss(logps, rewards, objective, **options)
    grad = gradient(out.loss.sum(), logps)
    shift = torch.tensor([5.0, 5.0, -2.0, -2.0, -2.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    for start, stop in itertools.pairwise(RAGGED.tolist()):
        close(grad[start:stop].sum(), 0.0)
    close(preference_loss(logps + shift, rewards, objective, **options).loss, out.loss, rtol=1e-11)
    close(preference_loss(logps, rewards + shift, objective, **options).loss, out.loss, rtol=1e-11)


@pytest.mark.parametrize(("distance", "comparison"), EVERY_DISTANCE)
def test_reference_the_order_of_the_responses_of_a_group_does_not_matter(distance, comparison):
    logps, ref_logps, rewards = batch()
    objective = RPOObjective(distance, comparison=comparison, margin=0.2, sft_weight=0.1)
    # permutes inside the groups of RAGGED; the pair is swapped
    order = torch.tensor([1, 0, 4, 2, 3, 6, 8, 5, 7])
    options = {"cu_groups": RAGGED, "reduction": "none"}
    one = preference_loss(logps, rewards, objective, ref_logps=ref_logps, **options)
    two = preference_loss(
        logps[order], rewards[order], objective, ref_logps=ref_logps[order], **options
    )
    close(two.loss, one.loss)
    close(two.rewards, one.rewards[order])


@pytest.mark.parametrize(("distance", "comparison"), EVERY_DISTANCE)
def test_reference_the_optimum_has_loss_and_gradient_zero(distance, comparison):
    _, ref_logps, rewards = batch()
    beta, eta = 0.05, 1.5
    # pi* is proportional to pi_ref exp(eta r / beta); without a comparison inside the group the
    # constant is 0.
    shift = torch.tensor([7.0, 7.0, -3.0, -3.0, -3.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    shift = 0 * shift if comparison == "pointwise" else shift
    logps = (ref_logps + eta * rewards / beta + shift).requires_grad_()
    out = preference_loss(
        logps,
        rewards,
        RPOObjective(distance, beta, eta, comparison),
        ref_logps=ref_logps,
        cu_groups=RAGGED,
    )
    assert 0 <= out.loss < 1e-14
    assert gradient(out.loss, logps).abs().max() < 1e-14


def test_reference_clamping_a_divergence_at_zero_leaves_the_gradient_alone():
    # Searched for: a pair whose float32 divergence rounds below zero. Its gradient p - q is not
    # zero.
    g = torch.Generator().manual_seed(0)
    logps = (3 * torch.randn(2000, generator=g)).requires_grad_()
    rewards = logps.detach() + 1e-4 * torch.randn(2000, generator=g)
    out = preference_loss(
        logps, rewards, RPOObjective(beta=1.0, reference="none"), reduction="none"
    )
    at_zero = out.loss == 0
    assert at_zero.sum() > 20
    grad = gradient(out.loss.sum(), logps).view(-1, 2)[:, 0]
    d, tau = (
        x.detach().double().view(-1, 2).diff(dim=1).neg().squeeze(1) for x in (logps, rewards)
    )
    torch.testing.assert_close(
        grad[at_zero].double(), (d.sigmoid() - tau.sigmoid())[at_zero], rtol=0, atol=3e-7
    )
    assert (grad[at_zero] != 0).any()


def test_reference_squared_listwise_is_half_the_variance_up_to_its_constants():
    logps, _, rewards = batch(responses=5)
    K, u = 5, 0.1 * logps - rewards

    def loss(**settings_):
        objective = RPOObjective("squared", reference="none", **settings_)
        return preference_loss(logps, rewards, objective, group_size=5).loss

    close(loss(), K / (2 * (K - 1)) * u.var())
    close(loss(leave_one_out=False), u.var() / 2)
    close(loss(comparison="pairwise"), loss() * 2 * (K - 1) / K)
    leave_one_out = [u[i] - (u.sum() - u[i]) / (K - 1) for i in range(K)]
    close(loss(), sum(x**2 for x in leave_one_out) / (2 * K))


# ---- targets -------------------------------------------------------------------------------------


def test_reference_cross_entropy_adds_the_entropy_of_the_target_and_nothing_to_the_gradient():
    logps, ref_logps, rewards = batch(responses=3)
    t = 0.7 * rewards
    q, b = t.softmax(0), torch.sigmoid(t)
    gaps = torch.stack([t[0] - t[1], t[0] - t[2], t[1] - t[2]]).sigmoid()
    entropy = {
        "listwise": -(q * q.log()).sum(),
        "pairwise": -(gaps * gaps.log() + (1 - gaps) * (1 - gaps).log()).mean(),
        "pointwise": -(b * b.log() + (1 - b) * (1 - b).log()).mean(),
    }
    for comparison in COMPARISONS:
        kl, ce = (
            preference_loss(
                logps,
                rewards,
                RPOObjective(eta=0.7, comparison=comparison, cross_entropy=cross_entropy),
                ref_logps=ref_logps,
                group_size=3,
            ).loss
            for cross_entropy in (False, True)
        )
        close(ce - kl, entropy[comparison])
        close(gradient(ce, logps), gradient(kl, logps))


def test_reference_a_hard_target_makes_the_divergence_and_the_cross_entropy_equal_and_finite():
    logps, ref_logps, _ = batch(responses=8)
    # Pairwise in larger groups the rejected responses tie with one another, and a tie has entropy
    # log 2.
    for comparison, group_size in (("listwise", 4), ("pairwise", 2), ("pointwise", 4)):
        kl, ce = (
            preference_loss(
                logps,
                None,
                RPOObjective(comparison=comparison, target=INF, cross_entropy=cross_entropy),
                ref_logps=ref_logps,
                group_size=group_size,
                reduction="none",
            )
            for cross_entropy in (False, True)
        )
        assert torch.equal(kl.loss, ce.loss) and kl.loss.isfinite().all()
        assert kl.targets.tolist() == [-INF if i % group_size else INF for i in range(8)]


@pytest.mark.parametrize("comparison", ["listwise", "pairwise"])
@pytest.mark.parametrize("d", [-21.0, 21.0])
def test_reference_a_saturated_pair_keeps_every_digit_of_its_loss(d, comparison):
    logps = torch.tensor([d, 0.0], dtype=torch.float64)
    objective = RPOObjective(beta=1.0, target=INF, comparison=comparison, reference="none")
    # Softplus taken as linear above 20 would lose 7.6e-10 at -21; log(1 + e^-21) without log1p,
    # half its digits at 21.
    close(
        preference_loss(logps, None, objective).loss,
        max(-d, 0) + math.log1p(math.exp(-abs(d))),
        rtol=1e-14,
        atol=0,
    )


def test_reference_equal_infinities_are_a_tie():
    logps = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)

    def loss(rewards, comparison):
        objective = RPOObjective(
            beta=1.0, comparison=comparison, reference="none", cross_entropy=True
        )
        return preference_loss(logps, torch.tensor(rewards), objective, group_size=3).loss

    log_p = logps.log_softmax(0)
    close(loss([INF, INF, 0.0], "listwise"), -(log_p[0] + log_p[1]) / 2)
    close(loss([INF, -INF, 0.0], "listwise"), -log_p[0])
    close(loss([-INF, -INF, -INF], "listwise"), -log_p.mean())
    tie = (
        torch.nn.functional.softplus(logps[1] - logps[0])
        + torch.nn.functional.softplus(logps[0] - logps[1])
    ) / 2
    others = torch.nn.functional.softplus(logps[2] - logps[:2]).sum()
    close(loss([INF, INF, 0.0], "pairwise"), (tie + others) / 3)
    assert gradient(loss([INF, INF, 0.0], "pairwise"), logps).isfinite().all()


def test_reference_only_the_backward_divergence_takes_an_infinite_target():
    logps, _, _ = batch(responses=2)
    for distance in ("squared", "forward_kl"):
        with pytest.raises(ValueError, match="infinite target"):
            preference_loss(
                logps, torch.tensor([INF, 0.0]), RPOObjective(distance, reference="none")
            )


@pytest.mark.parametrize("comparison", ["listwise", "pairwise"])
def test_reference_a_label_is_the_probability_that_the_first_response_wins(comparison):
    logps, ref_logps, _ = batch(responses=6)
    for q in (0.5, 0.7, 1.0):
        tau = INF if q == 1 else math.log(q / (1 - q))
        outs = [
            preference_loss(
                logps, None, RPOObjective(comparison=comparison, **how), ref_logps=ref_logps
            )
            for how in ({"label": q}, {"target": tau})
        ]
        close(outs[0].loss, outs[1].loss)
        close(outs[0].targets, outs[1].targets)
    beyond = preference_loss(
        logps,
        None,
        RPOObjective(label=1.2, cross_entropy=True),
        ref_logps=ref_logps,
        reduction="none",
    )
    d = 0.1 * (logps - ref_logps).view(-1, 2).diff(dim=1).neg().squeeze(1)
    close(beyond.loss, -1.2 * torch.log(torch.sigmoid(d)) + 0.2 * torch.log(torch.sigmoid(-d)))
    assert beyond.targets.isnan().all()


def test_reference_a_numeric_target_sets_the_first_response_against_the_others():
    logps, ref_logps, rewards = batch()
    objective = RPOObjective("squared", comparison="pointwise", target=3.0)
    out = preference_loss(logps, rewards, objective, ref_logps=ref_logps, cu_groups=RAGGED)
    assert out.targets.tolist() == [1.5, -1.5, 1.5, -1.5, -1.5, 1.5, -1.5, -1.5, -1.5]


def test_reference_the_chosen_response_has_the_largest_target_and_the_first_wins_a_tie():
    logps, _, _ = batch(responses=6)
    rewards = torch.tensor([1.0, 4.0, 4.0, 0.0, 0.0, -1.0])
    for objective, r, chosen in [
        ({}, rewards, [1, 3]),
        ({"distance": "squared", "target": 1.0}, None, [0, 3]),
    ]:
        with_margin = RPOObjective(**objective, beta=1.0, margin=0.5, reference="none")
        without = RPOObjective(**objective, beta=1.0, reference="none")
        shifted = logps.detach().clone()
        shifted[chosen] -= 0.5
        out = preference_loss(logps, r, with_margin, group_size=3)
        close(out.losses, preference_loss(shifted, r, without, group_size=3).losses)
        close(out.rewards, logps)  # what the policy earns, whatever lead it is asked for


# ---- the negative log-likelihood of the chosen, reductions ---------------------------------------


def test_reference_the_likelihood_term_is_a_sum_a_mean_or_a_mean_over_all_chosen_tokens():
    logps, ref_logps, rewards = batch()
    chosen = [
        max(range(a, b), key=rewards.tolist().__getitem__)
        for a, b in itertools.pairwise(RAGGED.tolist())
    ]
    nll, n = -logps[chosen], LENGTHS[chosen]

    def losses(weight, normalizer="sum"):
        objective = RPOObjective(sft_weight=weight, sft_normalizer=normalizer)
        return preference_loss(
            logps,
            rewards,
            objective,
            ref_logps=ref_logps,
            lengths=LENGTHS,
            cu_groups=RAGGED,
            reduction="none",
        ).loss

    plain = losses(0.0)
    close(losses(0.5) - plain, 0.5 * nll)
    close(losses(0.5, "mean") - plain, 0.5 * nll / n)
    close((losses(0.5, "tokens") - plain).mean(), 0.5 * nll.sum() / n.sum())


def test_reference_reductions_and_normalizers_of_the_same_losses():
    logps, ref_logps, rewards = batch()

    def loss(**options):
        return preference_loss(
            logps, rewards, RPOObjective(), ref_logps=ref_logps, cu_groups=RAGGED, **options
        ).loss

    losses = loss(reduction="none")
    assert losses.shape == (3,)
    close(loss(), losses.mean())
    close(loss(reduction="sum"), losses.sum())
    for normalizer in (7, torch.tensor(7.0)):
        close(loss(normalizer=normalizer), losses.sum() / 7)
    with pytest.raises(ValueError, match="normalizer"):
        loss(reduction="none", normalizer=7)


def test_reference_rows_packed_sequences_and_hidden_states_give_one_loss():
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 5, 3, generator=g, dtype=torch.float64)
    weight, bias = (
        torch.randn(7, 3, generator=g, dtype=torch.float64),
        torch.randn(7, generator=g, dtype=torch.float64),
    )
    labels = torch.randint(7, (4, 5), generator=g)
    labels[0, :2] = labels[3, 3:] = -100
    ref_tokens = -2 * torch.rand(4, 5, generator=g, dtype=torch.float64)
    rewards = torch.randn(4, generator=g, dtype=torch.float64)
    objective = RPOObjective(average=True, sft_weight=0.1, sft_normalizer="tokens")
    options = {"temperature": 0.9, "softcap": 4.0}
    logits = hidden @ weight.T + bias

    by_rows = reference.rpo_loss(
        logits, labels, rewards, objective, ref_logps=ref_tokens, **options
    )
    packed = reference.rpo_loss(
        logits.flatten(0, 1),
        labels.flatten(),
        rewards,
        objective,
        ref_logps=ref_tokens.flatten(),
        cu_seqlens=torch.tensor([0, 5, 10, 15, 20]),
        **options,
    )
    linear = reference.linear_rpo_loss(
        hidden, weight, labels, rewards, objective, bias=bias, ref_logps=ref_tokens, **options
    )
    sums = reference.sequence_logps(ref_tokens, labels)
    by_sums = reference.rpo_loss(logits, labels, rewards, objective, ref_logps=sums, **options)
    sequences = preference_loss(
        by_rows.logps, rewards, objective, ref_logps=sums, lengths=by_rows.lengths
    )
    assert by_rows.lengths.tolist() == [3, 5, 5, 3]
    for other in (packed, linear, by_sums, sequences):
        for name in ("loss", "losses", "rewards", "logps", "targets"):
            close(getattr(other, name), getattr(by_rows, name))


# ---- responses without a scored token ------------------------------------------------------------


@pytest.mark.parametrize(("distance", "comparison"), EVERY_DISTANCE)
def test_reference_a_response_without_a_scored_token_leaves_the_loss_of_the_others(
    distance, comparison
):
    logps, ref_logps, rewards = batch(responses=6)
    lengths = torch.tensor([4, 0, 2, 3, 5, 1])
    left = [0, 2, 3, 4, 5]
    # Nothing of the dropped response may be read.
    spoiled = [x.detach().clone() for x in (logps, ref_logps, rewards)]
    for x in spoiled:
        x[1] = math.nan
    spoiled[0].requires_grad_()
    objective = RPOObjective(
        distance, comparison=comparison, average=True, margin=0.1, sft_weight=0.3
    )
    whole = preference_loss(
        spoiled[0],
        spoiled[2],
        objective,
        ref_logps=spoiled[1],
        lengths=lengths,
        group_size=3,
        reduction="none",
    )
    small = preference_loss(
        logps[left],
        rewards[left],
        objective,
        ref_logps=ref_logps[left],
        lengths=lengths[left],
        cu_groups=torch.tensor([0, 2, 5]),
        reduction="none",
    )
    close(whole.loss, small.loss)
    close(whole.rewards[left], small.rewards)
    assert whole.rewards[1] == 0
    grad = gradient(whole.loss.sum(), spoiled[0])
    assert grad[1] == 0
    close(grad[left], gradient(small.loss.sum(), logps)[left])


@pytest.mark.parametrize("comparison", ["listwise", "pairwise"])
def test_reference_a_group_left_with_one_response_does_not_count(comparison):
    logps, ref_logps, rewards = batch(responses=4)
    objective = RPOObjective(comparison=comparison, sft_weight=1.0, sft_normalizer="tokens")
    options = {"ref_logps": ref_logps, "lengths": torch.tensor([5, 0, 4, 6])}
    out = preference_loss(logps, rewards, objective, **options)
    alone = preference_loss(
        logps[2:], rewards[2:], objective, ref_logps=ref_logps[2:], lengths=torch.tensor([4, 6])
    )
    assert out.losses[0] == 0
    close(out.loss, alone.loss)  # the mean runs over one group, the tokens are those of one group
    assert (gradient(out.loss, logps)[:2] == 0).all()


def test_reference_a_pointwise_group_counts_while_one_response_remains():
    logps, ref_logps, rewards = batch(responses=4)
    objective = RPOObjective("squared", comparison="pointwise")
    out = preference_loss(
        logps, rewards, objective, ref_logps=ref_logps, lengths=torch.tensor([5, 0, 0, 0])
    )
    close(out.loss, (0.1 * (logps[0] - ref_logps[0]) - rewards[0]) ** 2 / 2)
    assert out.losses[1] == 0 and out.rewards.count_nonzero() == 1


@pytest.mark.parametrize(
    "objective",
    [
        RPOObjective.dpo(),
        RPOObjective.robust_dpo(),
        RPOObjective.softmax_dpo(),
        RPOObjective.sppo(),
        RPOObjective("squared", target=1.0, comparison="pairwise"),
    ],
    ids=["dpo", "robust_dpo", "softmax_dpo", "sppo", "pairwise"],
)
def test_reference_without_rewards_a_group_that_lost_its_first_response_does_not_count(objective):
    logps, ref_logps, _ = batch(responses=4)
    options = {"ref_logps": ref_logps, "reduction": "none"}
    whole = preference_loss(logps, None, objective, **options)
    lost = preference_loss(logps, None, objective, lengths=torch.tensor([0, 3, 3, 3]), **options)
    assert lost.loss[0] == 0
    close(lost.loss[1], whole.loss[1])
    assert (gradient(lost.loss.sum(), logps)[:2] == 0).all()


def test_reference_a_label_needs_exactly_two_responses():
    logps, ref_logps, _ = batch()
    lengths = torch.tensor([1, 1, 1, 0, 1, 1, 1, 1, 1])  # the groups keep 2, 2 and 4
    out = preference_loss(
        logps,
        None,
        RPOObjective(label=0.8),
        ref_logps=ref_logps,
        lengths=lengths,
        cu_groups=RAGGED,
        reduction="none",
    )
    pair = preference_loss(
        logps[[2, 4]], None, RPOObjective(label=0.8), ref_logps=ref_logps[[2, 4]]
    )
    close(out.loss[1], pair.loss)
    assert out.loss[2] == 0 and out.loss[0] > 0


def test_reference_a_batch_in_which_nothing_counts_has_loss_zero_and_can_call_backward():
    logits = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.full((4, 3), -100)
    objective = RPOObjective(average=True, sft_weight=1.0, sft_normalizer="tokens")
    out = reference.rpo_loss(logits, labels, torch.zeros(4), objective, ref_logps=torch.zeros(4))
    out.loss.backward()
    assert out.loss == 0 and (logits.grad == 0).all() and out.lengths.tolist() == [0, 0, 0, 0]


def test_reference_a_softmax_target_counts_the_remaining_responses():
    logps, ref_logps, rewards = batch(responses=3)
    out = preference_loss(
        logps,
        rewards,
        RPOObjective.nca(),
        ref_logps=ref_logps,
        lengths=torch.tensor([1, 0, 1]),
        group_size=3,
    )
    close(out.targets[[0, 2]], (2 * rewards[[0, 2]].softmax(0)).log())


# ---- the on-policy theorem -----------------------------------------------------------------------


def test_reference_rloo_preset_on_policy_is_reinforce_leave_one_out_of_the_kl_regularised_reward():
    """Every sample of K = 3 responses from a policy over V = 4, weighted by its probability: no
    sampling error.

    Per sample the gradient is that of -(1/K) sum_i A_i log pi(y_i) with A_i the leave-one-out
    advantage of r - beta log(pi / ref); in expectation it is that of -J(theta), J = E[r] - beta
    KL(pi || ref).
    """
    V, K, beta = 4, 3, 0.7
    g = torch.Generator().manual_seed(0)
    theta = torch.randn(V, generator=g, dtype=torch.float64, requires_grad=True)
    ref_logp = torch.randn(V, generator=g, dtype=torch.float64).log_softmax(0)
    r = torch.randn(V, generator=g, dtype=torch.float64)

    samples = torch.tensor(list(itertools.product(range(V), repeat=K)))  # [V^K, K]
    logp = theta.log_softmax(0)
    probability = logp.detach()[samples].sum(1).exp()
    logps, ref_logps, rewards = logp[samples], ref_logp[samples], r[samples]

    out = preference_loss(
        logps.flatten(),
        rewards.flatten(),
        RPOObjective.rloo(beta),
        ref_logps=ref_logps.flatten(),
        group_size=K,
        reduction="none",
    )
    total = rewards - beta * (logps.detach() - ref_logps)
    advantage = total - (total.sum(1, keepdim=True) - total) / (K - 1)
    surrogate = -(advantage * logps).mean(1)
    J = (logp.exp() * (r - beta * (logp - ref_logp))).sum()

    close(torch.autograd.grad(out.losses.sum(), logps, retain_graph=True)[0], -advantage / K)
    expected = torch.autograd.grad((probability * out.losses).sum(), theta, retain_graph=True)[0]
    close(
        expected, torch.autograd.grad((probability * surrogate).sum(), theta, retain_graph=True)[0]
    )
    close(expected, torch.autograd.grad(-J, theta)[0])
