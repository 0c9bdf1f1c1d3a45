"""What comes back: metrics against TRL's definitions written out, labels against a loop, sequence
sums against a loop.
"""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from rpo_kernels import (
    RPOObjective,
    RPOOutput,
    preference_loss,
    rpo_loss,
    sequence_logps,
    shift_labels,
    token_logps,
)

IGNORE = -100
RAGGED = [0, 3, 4, 4, 6, 10]  # groups of 3, 1, 0, 2 and 4 responses


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def made_of(rewards, targets, *, logps=None, lengths=None, cu_groups=None, group_size=2):
    """An output with these numbers, whatever computed them."""
    rewards, targets = torch.as_tensor(rewards), torch.as_tensor(targets)
    G = len(rewards) // group_size if cu_groups is None else len(cu_groups) - 1
    lengths = None if lengths is None else torch.as_tensor(lengths)
    logps = rewards - 10 if logps is None else torch.as_tensor(logps)
    cu_groups = None if cu_groups is None else ints(*cu_groups)
    return RPOOutput(torch.zeros(()), torch.zeros(G), rewards, logps, lengths, targets, cu_groups)


def test_rpo_output_names_implicit_rewards_apart_from_explicit_ones():
    out = made_of([1.0, 2.0], [0.0, 1.0])
    assert out.implicit_rewards is out.rewards


# ---- metrics of pairs ----------------------------------------------------------------------------


def test_rpo_output_metrics_of_pairs_are_those_of_trl(backend, device):
    """DPOTrainer: beta (logps - ref_logps) of the chosen and of the rejected half of the batch,
    then means.
    """
    chosen, rejected = torch.tensor([-20.0, -31.5, -18.0]), torch.tensor([-22.0, -30.0, -18.0])
    ref_chosen, ref_rejected = (
        torch.tensor([-21.0, -30.0, -19.0]),
        torch.tensor([-21.5, -31.0, -19.0]),
    )
    interleaved = [
        torch.stack(pair, 1).flatten().to(device)
        for pair in ((chosen, rejected), (ref_chosen, ref_rejected))
    ]
    out = preference_loss(
        interleaved[0], None, RPOObjective.dpo(beta=0.1), ref_logps=interleaved[1], backend=backend
    )

    chosen_rewards, rejected_rewards = 0.1 * (chosen - ref_chosen), 0.1 * (rejected - ref_rejected)
    expected = {
        "rewards/chosen": chosen_rewards.mean(),
        "rewards/rejected": rejected_rewards.mean(),
        "rewards/accuracies": (chosen_rewards > rejected_rewards)
        .float()
        .mean(),  # 1 of 3: the last pair is tied
        "rewards/margins": (chosen_rewards - rejected_rewards).mean(),
        "logps/chosen": chosen.mean(),
        "logps/rejected": rejected.mean(),
    }
    metrics = {name: value.cpu() for name, value in out.metrics().items()}
    torch.testing.assert_close(metrics, expected)
    assert expected["rewards/accuracies"] == pytest.approx(1 / 3)


def test_rpo_output_metrics_choose_the_larger_target_and_the_first_of_a_tie():
    rewards, targets = [1.0, 2.0, 3.0, 5.0, 7.0, 11.0], [0.5, 4.0, 4.0, 0.5, 2.0, 2.0]
    metrics = made_of(rewards, targets).metrics()
    assert metrics["rewards/chosen"].item() == pytest.approx((2 + 3 + 7) / 3)
    assert metrics["rewards/rejected"].item() == pytest.approx((1 + 5 + 11) / 3)
    assert metrics["rewards/accuracies"].item() == pytest.approx(1 / 3)
    assert metrics["logps/chosen"].item() == pytest.approx((2 + 3 + 7) / 3 - 10)


