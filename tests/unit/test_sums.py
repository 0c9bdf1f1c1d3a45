"""Weighted sums of objectives and weights of groups: one loss, one backward."""

from dataclasses import replace

import pytest
import torch

from rpo_kernels import RPOObjective, linear_rpo_loss, preference_loss, reference, rpo_loss
from rpo_kernels.sums import ObjectiveSum, as_plain, from_plain

from ..helpers import worst

S, T, V, H = 8, 5, 13, 6
MPO = [
    (0.8, RPOObjective.dpo(0.1)),
    (0.2, RPOObjective.bco(0.1)),
    (1.0, RPOObjective.cpo(0.3, sft_weight=0.5)),
]
SUMS = {
    "DPO, BCO and CPO": MPO,
    "rewards and labels": [
        (0.5, RPOObjective("squared", 0.3, average=True)),
        (2.0, RPOObjective.simpo()),
        (1.5, RPOObjective.robust_dpo()),
    ],
    "several references": [
        (0.3, RPOObjective("forward_kl", 0.2, reference="harmonic", sft_weight=0.1)),
        (0.7, RPOObjective("hellinger", 0.2, comparison="pairwise", reference="harmonic")),
        (0.1, RPOObjective("squared", 0.2, reference="none", sft_normalizer="tokens")),
    ],
}


def batch(objective, ragged=False):
    labels = torch.randint(0, V, (S, T))
    labels[:, 0] = labels[3] = -100  # a prompt token each; a response without scored tokens
    whole = ObjectiveSum.of(objective)
    options = {"group_weights": torch.tensor([0.5, 2.0, 0.0, 1.0])}
    if whole.reference != "none":
        several = (2,) if whole.reference == "harmonic" else ()
        options["ref_logps"] = -4 * torch.rand(*several, S)
    if ragged:
        options["cu_groups"] = torch.tensor([0, 1, 4, 6, 8], dtype=torch.int32)
    return labels, torch.randn(S) if whole.uses_rewards else None, options


def double(options):
    return {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in options.items()
    }


@pytest.mark.parametrize("reduction", ["mean", "none", "normalizer"])
@pytest.mark.parametrize("name", SUMS)
def test_preference_loss_of_sums_equals_the_reference(name, reduction, backend, device):
    objective = SUMS[name]
    labels, rewards, options = batch(objective, ragged=name != "rewards and labels")
    how = {"normalizer": 1.7} if reduction == "normalizer" else {"reduction": reduction}
    logps, lengths = -5 * torch.rand(S), (labels != -100).sum(1)
    logps, leaf = logps.requires_grad_(), logps.double().detach().requires_grad_()
    ours = preference_loss(
        logps, rewards, objective, lengths=lengths, backend=backend, **how, **options
    )
    truth = reference.preference_loss(
        leaf, rewards, objective, lengths=lengths, **how, **double(options)
    )
    upstream = torch.rand(truth.loss.shape, dtype=torch.float64)
    truth.loss.backward(upstream)
    ours.loss.backward(upstream.float())
    for field in ("loss", "losses", "rewards", "targets"):
        assert worst(getattr(ours, field), getattr(truth, field)) < 1e-6
    assert worst(logps.grad, leaf.grad) < 1e-6
    summed = torch.stack([part.losses for part in ours.parts.values()]).sum(0)
    assert worst(summed, truth.losses) < 1e-6
    if reduction != "none":
        assert worst(sum(part.loss for part in ours.parts.values()), truth.loss) < 1e-6


