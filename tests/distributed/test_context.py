"""Sequences whose tokens lie on several ranks: several ranks equal one process."""

from __future__ import annotations

import functools
import itertools
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from rpo_kernels import (
    RPOObjective,
    gemm,
    linear_rpo_loss,
    preference_loss,
    rpo_loss,
    sequence_logps,
    token_logps,
)

from .ranks import on_ranks
from .shards import (
    OBJECTIVES,
    ROW,
    WORKSPACES,
    H,
    V,
    close,
    columns,
    head,
    of_this_rank,
    raises,
    same_on_all_ranks,
)


def parts(T: int, group) -> Tensor:
    """Positions of a sequence on this rank, as ring attention lays them: one piece from the front,
    one from the back.
    """
    pieces = torch.arange(T).chunk(2 * group.size())
    return torch.cat([pieces[group.rank()], pieces[-1 - group.rank()]])


@on_ranks(2, 4)
def test_sequence_logps_of_tokens_on_several_ranks_equal_one_process(group):
    for objective in (
        RPOObjective(beta=0.3),
        RPOObjective("squared", 0.3, average=True, sft_weight=0.1),
    ):
        S, T = 4, 16
        logits, labels, rewards, ref_logps = (
            torch.randn(S, T, V),
            torch.randint(0, V, (S, T)),
            torch.randn(S),
            torch.randn(S),
        )
        labels[:, :9] = -100  # some ranks score few tokens
        labels[2] = -100
        lengths = (labels != -100).sum(1)
        whole = logits.clone().requires_grad_()
        loss = rpo_loss(whole, labels, rewards, objective, ref_logps=ref_logps).loss
        loss.backward()
        here = parts(T, group)
        mine = logits[:, here].clone().requires_grad_()
        logps = sequence_logps(token_logps(mine, labels[:, here]), process_group=group)
        tokens = sequence_logps((labels[:, here] != -100).float(), process_group=group).int()
        assert torch.equal(tokens, lengths.int())
        ours = preference_loss(logps, rewards, objective, ref_logps=ref_logps, lengths=tokens).loss
        ours.backward()
        close(ours, loss)
        same_on_all_ranks(ours, group)
        close(mine.grad, whole.grad[:, here])
        average = sequence_logps(
            token_logps(mine, labels[:, here]),
            average=True,
            labels=labels[:, here],
            process_group=group,
        )
        close(average, sequence_logps(token_logps(whole, labels), average=True, labels=labels))


