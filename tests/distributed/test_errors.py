"""Errors and disagreements of one rank reach all ranks."""

from __future__ import annotations

from unittest import mock

import torch

from rpo_kernels import (
    RPOObjective,
    distributed,
    linear_rpo_loss,
    linear_token_logps,
    rpo_loss,
    token_logps,
)
from rpo_kernels.inputs import LogitTransform
from rpo_kernels.ops.token_logps import _token_logps

from .ranks import on_ranks
from .shards import H, V, batch, close, columns, raises


@on_ranks(2, 4)
def test_process_group_raises_the_error_of_one_rank_on_all(group):
    logits, labels, rewards, layout = batch()
    shard = logits[..., columns(group)].contiguous()
    last = group.rank() == group.size() - 1
    told = "" if last else f" (raised by rank {group.size() - 1} of `process_group`)"
    # before an operator runs (shapes), and in it (values)
    raises(
        ValueError,
        f"token_logps: `temperature` must be a finite number > 0 in float32, got 0{told}",
        token_logps,
        shard,
        labels,
        temperature=0 if last else 1,
        process_group=group,
    )
    raises(
        TypeError,
        f"rpo_loss: `labels` must be int64 or int32, got torch.float32; pass labels.long(){told}",
        rpo_loss,
        shard,
        labels.float() if last else labels,
        rewards,
        RPOObjective(),
        process_group=group,
        **layout,
    )
    bad = rewards.clone()
    bad[0] = float("nan") if last else 0
    raises(
        ValueError,
        f"rpo_loss: `rewards` must be numbers, got NaN at 0{told}",
        rpo_loss,
        shard,
        labels,
        bad,
        RPOObjective(),
        process_group=group,
        **layout,
    )
    weight = torch.randn(V, H)[columns(group)]
    raises(
        ValueError,
        f"linear_rpo_loss: `hidden` must be [..., H] with H = {H} as in `weight`",
        linear_rpo_loss,
        torch.randn(6, 5, H + last),
        weight,
        labels,
        rewards,
        RPOObjective(),
        process_group=group,
        **layout,
    )
    raises(
        ValueError,
        f"linear_rpo_loss: `rewards` must be numbers, got NaN at 0{told}",
        linear_rpo_loss,
        torch.randn(6, 5, H),
        weight,
        labels,
        bad,
        RPOObjective(),
        process_group=group,
        **layout,
    )
    # and the group still works
    close(token_logps(shard, labels, process_group=group), token_logps(logits, labels))


@on_ranks(2, 4)
def test_process_group_names_what_ranks_disagree_on(group):
    logits, labels, *_ = batch()
    shard, rank = logits[..., columns(group)].contiguous(), group.rank()
    own = labels.roll(rank)  # as a data-parallel group would have
    raises(
        ValueError,
        "must agree on the values of `labels`",
        token_logps,
        shard,
        own,
        process_group=group,
    )
    raises(
        ValueError,
        "did you pass the data-parallel group?",
        token_logps,
        shard,
        own,
        process_group=group,
    )
    raises(
        ValueError,
        "must agree on temperature, got [1.0, ",
        token_logps,
        shard,
        labels,
        temperature=1.0 + rank,
        process_group=group,
    )
    n = 5 - (rank == 1)
    raises(
        ValueError,
        "must agree on the number of `labels`, got [30, 24",
        token_logps,
        shard[:, :n],
        labels[:, :n],
        process_group=group,
    )
    outside = torch.where(labels == labels.max(), V, labels)
    raises(
        ValueError,
        f"`labels` must lie in [0, {V}) or be ignore_index -100, got {V}",
        token_logps,
        shard,
        outside,
        process_group=group,
    )


@on_ranks(2)
def test_process_group_of_another_type_or_with_on_logits_is_refused(group):
    raises(
        ValueError,
        "linear_token_logps: `on_logits` must be None with `process_group`",
        linear_token_logps,
        torch.randn(3, H),
        torch.randn(V, H),
        torch.zeros(3).long(),
        process_group=group,
        on_logits=print,
    )
    raises(
        TypeError,
        "token_logps: `process_group` must be a torch.distributed.ProcessGroup, got 'tp'",
        token_logps,
        torch.randn(3, V),
        torch.zeros(3).long(),
        process_group="tp",
    )


@on_ranks(2)
def test_process_group_reuses_agreements_while_a_cuda_graph_is_captured(group):
    """Captures need a GPU; what they change is that no rank may look at what another says."""
    logits, labels, *_ = batch()
    shard = logits[..., columns(group)].contiguous()
    with mock.patch.object(distributed, "_capturing", lambda: True):
        raises(
            RuntimeError,
            "token_logps: ranks cannot compare their arguments while a CUDA graph is captured; run "
            "the step once before",
            _token_logps._traced,
            shard,
            labels,
            LogitTransform(),
            False,
            False,
            "torch",
            group.group_name,
        )
    before = token_logps(shard, labels, process_group=group)
    with (
        mock.patch.object(distributed, "_capturing", lambda: True),
        mock.patch.object(distributed, "_exchange") as exchange,
    ):
        assert torch.equal(token_logps(shard, labels, process_group=group), before)
    exchange.assert_not_called()