@pytest.mark.parametrize("workspace", [4 * V * 2, None], ids=["windows", "one window"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", SUMS)
def test_linear_rpo_loss_and_rpo_loss_of_sums_equal_the_reference(name, reduction, workspace):
    objective = SUMS[name]
    labels, rewards, options = batch(objective)
    hidden, weight = torch.randn(S, T, H), torch.randn(V, H) / 3
    leaves = [x.double().requires_grad_() for x in (hidden, weight)]
    truth = reference.linear_rpo_loss(
        *leaves, labels, rewards, objective, reduction=reduction, **double(options)
    )
    upstream = torch.rand(truth.loss.shape, dtype=torch.float64)
    truth.loss.backward(upstream)
    hidden.requires_grad_(), weight.requires_grad_()
    fused = linear_rpo_loss(
        hidden,
        weight,
        labels,
        rewards,
        objective,
        reduction=reduction,
        workspace_bytes=workspace,
        **options,
    )
    from_logits = rpo_loss(
        hidden @ weight.T, labels, rewards, objective, reduction=reduction, **options
    )
    for ours in (fused, from_logits):
        hidden.grad = weight.grad = None
        ours.loss.backward(upstream.float())
        for field in ("loss", "losses", "rewards", "logps", "targets"):
            assert worst(getattr(ours, field), getattr(truth, field)) < 2e-6
        for x, y in zip((hidden, weight), leaves):
            assert worst(x.grad, y.grad) < 2e-6
        assert ours.parts.keys() == fused.parts.keys()


def test_rpo_output_metrics_of_sums_have_those_of_each_part_under_its_name():
    labels, _, options = batch(MPO)
    del options["group_weights"]
    logits = torch.randn(S, T, V)
    out = rpo_loss(logits, labels, None, [*MPO, (0.1, RPOObjective.dpo(0.5))], **options)
    assert list(out.parts) == ["dpo", "bco", "cpo", "dpo_2"]
    metrics = out.metrics()
    alone = rpo_loss(logits, labels, None, RPOObjective.dpo(0.5), **options)
    assert torch.allclose(metrics["dpo_2/loss"], 0.1 * alone.loss)
    assert torch.equal(metrics["dpo_2/rewards/margins"], alone.metrics()["rewards/margins"])
    first = rpo_loss(logits, labels, None, MPO[0][1], **options).metrics()
    assert all(torch.equal(metrics[name], x) for name, x in first.items())
    total = sum(metrics[f"{name}/loss"] for name in out.parts)
    assert torch.allclose(total, out.loss)


def test_rpo_output_keeps_a_part_whose_own_name_is_anothers_second():
    labels, _, options = batch(MPO)
    own = replace(RPOObjective.dpo(0.7), name="dpo_2")
    parts = [(1.0, RPOObjective.dpo(0.1)), (1.0, RPOObjective.dpo(0.3)), (1.0, own)]
    out = rpo_loss(torch.randn(S, T, V), labels, None, parts, **options)
    assert list(out.parts) == ["dpo", "dpo_2", "dpo_2_2"]


def test_public_functions_of_sums_compile_with_weights_that_change():
    labels, _, options = batch(MPO)
    logits = torch.randn(S, T, V)

    def loss(x, weight):
        return rpo_loss(x, labels, None, [(1.0, MPO[0][1]), (weight, MPO[1][1])], **options).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for weight in (0.5, 0.6, 0.7):
        torch.testing.assert_close(compiled(logits, weight), loss(logits, weight))


def test_public_functions_of_sums_compile_into_one_graph():
    labels, rewards, options = batch(SUMS["rewards and labels"])

    def step(hidden, weight):
        return linear_rpo_loss(
            hidden, weight, labels, rewards, SUMS["rewards and labels"], **options
        ).loss

    leaves = torch.randn(S, T, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    ours, eager = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, step))
    assert all(torch.equal(a, b) for a, b in zip(ours, eager))


def test_objective_sums_survive_as_plain_values():
    assert from_plain(*as_plain(RPOObjective.dpo())) == RPOObjective.dpo()
    for objective in [*SUMS.values(), [(0.5, RPOObjective.dpo())]]:
        whole = ObjectiveSum.of(objective)
        again = from_plain(*as_plain(whole))
        assert again == whole and [x.name for x in again.parts] == [x.name for x in whole.parts]


@pytest.mark.parametrize(
    ("objective", "error", "message"),
    [
        ([], TypeError, "`objective` must be an RPOObjective, or pairs (weight, RPOObjective)"),
        ([RPOObjective.dpo()], TypeError, "or pairs (weight, RPOObjective) for a weighted sum"),
        ([(1.0, "dpo")], TypeError, "the parts must be RPOObjectives, got 'dpo'"),
        ([("a", RPOObjective.dpo())], TypeError, "`weight` must be a number, got 'a'"),
        ([(0, RPOObjective.dpo())], ValueError, "`weight` must be a finite number > 0, got 0"),
        (
            [(1, RPOObjective.dpo()), (1, RPOObjective(reference="harmonic"))],
            ValueError,
            "the parts must take the same kind of reference, got 'harmonic' and 'single'",
        ),
        (
            [(1, RPOObjective.bco()), (1, RPOObjective.dpo())],
            ValueError,
            "`group_size` must be at least 2 for comparison 'listwise', got 1",
        ),
    ],
)
def test_objective_sums_that_are_none_are_refused(objective, error, message):
    with pytest.raises(error) as raised:
        preference_loss(torch.randn(2), None, objective, ref_logps=torch.randn(2), group_size=1)
    assert str(raised.value).startswith("preference_loss: ") and message in str(raised.value)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ([1.0, 2.0], TypeError, "`group_weights` must be a torch.Tensor"),
        (torch.ones(3), ValueError, "one number per group, [G] = [2]; got [3]"),
        (torch.ones(2).int(), TypeError, "`group_weights` must be"),
        (torch.ones(2, requires_grad=True), ValueError, "pass group_weights.detach()"),
        (torch.tensor([1.0, float("nan")]), ValueError, "`group_weights` must be finite, got"),
    ],
)
def test_group_weights_that_do_not_fit_are_refused(weights, error, message):
    with pytest.raises(error) as raised:
        preference_loss(
            torch.randn(4),
            None,
            RPOObjective.simpo(),
            lengths=torch.ones(4).int(),
            group_weights=weights,
        )
    assert str(raised.value).startswith("preference_loss: ") and message in str(raised.value)