@pytest.mark.parametrize(
    "objective",
    [RPOObjective.dpo(), RPOObjective.dpo(label_smoothing=0.1), RPOObjective.robust_dpo()],
)
def test_rpo_output_metrics_without_rewards_choose_the_first_response(objective):
    """Hard, soft and out-of-range labels: targets of +-inf, of +-gap / 2, and NaN."""
    logps = torch.tensor([-1.0, -5.0, -3.0, -2.0])
    metrics = preference_loss(logps, None, objective, ref_logps=torch.zeros(4)).metrics()
    assert metrics["logps/chosen"].item() == -2.0 and metrics["logps/rejected"].item() == -3.5


def test_rpo_output_metrics_leave_out_pairs_without_two_scored_responses():
    rewards, targets = [1.0, 2.0, 50.0, -50.0, 4.0, 3.0], [1.0, 0.0] * 3
    metrics = made_of(rewards, targets, lengths=[5, 1, 0, 7, 2, 2]).metrics()
    assert metrics["rewards/margins"].item() == pytest.approx((-1 + 1) / 2)
    assert metrics["rewards/accuracies"].item() == 0.5
    assert all(x.isnan() for x in made_of(rewards, targets, lengths=[0, 1] * 3).metrics().values())


# ---- metrics of other groups ---------------------------------------------------------------------


def slow_metrics(out, bounds):
    """Pair by pair: what agreement and spread are."""
    ordered, agree, spreads, counted = 0, 0, [], []
    for first, last in itertools.pairwise(bounds):
        members = [i for i in range(first, last) if out.lengths is None or out.lengths[i] > 0]
        counted += members
        for i, j in itertools.permutations(members, 2):
            if out.targets[i] > out.targets[j]:
                ordered += 1
                agree += int(out.rewards[i] > out.rewards[j])
        if len(members) > 1:
            spreads.append(out.rewards[members].std())
    return {
        "rewards/mean": out.rewards[counted].mean(),
        "rewards/agreement": torch.tensor(agree / ordered),
        "rewards/spread": torch.stack(spreads).mean(),
        "logps/mean": out.logps[counted].mean(),
    }


@pytest.mark.parametrize(
    "lengths", [None, [3, 0, 2, 1, 4, 0, 5, 0, 1, 1]], ids=["all count", "some are dropped"]
)
@pytest.mark.parametrize(
    "bounds", [[0, 5, 10], RAGGED, [0, 2, 4, 6, 8, 10]], ids=["fives", "ragged", "pairs as ragged"]
)
def test_rpo_output_metrics_of_groups_are_those_of_a_double_loop(bounds, lengths):
    rewards = torch.randn(10)
    targets = torch.randint(3, (10,)).float()  # with ties, which no one can order
    rewards[1] = rewards[0]  # a tie of implicit rewards agrees with nothing
    targets[0], targets[1], targets[2] = 2, 1, 0
    uniform = bounds == [0, 5, 10]
    out = made_of(
        rewards, targets, lengths=lengths, cu_groups=None if uniform else bounds, group_size=5
    )
    torch.testing.assert_close(out.metrics(), slow_metrics(out, bounds))


def test_rpo_output_metrics_leave_out_dropped_responses():
    """What a sequence without scored tokens holds, NaN included, is nobody's mean."""
    rewards, nan = torch.tensor([1.0, 2.0, 3.0, 4.0]), float("nan")
    clean = made_of(rewards, rewards, lengths=[1, 0, 1, 1], group_size=4)
    dirty = clean._replace(
        rewards=torch.tensor([1.0, nan, 3.0, 4.0]), logps=torch.tensor([-9.0, nan, -7.0, -6.0])
    )
    torch.testing.assert_close(dirty.metrics(), clean.metrics())


@pytest.mark.parametrize(
    "cu_groups, group_size",
    [(None, 2), (None, 5), (RAGGED, None)],
    ids=["pairs", "fives", "ragged"],
)
@pytest.mark.parametrize("lengths", [None, [1] * 10])
def test_rpo_output_metrics_never_wait_for_the_device(cu_groups, group_size, lengths):
    """Tensors without values: whatever looked at one, or made a shape of one, would raise."""
    out = made_of(
        torch.randn(10),
        torch.randn(10),
        lengths=lengths,
        cu_groups=cu_groups,
        group_size=group_size,
    )
    with FakeTensorMode() as mode:
        fake = RPOOutput(*(None if x is None else mode.from_tensor(x) for x in out))
        assert all(x.shape == () for x in fake.metrics().values())