def held_by(group, N: int, idle: bool = False) -> Tensor:
    """Which of N packed tokens are this rank's: in no order; rank 1 has none of the second half, or
    none at all.
    """
    owner = torch.randint(0, group.size(), (N,), generator=torch.Generator().manual_seed(7))
    owner[0 if idle else N // 2 :][owner[0 if idle else N // 2 :] == 1] = 0
    return owner == group.rank()


def packed_batch():
    """Ten sequences of 47 tokens in ragged groups, per-token references."""
    cu_seqlens = torch.tensor([0, 6, 6, 13, 17, 22, 28, 33, 35, 41, 47], dtype=torch.int32)
    labels = torch.randint(0, V, (47,))
    labels[::5] = labels[13:17] = -100
    layout = {
        "cu_groups": torch.tensor([0, 3, 5, 9, 10], dtype=torch.int32),
        "ref_logps": torch.randn(47),
    }
    return labels, cu_seqlens, torch.randn(10), layout


def own_offsets(mine: Tensor, cu_seqlens: Tensor) -> Tensor:
    return torch.nn.functional.pad(mine.cumsum(0), (1, 0))[cu_seqlens.long()].int()


@on_ranks(2, 4)
def test_linear_rpo_loss_with_a_context_group_equals_one_process(group):
    """Context parallelism in three GEMMs, for every comparison, plan, kind of reference and set of
    trained leaves.
    """
    plans = itertools.cycle(
        itertools.product(WORKSPACES, (False, True), ("token", "sequence", "live"))
    )
    for objective in [
        *OBJECTIVES,
        RPOObjective(reference="harmonic"),
        RPOObjective(sft_weight=0.1, sft_normalizer="tokens"),
    ]:
        workspace, frozen, kind = next(plans)
        labels, cu_seqlens, rewards, layout = packed_batch()
        mine = held_by(group, 47, idle=objective.distance == "squared")
        everything = head(labels.shape)
        own_layout = dict(layout)
        if objective.reference == "harmonic":
            layout["ref_logps"] = torch.randn(2, 47)
            own_layout["ref_logps"] = layout["ref_logps"][:, mine]
        elif kind == "token":
            own_layout["ref_logps"] = layout["ref_logps"][mine]
        elif kind == "sequence":
            layout["ref_logps"] = own_layout["ref_logps"] = torch.randn(10)
        else:
            del layout["ref_logps"], own_layout["ref_logps"]
            layout["ref_hidden"] = torch.randn(47, H)
            own_layout["ref_hidden"] = layout["ref_hidden"][mine]
        trained = ("hidden", "lora_hidden") if frozen else everything
        whole = {name: x.clone().requires_grad_(name in trained) for name, x in everything.items()}
        own = {
            name: (x[mine] if "hidden" in name else x).clone().requires_grad_(name in trained)
            for name, x in everything.items()
        }
        shared = {
            "rewards": rewards,
            "objective": objective,
            "reduction": "none" if workspace is None and frozen else "mean",
        }
        truth = linear_rpo_loss(labels=labels, cu_seqlens=cu_seqlens, **whole, **shared, **layout)
        ours = linear_rpo_loss(
            labels=labels[mine],
            cu_seqlens=own_offsets(mine, cu_seqlens),
            workspace_bytes=workspace,
            context_group=group,
            **own,
            **shared,
            **own_layout,
        )
        for a, b in zip(ours[:6], truth[:6]):
            close(a.float(), b.float())
        same_on_all_ranks(ours.losses, group)
        upstream = torch.rand_like(truth.loss) + 0.5
        truth.loss.backward(upstream), ours.loss.backward(upstream)
        for name, x in own.items():
            if "hidden" in name:
                close(x.grad, whole[name].grad[mine])
            elif not frozen:
                dist.all_reduce(x.grad, group=group)
                close(x.grad, whole[name].grad)


@on_ranks(2, 4)
def test_linear_rpo_loss_with_a_context_group_makes_logits_once_and_shares_errors(group):
    labels, cu_seqlens, rewards, layout = packed_batch()
    mine, rank, R = held_by(group, 47), group.rank(), group.size()
    hidden, weight = torch.randn(47, H)[mine], torch.randn(V, H, requires_grad=True)
    objective = RPOObjective()
    own = {
        "cu_groups": layout["cu_groups"],
        "ref_logps": layout["ref_logps"][mine],
        "cu_seqlens": own_offsets(mine, cu_seqlens),
    }
    call = functools.partial(
        linear_rpo_loss, hidden, weight, labels[mine], context_group=group, workspace_bytes=16 * ROW
    )
    calls = {}
    for name in ("project", "weight_gradient"):
        calls[name] = mock.patch.object(gemm, name, wraps=getattr(gemm, name)).start()
    call(rewards, objective, **own).loss.backward()
    rows = int((labels[mine] != -100).sum())
    # none of them twice
    assert sum(len(x.args[0]) for x in calls["project"].call_args_list) == rows
    mock.patch.stopall()
    last = rank == R - 1
    told = "" if last else f" (raised by rank {R - 1} of `context_group`)"
    raises(
        ValueError,
        "linear_rpo_loss: `ref_logps` must be ",
        call,
        rewards,
        objective,
        **own | ({"ref_logps": None} if last else {}),
    )
    bad = rewards.clone()
    bad[0] = float("nan") if last else 0
    raises(
        ValueError,
        f"linear_rpo_loss: `rewards` must be numbers, got NaN at 0{told}",
        call,
        bad,
        objective,
        **own,
    )
    raises(
        ValueError,
        "the ranks of `context_group` must agree on the values of what belongs to sequences and "
        "groups",
        call,
        rewards + rank,
        objective,
        **own,
    )
    raises(
        ValueError,
        "`context_group` must be another group than `process_group`",
        call,
        rewards,
        objective,
        process_group=group,
        **own,
    )


@on_ranks(4)
def test_linear_rpo_loss_takes_a_process_group_and_a_context_group(group):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    cp, tp = mesh["cp"].get_group(), mesh["tp"].get_group()
    labels, cu_seqlens, rewards, layout = packed_batch()
    mine = held_by(cp, 47)
    everything = head(labels.shape)
    whole = {name: x.clone().requires_grad_() for name, x in everything.items()}
    truth = linear_rpo_loss(
        labels=labels,
        cu_seqlens=cu_seqlens,
        rewards=rewards,
        objective=RPOObjective(),
        **whole,
        **layout,
    )
    own = of_this_rank(
        {name: x[mine] if "hidden" in name else x for name, x in everything.items()}, tp
    )
    shared = {
        "rewards": rewards,
        "objective": RPOObjective(),
        "process_group": tp,
        "context_group": cp,
    }
    layout |= {"ref_logps": layout["ref_logps"][mine], "cu_seqlens": own_offsets(mine, cu_seqlens)}
    ours = linear_rpo_loss(labels=labels[mine], workspace_bytes=12 * ROW, **own, **shared, **layout)
    close(ours.loss, truth.loss)
    same_on_all_ranks(ours.losses, group)
    truth.loss.backward(), ours.loss.backward()
    for name, x in own.items():
        if "hidden" in name:
            close(x.grad, whole[name].grad[mine])
        else:
            dist.all_reduce(x.grad, group=cp)
            close(x.grad, whole[name].grad[columns(tp)])
    bad = rewards.clone()
    bad[0] = float("nan") if group.rank() == 3 else 0
    raises(
        ValueError,
        "linear_rpo_loss: `rewards` must be numbers, got NaN at 0",
        linear_rpo_loss,
        labels=labels[mine],
        **own,
        **shared | {"rewards": bad},
        **layout,
    )


@on_ranks(2, 4)
def test_sequence_logps_of_a_rank_without_scored_tokens_do_not_hang(group):
    labels = torch.full((4, 3), -100)
    if group.rank() == 0:
        labels[:] = 1
    logits = torch.randn(4, 3, V, requires_grad=True)
    logps = sequence_logps(token_logps(logits, labels), process_group=group)
    preference_loss(logps, torch.randn(4), RPOObjective(reference="none")).loss.backward()
    assert (logits.grad != 0).any() == (group.rank() == 0)
