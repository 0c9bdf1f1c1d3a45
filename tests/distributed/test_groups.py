"""Groups whose responses lie on several ranks: several ranks equal one process."""

from __future__ import annotations

from unittest import mock

import torch
import torch.distributed as dist

from rpo_kernels import (
    RPOObjective,
    checks,
    gather_responses,
    preference_loss,
    sequence_logps,
)

from .ranks import on_ranks
from .shards import OBJECTIVES, close, raises, same_on_all_ranks


@on_ranks(2, 4)
def test_gather_responses_and_sequence_logps_raise_in_forward_mode(group):
    cu_groups = torch.tensor([0, 1, 4], dtype=torch.int32)
    x = torch.randn(4, 3)
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        for op, call, argument, layout in (
            ("sequence_logps", sequence_logps, x, {}),
            ("gather_responses", gather_responses, x[:, 0], {}),
            ("gather_responses", gather_responses, x[:, 0], {"cu_groups": cu_groups}),
        ):
            message = f"{op}: forward-mode derivatives are not implemented"
            raises(NotImplementedError, message, call, argument, process_group=group, **layout)


@on_ranks(2, 4)
def test_gather_responses_of_equal_groups_gives_the_loss_and_gradients_of_one_process(group):
    R, G, k = group.size(), 3, 2  # each rank holds k responses of each of G groups
    objective = RPOObjective("forward_kl", 0.3)
    logps, rewards, ref_logps = torch.randn(3, G, R, k).unbind()
    whole = logps.clone().requires_grad_()
    loss = preference_loss(
        whole.flatten(),
        rewards.flatten(),
        objective,
        ref_logps=ref_logps.flatten(),
        group_size=R * k,
    ).loss
    loss.backward()
    mine = logps[:, group.rank()].flatten().requires_grad_()
    all_logps, all_rewards, all_refs = (
        gather_responses(x, group_size=k, process_group=group)
        for x in (mine, rewards[:, group.rank()].flatten(), ref_logps[:, group.rank()].flatten())
    )
    ours = preference_loss(
        all_logps, all_rewards, objective, ref_logps=all_refs, group_size=R * k
    ).loss
    ours.backward()
    assert torch.equal(ours, loss)
    same_on_all_ranks(ours, group)
    close(mine.grad, whole.grad[:, group.rank()].flatten())
    raises(
        ValueError,
        "gather_responses: the ranks of `process_group` must agree on the shape of what is "
        "gathered",
        gather_responses,
        torch.randn(3 + group.rank()),
        process_group=group,
    )


@on_ranks(2, 4)
def test_gather_responses_of_ragged_groups_gives_the_loss_and_gradients_of_one_process(group):
    """Ranks hold different numbers of responses of each group: none of some, and rank 1 none at
    all.
    """
    R, rank = group.size(), group.rank()
    held = torch.tensor([[3, 0, 1, 2], [0, 0, 0, 0], [1, 2, 0, 2], [0, 1, 4, 0]])[:R]  # [R, G]
    S = int(held.sum())
    owner = torch.cat([torch.arange(R).repeat_interleave(held[:, g]) for g in range(4)])
    cu_groups = torch.nn.functional.pad(held.sum(0).cumsum(0), (1, 0)).int()
    mine = torch.nn.functional.pad(held[rank].cumsum(0), (1, 0)).int()
    logps, rewards, ref_logps = torch.randn(3, S).unbind()
    lengths = torch.randint(0, 9, (S,))
    for objective in OBJECTIVES:
        whole = logps.clone().requires_grad_()
        truth = preference_loss(
            whole, rewards, objective, ref_logps=ref_logps, lengths=lengths, cu_groups=cu_groups
        )
        truth.loss.backward()
        own = logps[owner == rank].requires_grad_()
        (ours, everyone), *others = (
            gather_responses(x, cu_groups=mine, process_group=group)
            for x in (own, *(x[owner == rank] for x in (rewards, ref_logps, lengths)))
        )
        assert torch.equal(everyone, cu_groups) and all(
            torch.equal(x, cu_groups) for _, x in others
        )
        assert torch.equal(ours, logps) and torch.equal(others[2][0], lengths)
        out = preference_loss(
            ours,
            others[0][0],
            objective,
            ref_logps=others[1][0],
            lengths=others[2][0],
            cu_groups=everyone,
        )
        out.loss.backward()
        assert torch.equal(out.loss, truth.loss)
        assert torch.equal(own.grad, whole.grad[owner == rank])
    last = rank == R - 1
    told = "" if last else f" (raised by rank {R - 1} of `process_group`)"
    x = torch.randn(4)
    raises(
        ValueError,
        "gather_responses: `cu_groups` must begin at 0 and end at the number of responses, 4; got "
        f"0 and 5{told}",
        gather_responses,
        x,
        cu_groups=torch.tensor([0, 2, 4 + last]).int(),
        process_group=group,
    )
    raises(
        TypeError,
        "`cu_groups` must be int32 as in FlashAttention, got torch.int64; pass "
        f"cu_groups.int(){told}",
        gather_responses,
        x,
        cu_groups=torch.tensor([0, 2, 4], dtype=torch.int64 if last else torch.int32),
        process_group=group,
    )
    raises(
        ValueError,
        "gather_responses: the ranks of `process_group` must agree on the number of groups, got [",
        gather_responses,
        x,
        cu_groups=torch.tensor([0, 4] if last else [0, 2, 4]).int(),
        process_group=group,
    )


@on_ranks(2)
def test_gather_responses_of_unchecked_bad_offsets_gives_nan(group):
    """A GPU does not look at values."""
    for bad in ([0, 3, 5_000_000], [0, 7, 4], [-9, 2, 4], [0, 2, 3], [1, 2, 4]):
        with mock.patch.object(checks, "may_read", lambda _: False):
            x = torch.randn(4, requires_grad=True)
            logps, cu_groups = gather_responses(
                x, cu_groups=torch.tensor(bad).int(), process_group=group
            )
            loss = preference_loss(
                logps,
                logps.detach(),
                RPOObjective(reference="none"),
                cu_groups=cu_groups,
                backend="triton",
            ).loss
        assert loss.isnan()
        loss.backward()


@on_ranks(2, 4)
def test_preference_loss_with_a_normalizer_is_a_mean_over_all_ranks(group):
    """Data-parallel gradients are averaged over ranks; a local mean would weight the groups of
    short batches more.
    """
    R, rank = group.size(), group.rank()
    counts = [2 + 3 * r for r in range(R)]
    first = 2 * sum(counts[:rank])
    logps, rewards, scale = (
        torch.randn(2 * sum(counts)),
        torch.randn(2 * sum(counts)),
        torch.tensor(1.5, requires_grad=True),
    )
    objective = RPOObjective(beta=0.3, reference="none")
    loss = preference_loss(logps * scale, rewards, objective).loss
    loss.backward()
    mine, own = slice(first, first + 2 * counts[rank]), torch.tensor(1.5, requires_grad=True)
    groups = torch.tensor(float(counts[rank]))
    dist.all_reduce(groups, group=group)
    ours = preference_loss(logps[mine] * own, rewards[mine], objective, normalizer=groups / R).loss
    ours.backward()
    both = torch.stack([ours.detach(), own.grad])
    dist.all_reduce(both, group=group)
    close(both / R, torch.stack([loss.detach(), scale.grad]))