# ---- the output itself ---------------------------------------------------------------------------


def losses_of(device, backend, **options):
    logits = torch.randn(6, 3, 5, device=device, requires_grad=True)
    labels = torch.randint(5, (6, 3), device=device)
    labels[1, 0] = labels[2] = IGNORE
    rewards, ref_logps = torch.randn(6, device=device), torch.randn(6, device=device)
    shared = {"ref_logps": ref_logps, "backend": backend, **options}
    logps = sequence_logps(token_logps(logits, labels, backend=backend)).detach().requires_grad_()
    lengths = (labels != IGNORE).sum(1)
    yield rpo_loss(logits, labels, rewards, RPOObjective(), **shared), lengths
    yield preference_loss(logps, rewards, RPOObjective(), lengths=lengths, **shared), lengths


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "groups", [{"group_size": 3}, {"cu_groups": [0, 4, 6]}], ids=["threes", "ragged"]
)
def test_rpo_output_unpacks_and_only_its_loss_has_a_gradient(backend, device, reduction, groups):
    options = {
        name: ints(*x).to(device) if name == "cu_groups" else x for name, x in groups.items()
    }
    for out, expected in losses_of(device, backend, reduction=reduction, **options):
        loss, losses, rewards, logps, lengths, *_ = out
        assert loss.shape == ((2,) if reduction == "none" else ())
        assert losses.shape == (2,) and rewards.shape == logps.shape == out.targets.shape == (6,)
        assert (out.cu_groups is None) == ("group_size" in groups)
        torch.testing.assert_close(lengths.long(), expected)
        assert [name for name, x in out._asdict().items() if x is not None and x.requires_grad] == [
            "loss"
        ]
        assert all(x.dtype == torch.float32 for x in (loss, losses, rewards, logps, out.targets))
        assert not any(x.requires_grad for x in out.metrics().values())


def test_rpo_output_documents_its_fields():
    assert RPOOutput._fields[:5] == ("loss", "losses", "rewards", "logps", "lengths")
    assert all(f"{name}: " in inspect.getdoc(RPOOutput) for name in RPOOutput._fields)


# ---- labels --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "input_ids, mask, expected",
    [
        ([[7, 8, 9, 3]], [[0, 0, 1, 1]], [[IGNORE, 9, 3, IGNORE]]),  # prompt, then response
        (
            [[7, 8, 9], [7, 8, 0]],
            [[0, 1, 1], [0, 1, 0]],
            [[8, 9, IGNORE], [8, IGNORE, IGNORE]],
        ),  # padded on the right
        ([[0, 7, 8, 9]], [[0, 0, 1, 1]], [[IGNORE, 8, 9, IGNORE]]),  # padded on the left
        ([5, 6, 7], [1, 1, 1], [6, 7, IGNORE]),  # nothing predicts the first token
        ([[4]], [[1]], [[IGNORE]]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_shift_labels_gives_the_next_token_where_the_mask_scores_it(
    input_ids, mask, expected, dtype
):
    ids, mask = torch.tensor(input_ids), torch.tensor(mask, dtype=dtype)
    labels = shift_labels(ids, mask)
    assert labels.tolist() == expected and labels.dtype == ids.dtype
    assert ids.tolist() == input_ids  # not written to
    other = shift_labels(ids.int(), mask, ignore_index=-1)
    assert (
        other.tolist() == torch.where(labels == IGNORE, -1, labels).tolist()
        and other.dtype == torch.int32
    )


def test_shift_labels_of_packed_sequences_do_not_predict_each_other():
    """Three sequences, one of them empty; the mask would score the first token of the last one."""
    labels = shift_labels(
        torch.tensor([5, 6, 7, 8, 9]), torch.tensor([0, 1, 1, 1, 1]), cu_seqlens=ints(0, 3, 3, 5)
    )
    assert labels.tolist() == [6, 7, IGNORE, 9, IGNORE]
    first_empty = shift_labels(torch.tensor([5, 6, 7]), torch.ones(3), cu_seqlens=ints(0, 0, 2, 3))
    assert first_empty.tolist() == [6, IGNORE, IGNORE]
    nothing = torch.tensor([], dtype=torch.int64)  # of a rank that got no tokens
    assert shift_labels(nothing, nothing, cu_seqlens=ints(0, 0)).tolist() == []


def test_shift_labels_scores_what_shifted_logits_score(backend, device):
    logits, ids = torch.randn(2, 4, 5, device=device), torch.randint(5, (2, 4), device=device)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]], device=device)
    logps = token_logps(logits, shift_labels(ids, mask), backend=backend)
    shifted = (
        torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]
    )
    torch.testing.assert_close(logps, F.pad(shifted, (0, 1)))


# ---- sequences -----------------------------------------------------------------------------------

LABELS = torch.tensor([[1, 2, IGNORE], [IGNORE, IGNORE, IGNORE], [3, 4, 5], [IGNORE, 1, IGNORE]])


def slow_sequence_logps(sequences, labels, average):
    totals = []
    for lp, label in zip(sequences, labels):
        scored = [x for x, y in zip(lp, label) if y != IGNORE]
        totals.append(
            sum(scored, torch.zeros((), dtype=torch.float64))
            / (max(len(scored), 1) if average else 1)
        )
    return torch.stack(totals)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sequence_logps_are_those_of_a_loop(average, packed, dtype, device):
    """Value and gradient.

    Positions that are not scored hold NaN; one sequence has no scored token, one no token.
    """
    tokens = torch.where(LABELS == IGNORE, torch.nan, -3 * torch.rand(4, 3)).to(dtype)
    arguments, bounds = {"labels": LABELS.to(device), "average": average}, [0, 3, 6, 9, 12]
    if packed:
        tokens, bounds = tokens.flatten(), [0, 3, 6, 6, 11, 12]
        arguments |= {"labels": LABELS.flatten().to(device), "cu_seqlens": ints(*bounds).to(device)}
    ours, slow = tokens.to(device, copy=True).requires_grad_(), tokens.double().requires_grad_()
    split = [slice(*pair) for pair in itertools.pairwise(bounds)]
    out = sequence_logps(ours, **arguments)
    expected = slow_sequence_logps(
        [slow.flatten()[x] for x in split], [LABELS.flatten()[x] for x in split], average
    )
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.cpu(), expected.float())
    upstream = torch.randn(len(expected), dtype=torch.float64)
    out.backward(upstream.float().to(device))
    expected.backward(upstream)
    torch.testing.assert_close(ours.grad.cpu(), slow.grad.to(dtype))


def test_sequence_logps_without_labels_sum_everything():
    tokens = -torch.rand(2, 3)
    torch.testing.assert_close(sequence_logps(tokens), tokens.sum(1))
    torch.testing.assert_close(
        sequence_logps(tokens.flatten(), cu_seqlens=ints(0, 1, 6)),
        torch.stack([tokens[0, 0], tokens.sum() - tokens[0, 0]]),
    )


def test_sequence_logps_of_long_sequences_keep_their_digits():
    """2^16 tokens of -0.1 in float32: a running sum in that dtype would be off by more than 1e-3
    nats of 6,554.
    """
    tokens = torch.full((1, 1 << 16), -0.1)
    expected = float(tokens[0, 0].double() * (1 << 16))
    for out in (sequence_logps(tokens), sequence_logps(tokens[0], cu_seqlens=ints(0, 1 << 16))):
        assert out.item() == torch.tensor(expected).item()
