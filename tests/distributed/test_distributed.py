"""Several ranks of gloo equal one process: values and every gradient, and errors that reach all
ranks.

Each function below is a case that every rank runs (ranks.py); what it computes alone is the
truth for what it computes together with the others.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_gather_tensor_autograd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from rpo_kernels import (
    RPOObjective,
    checks,
    distributed,
    gather_responses,
    gemm,
    linear_rpo_loss,
    linear_token_logps,
    linear_token_logps_and_entropy,
    preference_loss,
    rpo_loss,
    sequence_logps,
    token_logps,
    token_logps_and_entropy,
)
from rpo_kernels.inputs import LogitTransform
from rpo_kernels.ops.token_logps import _token_logps

from . import ranks

ROOT = Path(__file__).parents[2]
CASES = {}
V = 13
# Columns per rank: uneven; on four ranks one of them has a single column, one none (as the last
# shard of a small DTensor).
SPLITS = {2: (5, 8), 4: (1, 8, 4, 0)}
INF = float("inf")


def case(*worlds):
    def register(function):
        CASES[function.__name__] = function, worlds or (2, 4)
        return function

    return register


def columns(group) -> slice:
    split = SPLITS[group.size()]
    first = sum(split[: group.rank()])
    return slice(first, first + split[group.rank()])


def close(ours: Tensor, truth: Tensor, bound: float = 1e-6) -> None:
    """Within 1e-6, relative to the largest entry where that exceeds 1."""
    torch.testing.assert_close(
        ours,
        truth,
        rtol=0,
        atol=bound * max(1.0, float(truth.abs().max()) if truth.numel() else 0.0),
    )


def same_on_all_ranks(x: Tensor, group) -> None:
    everyone = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(everyone, x.detach().contiguous(), group=group)
    assert all(torch.equal(x, other) for other in everyone)


def raises(error: type[Exception], text: str, call, *args, **kwargs) -> None:
    with pytest.raises(error) as raised:
        call(*args, **kwargs)
    assert text in str(raised.value), str(raised.value)


def batch(packed=False, ragged=False):
    """logits [S, T, V] or [N, V], labels, rewards, and what says how sequences and groups lie."""
    S, T = 6, 5
    logits, labels = torch.randn(S, T, V) * 3, torch.randint(0, V, (S, T))
    labels[0, 1:3] = labels[3] = -100  # a sequence without scored tokens
    logits[1, 0, labels[1, 0]] += 40  # a confident token
    layout = {"ref_logps": torch.randn(S)}
    if packed:
        logits, labels = logits.flatten(0, 1), labels.flatten()
        layout["cu_seqlens"] = torch.tensor([0, 7, 7, 12, 17, 25, 30], dtype=torch.int32)
    if ragged:
        layout["cu_groups"] = torch.tensor([0, 1, 4, 6], dtype=torch.int32)
    return logits, labels, torch.randn(S), layout


# ---- vocabulary-parallel logits ------------------------------------------------------------------


@case()
def log_probs_and_entropies_of_shards_are_those_of_the_whole_vocabulary_bit_for_bit_on_all_ranks(
    group,
):
    mine = columns(group)
    logits, labels, *_ = batch()
    weights = torch.randn(2, *labels.shape)
    for backend in ("torch", "triton"):
        for transform in ({}, {"softcap": 4.0, "temperature": 0.7, "logit_scale": 1.3}):
            whole, shard = (
                logits.clone().requires_grad_(),
                logits[..., mine].clone().requires_grad_(),
            )
            options = {"backend": backend, **transform}
            truth = token_logps_and_entropy(whole, labels, **options)
            ours = token_logps_and_entropy(shard, labels, process_group=group, **options)
            for a, b in zip(ours, truth):
                close(a, b)
                same_on_all_ranks(a, group)
            assert torch.equal(token_logps(shard, labels, process_group=group, **options), ours[0])
            dtruth, dours = (
                torch.autograd.grad((x[0] * weights[0] + x[1] * weights[1]).sum(), leaf)[0]
                for x, leaf in ((truth, whole), (ours, shard))
            )
            close(dours, dtruth[..., mine])


@case()
def confident_tokens_keep_their_digits_wherever_the_other_columns_lie(group):
    logits = torch.zeros(V, V)
    logits.fill_diagonal_(30.0)
    expected = -torch.log1p((V - 1) * torch.exp(torch.tensor(-30.0, dtype=torch.float64)))
    for backend in ("torch", "triton"):
        shard = logits[:, columns(group)].clone().requires_grad_()
        logps = token_logps(shard, torch.arange(V), process_group=group, backend=backend)
        assert ((logps.double() / expected - 1).abs() < 1e-5).all()
        logps.sum().backward()
        at_label = shard.grad[columns(group)].diagonal().double()
        assert ((at_label / -expected - 1).abs() < 1e-5).all()


@case()
def banned_columns_whole_banned_shards_infinities_and_nans_behave_as_in_log_softmax(group):
    logits = torch.randn(6, V)
    labels = torch.full((6,), 2)
    logits[0, :5] = -INF  # the first shard of two, the label among it
    labels[0] = 9
    logits[1, :5] = -INF  # the label banned
    logits[2] = -INF
    logits[2, 2] = 1.0  # all but the label banned
    logits[3] = -INF
    logits[4, -1] = INF
    logits[5, 0] = float("nan")
    expected = logits.double().log_softmax(1).gather(1, labels[:, None])[:, 0].float()
    for backend in ("torch", "triton"):
        ours = token_logps(
            logits[:, columns(group)].contiguous(), labels, process_group=group, backend=backend
        )
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@case()
def the_loss_from_shards_of_logits_equals_one_process_for_every_distance_and_layout(group):
    mine = columns(group)
    for i, distance in enumerate(("squared", "backward_kl", "forward_kl")):
        for comparison in ("listwise", "pairwise", "pointwise"):
            packed, ragged, reduction = (
                i == 1,
                comparison == "listwise",
                "none" if comparison == "pairwise" else "mean",
            )
            objective = RPOObjective(distance, beta=0.3, comparison=comparison, sft_weight=0.1)
            logits, labels, rewards, layout = batch(packed, ragged)
            whole, shard = (
                logits.clone().requires_grad_(),
                logits[..., mine].clone().requires_grad_(),
            )
            truth = rpo_loss(whole, labels, rewards, objective, reduction=reduction, **layout)
            ours = rpo_loss(
                shard,
                labels,
                rewards,
                objective,
                reduction=reduction,
                process_group=group,
                **layout,
            )
            for a, b in zip(ours[:6], truth[:6]):
                close(a.float(), b.float())
            same_on_all_ranks(ours.losses, group)
            upstream = torch.randn_like(truth.loss)
            dtruth, dours = (
                torch.autograd.grad(x.loss, leaf, upstream)[0]
                for x, leaf in ((truth, whole), (ours, shard))
            )
            close(dours, dtruth[..., mine])


@case(2)
def a_gradient_may_take_the_place_of_a_shard_of_logits(group):
    logits, labels, rewards, layout = batch()
    shard = logits[..., columns(group)].contiguous()
    grads = []
    for inplace in (False, True):
        leaf = shard.clone().requires_grad_()
        out = rpo_loss(
            leaf * 1,
            labels,
            rewards,
            RPOObjective(),
            inplace_backward=inplace,
            process_group=group,
            **layout,
        )
        grads.append(torch.autograd.grad(out.loss, leaf)[0])
    assert torch.equal(*grads)


@case()
def an_empty_batch_and_one_with_nothing_scored_do_not_hang(group):
    logits, labels, *_ = batch()
    shard = logits[..., columns(group)].contiguous().requires_grad_()
    nothing = token_logps(shard, torch.full_like(labels, -100), process_group=group)
    nothing.sum().backward()
    assert (nothing == 0).all() and (shard.grad == 0).all()
    assert token_logps(shard[:0], labels[:0], process_group=group).shape == (0, 5)


# ---- vocabulary-parallel heads -------------------------------------------------------------------

H, RANK = 6, 2


def head(tokens: tuple[int, ...]) -> dict[str, Tensor]:
    """The leaves of a whole head.

    Logits are small: their rounding, times their size, is the error of p in one process too.
    """
    return {
        "hidden": torch.randn(*tokens, H),
        "weight": torch.randn(V, H) / 3,
        "bias": torch.randn(V),
        "lora_hidden": torch.randn(*tokens, RANK),
        "lora_weight": torch.randn(V, RANK),
    }


def of_this_rank(leaves: dict[str, Tensor], group, frozen: bool = False) -> dict[str, Tensor]:
    trained = ("hidden", "lora_hidden") if frozen else leaves
    return {
        name: (x if "hidden" in name else x[columns(group)]).clone().requires_grad_(name in trained)
        for name, x in leaves.items()
    }


def same_gradients(ours: dict[str, Tensor], truth: dict[str, Tensor], group) -> None:
    for name, x in ours.items():
        if x.requires_grad:
            close(
                x.grad, truth[name].grad if "hidden" in name else truth[name].grad[columns(group)]
            )
        else:
            assert x.grad is None


ROW = V * 4
# Bytes of one row (every group in two sweeps), of a group or two, and of everything.
WORKSPACES = (ROW, 12 * ROW, None)


@case()
def linear_rpo_loss_of_shards_equals_one_process_for_every_distance_plan_and_trained_leaf(
    group,
):
    plans = itertools.cycle(itertools.product(WORKSPACES, (False, True)))
    for i, distance in enumerate(("squared", "backward_kl", "forward_kl")):
        for comparison in ("listwise", "pairwise", "pointwise"):
            packed, ragged, reduction = (
                i == 1,
                comparison == "listwise",
                "none" if comparison == "pointwise" else "mean",
            )
            objective = RPOObjective(distance, beta=0.3, comparison=comparison, sft_weight=0.1)
            workspace, frozen = next(plans)
            _, labels, rewards, layout = batch(packed, ragged)
            everything = head(labels.shape)
            if frozen:
                del everything["lora_hidden"], everything["lora_weight"]
            whole = {name: x.clone().requires_grad_() for name, x in everything.items()}
            mine = of_this_rank(everything, group, frozen)
            options = {"reduction": reduction, "softcap": 8.0, "temperature": 1.3, **layout}
            truth = linear_rpo_loss(
                labels=labels, rewards=rewards, objective=objective, **whole, **options
            )
            ours = linear_rpo_loss(
                labels=labels,
                rewards=rewards,
                objective=objective,
                **mine,
                **options,
                process_group=group,
                workspace_bytes=workspace,
            )
            for a, b in zip(ours[:6], truth[:6]):
                close(a.float(), b.float())
            same_on_all_ranks(ours.losses, group)
            upstream = torch.rand_like(truth.loss) + 0.5
            truth.loss.backward(upstream)
            ours.loss.backward(upstream)
            same_gradients(mine, whole, group)


@case()
def token_log_probs_and_entropies_of_shards_of_a_head_equal_one_process(group):
    _, labels, *_ = batch()
    weights = torch.randn(2, *labels.shape)
    for workspace, frozen, backend in [
        (ROW, False, "torch"),
        (None, False, "torch"),
        (ROW, True, "torch"),
        (8 * ROW, False, "triton"),
    ]:
        everything = head(labels.shape)
        if frozen:
            del everything["lora_hidden"], everything["lora_weight"]
        for function in (linear_token_logps, linear_token_logps_and_entropy):
            whole = {name: x.clone().requires_grad_() for name, x in everything.items()}
            mine = of_this_rank(everything, group, frozen)
            truth = function(labels=labels, **whole)
            ours = function(
                labels=labels,
                **mine,
                process_group=group,
                workspace_bytes=workspace,
                backend=backend,
            )
            truth, ours = ((x,) if isinstance(x, Tensor) else x for x in (truth, ours))
            for a, b in zip(ours, truth):
                close(a, b)
                same_on_all_ranks(a, group)
            for values in (truth, ours):
                sum((x * w).sum() for x, w in zip(values, weights)).backward()
            same_gradients(mine, whole, group)


@case()
def a_reference_of_equal_weights_has_log_ratios_of_zero_and_another_is_sharded_alike(
    group,
):
    _, labels, rewards, _ = batch()
    leaves = head(labels.shape)
    mine = of_this_rank(leaves, group)
    hidden, weight = mine["hidden"], mine["weight"]
    same = linear_rpo_loss(
        hidden,
        weight,
        labels,
        rewards,
        RPOObjective(),
        ref_hidden=hidden.detach(),
        process_group=group,
    )
    assert (same.rewards == 0).all()
    other = torch.randn(V, H + 2)
    ref = {"ref_hidden": torch.randn(*labels.shape, H + 2)}
    truth = linear_rpo_loss(
        leaves["hidden"], leaves["weight"], labels, rewards, RPOObjective(), ref_weight=other, **ref
    )
    ours = linear_rpo_loss(
        hidden,
        weight,
        labels,
        rewards,
        RPOObjective(),
        ref_weight=other[columns(group)],
        process_group=group,
        **ref,
    )
    close(ours.loss, truth.loss)


@case()
def the_gradient_of_hidden_states_is_left_in_parts_or_scattered_if_the_caller_says_so(group):
    _, labels, rewards, layout = batch()
    labels, T = labels[:, :4], 4
    leaves = {name: x for name, x in head((6, T)).items() if name in ("hidden", "weight")}
    whole = {name: x.clone().requires_grad_() for name, x in leaves.items()}
    linear_rpo_loss(
        labels=labels, rewards=rewards, objective=RPOObjective(), **whole, **layout
    ).loss.backward()
    mine = of_this_rank(leaves, group)
    options = {
        "labels": labels,
        "rewards": rewards,
        "objective": RPOObjective(),
        "process_group": group,
        **layout,
    }
    linear_rpo_loss(**mine, **options, reduce_dhidden=False).loss.backward()
    if group.size() == 2:  # on four ranks one has no columns
        assert (mine["hidden"].grad - whole["hidden"].grad).abs().max() > 1e-3
    dist.all_reduce(mine["hidden"].grad, group=group)
    same_gradients(mine, whole, group)
    # sequence parallelism: hidden states arrive in pieces, and so do their gradients
    pieces = slice(group.rank() * T // group.size(), (group.rank() + 1) * T // group.size())
    piece, weight = (
        leaves["hidden"][:, pieces].clone().requires_grad_(),
        leaves["weight"][columns(group)],
    )
    gathered = all_gather_tensor_autograd(piece.transpose(0, 1).contiguous(), 0, group).transpose(
        0, 1
    )
    linear_rpo_loss(gathered, weight, **options, reduce_dhidden=False).loss.backward()
    close(piece.grad, whole["hidden"].grad[:, pieces])


@case(2)
def the_sum_of_a_chunks_hidden_gradients_begins_before_the_next_gemm_and_is_waited_for_at_the_end(
    group,
):
    _, labels, rewards, layout = batch()
    events = []

    def noted(event, function):
        return lambda *args, **kwargs: (events.append(event), function(*args, **kwargs))[1]

    def start_sum(x, name, start=distributed.start_sum):
        events.append("sum")
        return noted("wait", start(x, name))

    gemms = {
        name: noted(name, getattr(gemm, name))
        for name in ("project", "backproject", "weight_gradient")
    }
    for frozen in (False, True):
        mine = of_this_rank(
            {name: x for name, x in head(labels.shape).items() if "lora" not in name}, group, frozen
        )
        shared = {"labels": labels, "process_group": group, "workspace_bytes": 4 * ROW, **mine}
        for call in (
            lambda **options: (
                linear_rpo_loss(rewards=rewards, objective=RPOObjective(), **layout, **options).loss
            ),
            lambda **options: linear_token_logps(**options).sum(),
        ):
            events.clear()
            with (
                mock.patch.multiple(gemm, **gemms),
                mock.patch.object(distributed, "start_sum", start_sum),
            ):
                call(**shared).backward()
            assert events.count("sum") == events.count("wait") >= 1
            assert frozen or "weight_gradient" in events[events.index("sum") :]
            assert set(events[events.index("wait") :]) == {"wait"}
            same_on_all_ranks(mine["hidden"].grad, group)


@case()
def a_buffer_takes_in_the_gradient_of_a_shard_of_the_weight(group):
    _, labels, rewards, layout = batch()
    leaves = {name: x for name, x in head(labels.shape).items() if name in ("hidden", "weight")}
    grads = []
    for into in (False, True):
        mine = of_this_rank(leaves, group)
        buffer = torch.ones_like(mine["weight"]) if into else None
        linear_rpo_loss(
            labels=labels,
            rewards=rewards,
            objective=RPOObjective(),
            process_group=group,
            weight_grad=buffer,
            **mine,
            **layout,
        ).loss.backward()
        grads.append(buffer - 1 if into else mine["weight"].grad)
    close(*grads)


@case(2)
def sixteen_bit_heads_sum_hidden_gradients_in_their_dtype(group):
    _, labels, rewards, layout = batch()
    leaves = {
        name: x.bfloat16() for name, x in head(labels.shape).items() if name in ("hidden", "weight")
    }
    whole = {name: x.clone().requires_grad_() for name, x in leaves.items()}
    mine = of_this_rank(leaves, group)
    shared = {"labels": labels, "rewards": rewards, "objective": RPOObjective(), **layout}
    truth = linear_rpo_loss(**whole, **shared)
    ours = linear_rpo_loss(**mine, **shared, process_group=group)
    close(ours.loss, truth.loss)
    truth.loss.backward(), ours.loss.backward()
    for name, x in mine.items():
        other = whole[name].grad if name == "hidden" else whole[name].grad[columns(group)]
        close(x.grad.float(), other.float(), 2**-7)  # each part and their sum are rounded to bf16


# ---- errors --------------------------------------------------------------------------------------


@case()
def a_rank_that_raises_makes_all_raise_with_its_message(group):
    logits, labels, rewards, layout = batch()
    shard = logits[..., columns(group)].contiguous()
    last = group.rank() == group.size() - 1
    told = "" if last else f" (raised by rank {group.size() - 1} of `process_group`)"
    # before an operator runs (shapes), and in it (values)
    raises(
        ValueError,
        f"token_logps: `temperature` must be a finite number > 0, got 0{told}",
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


@case()
def ranks_that_disagree_all_learn_on_what(group):
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


@case(2)
def what_is_no_process_group_is_named_and_what_needs_whole_rows_is_refused(group):
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


@case(2)
def while_a_cuda_graph_is_captured_ranks_stand_by_what_they_agreed_before(group):
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


# ---- context and data parallelism ----------------------------------------------------------------


def parts(T: int, group) -> Tensor:
    """Positions of a sequence on this rank, as ring attention lays them: one piece from the front,
    one from the back.
    """
    pieces = torch.arange(T).chunk(2 * group.size())
    return torch.cat([pieces[group.rank()], pieces[-1 - group.rank()]])


@case()
def sequences_whose_tokens_lie_on_several_ranks_give_the_loss_and_gradients_of_one_process(group):
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


@case()
def sequences_of_several_ranks_keep_whole_groups_resident_and_equal_one_process(group):
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


@case()
def ranks_of_one_sequence_work_off_the_same_groups_and_learn_of_each_others_errors(group):
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


@case(4)
def a_vocabulary_may_be_sharded_over_two_ranks_and_sequences_over_two_others(group):
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


@case()
def a_rank_without_a_scored_token_of_a_sequence_does_not_hang(group):
    labels = torch.full((4, 3), -100)
    if group.rank() == 0:
        labels[:] = 1
    logits = torch.randn(4, 3, V, requires_grad=True)
    logps = sequence_logps(token_logps(logits, labels), process_group=group)
    preference_loss(logps, torch.randn(4), RPOObjective(reference="none")).loss.backward()
    assert (logits.grad != 0).any() == (group.rank() == 0)


@case()
def what_ranks_gather_has_no_forward_mode_derivatives(group):
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


@case()
def groups_whose_responses_lie_on_several_ranks_give_the_loss_and_gradients_of_one_process(group):
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


OBJECTIVES = [
    RPOObjective(
        distance, 0.3, comparison=comparison, average=distance == "squared", sft_weight=0.1
    )
    for distance, comparison in itertools.product(
        ("squared", "backward_kl", "forward_kl"), ("listwise", "pairwise", "pointwise")
    )
]


@case()
def ragged_groups_whose_responses_lie_anywhere_give_the_loss_and_gradients_of_one_process(group):
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


@case(2)
def offsets_of_groups_that_no_check_has_seen_give_nan_and_nothing_outside_is_read(group):
    """A GPU does not look at values."""
    for bad in ([0, 3, 5_000_000], [0, 7, 4], [-9, 2, 4], [0, 2, 3], [1, 2, 4]):
        with mock.patch.object(checks, "_may_look", lambda _: False):
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


@case()
def a_normalizer_makes_unequal_numbers_of_groups_a_global_mean(group):
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


# ---- DTensor and FSDP2 ---------------------------------------------------------------------------


def fsdp_batch(group):
    """Two groups for each rank; hidden states, labels, rewards of all and the slice of this
    rank.
    """
    R = group.size()
    hidden, labels, rewards = (
        torch.randn(4 * R, 5, H),
        torch.randint(0, V, (4 * R, 5)),
        torch.randn(4 * R),
    )
    labels[4:8] = -100  # rank 1 has nothing to score
    return hidden, labels, rewards, slice(4 * group.rank(), 4 * group.rank() + 4)


OBJECTIVE = RPOObjective(beta=0.5, reference="none")


def mean_of_ranks(hidden, weight, labels, rewards) -> Tensor:
    """The loss that data-parallel training of one process's batch in parts minimises."""
    parts = zip(*(x.split(4) for x in (hidden, labels, rewards)))
    return torch.stack(
        [linear_rpo_loss(h, weight, y, r, OBJECTIVE).loss for h, y, r in parts]
    ).mean()


@case()
def a_dtensor_weight_gets_the_exact_gradient_where_full_tensor_drops_the_other_ranks(
    group,
):
    R = group.size()
    mesh = init_device_mesh("cpu", (R,))
    hidden, labels, rewards, mine = fsdp_batch(group)
    weight = torch.randn(V, H)
    whole = weight.clone().requires_grad_()
    mean_of_ranks(hidden, whole, labels, rewards).backward()
    local = hidden[mine], labels[mine], rewards[mine]
    layouts = [(mesh, [Shard(0)]), (mesh, [Shard(1)]), (mesh, [Replicate()])]
    if R == 4:
        layouts.append((init_device_mesh("cpu", (2, 2)), [Replicate(), Shard(0)]))  # HSDP
    for where, placements in layouts:
        sharded = distribute_tensor(weight, where, placements).requires_grad_()
        linear_rpo_loss(local[0], sharded, *local[1:], OBJECTIVE).loss.backward()
        assert sharded.grad.placements == tuple(placements)
        close(sharded.grad.full_tensor(), whole.grad)
    plain = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    linear_rpo_loss(local[0], plain.full_tensor(), *local[1:], OBJECTIVE).loss.backward()
    wrong = (plain.grad.full_tensor() - whole.grad).norm() / whole.grad.norm()
    assert wrong > 0.1  # silently: this is what the others guard against
    raises(
        ValueError,
        "`weight_grad` must be None for a DTensor `weight`",
        linear_rpo_loss,
        local[0],
        plain,
        *local[1:],
        OBJECTIVE,
        weight_grad=torch.zeros(V, H),
    )


@case()
def fp32_masters_of_a_bf16_head_are_gathered_in_bf16_and_reduced_in_fp32(group):
    mesh = init_device_mesh("cpu", (group.size(),))
    hidden, labels, rewards, mine = fsdp_batch(group)
    hidden, weight = hidden.bfloat16(), torch.randn(V, H)
    grads = []
    for h, y, r in zip(*(x.split(4) for x in (hidden, labels, rewards))):
        leaf = weight.bfloat16().requires_grad_()
        linear_rpo_loss(h, leaf, y, r, OBJECTIVE).loss.backward()
        grads.append(leaf.grad.float())
    sharded = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    linear_rpo_loss(hidden[mine], sharded, labels[mine], rewards[mine], OBJECTIVE).loss.backward()
    assert sharded.grad.dtype == torch.float32
    close(sharded.grad.full_tensor(), torch.stack(grads).mean(0))


class Model(torch.nn.Module):
    """Embedding, a layer, a head; the loss inside forward or outside it."""

    def __init__(self, tied: bool):
        super().__init__()
        self.embedding, self.layer = torch.nn.Embedding(V, H), torch.nn.Linear(H, H)
        self.norm, self.lm_head = torch.nn.LayerNorm(H), torch.nn.Linear(H, V, bias=False)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def hidden(self, ids):
        return self.norm(self.layer(self.embedding(ids)).tanh())

    def forward(self, ids, labels=None, rewards=None):
        hidden = self.hidden(ids)
        return (
            hidden
            if labels is None
            else linear_rpo_loss(hidden, self.lm_head.weight, labels, rewards, OBJECTIVE).loss
        )


@case()
def an_fsdp2_model_trains_like_one_process_whatever_unit_its_head_is_in_and_wherever_the_loss_is(
    group,
):
    mesh = init_device_mesh("cpu", (group.size(),))
    _, labels, rewards, mine = fsdp_batch(group)
    ids = torch.randint(0, V, labels.shape)
    for unit, tied, inside in [
        ("own", False, False),
        ("tail", False, True),
        ("root", True, True),
        ("root", True, False),
    ]:
        torch.manual_seed(1)
        model = Model(tied)
        whole = copy.deepcopy(model)
        mean_of_ranks(whole(ids), whole.lm_head.weight, labels, rewards).backward()
        if unit == "own":
            fully_shard(model.lm_head, mesh=mesh)
        elif unit == "tail":
            fully_shard([model.norm, model.lm_head], mesh=mesh)
        fully_shard(model, mesh=mesh)
        if inside:  # forward hooks show plain parameters
            loss = model(ids[mine], labels[mine], rewards[mine])
        else:
            loss = linear_rpo_loss(
                model(ids[mine]), model.lm_head.weight, labels[mine], rewards[mine], OBJECTIVE
            ).loss
        loss.backward()
        for x, y in zip(model.parameters(), whole.parameters()):
            close(x.grad.full_tensor(), y.grad)


@case()
def tensors_of_dtensor_parallelism_bring_their_group_and_their_layout_back(group):
    """Logits of a column-parallel head (loss parallelism), and hidden states beside a sharded
    weight.
    """
    mesh = init_device_mesh("cpu", (group.size(),))
    logits, labels, rewards, layout = batch()
    whole = logits.clone().requires_grad_()
    truth = rpo_loss(whole, labels, rewards, RPOObjective(), **layout).loss
    truth.backward()
    shard = distribute_tensor(logits, mesh, [Shard(2)]).requires_grad_()
    ours = rpo_loss(shard, labels, rewards, RPOObjective(), **layout).loss
    ours.backward()
    close(ours, truth)
    close(shard.grad.full_tensor(), whole.grad)
    leaves = {
        name: x for name, x in head(labels.shape).items() if name in ("hidden", "weight", "bias")
    }
    whole = {name: x.clone().requires_grad_() for name, x in leaves.items()}
    linear_rpo_loss(
        labels=labels, rewards=rewards, objective=RPOObjective(), **whole, **layout
    ).loss.backward()
    for placement in (Replicate(), Shard(1)):  # Shard(1): sequence parallelism
        mine = {
            name: distribute_tensor(
                x, mesh, [placement if name == "hidden" else Shard(0)]
            ).requires_grad_()
            for name, x in leaves.items()
        }
        linear_rpo_loss(
            labels=labels, rewards=rewards, objective=RPOObjective(), **mine, **layout
        ).loss.backward()
        for name, x in mine.items():
            assert x.grad.placements == x.placements
            close(x.grad.full_tensor(), whole[name].grad)


@case(4)
def a_vocabulary_may_be_sharded_over_one_dimension_of_a_mesh_and_its_shards_over_the_other(group):
    """Two data-parallel ranks (FSDP2) of two tensor-parallel ones."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    dp, tp = mesh["dp"].get_local_rank(), mesh["tp"].get_group()
    hidden, labels, rewards = torch.randn(8, 5, H), torch.randint(0, V, (8, 5)), torch.randn(8)
    layer, whole = torch.nn.Linear(H, V, bias=False), torch.nn.Linear(H, V, bias=False)
    whole.load_state_dict(layer.state_dict())
    mean_of_ranks(hidden, whole.weight, labels, rewards).backward()
    layer.weight = torch.nn.Parameter(
        distribute_tensor(layer.weight.detach(), mesh["tp"], [Shard(0)])
    )
    fully_shard(layer, mesh=mesh["dp"])
    mine = slice(4 * dp, 4 * dp + 4)
    linear_rpo_loss(
        hidden[mine], layer.weight, labels[mine], rewards[mine], OBJECTIVE, process_group=tp
    ).loss.backward()
    close(layer.weight.grad.full_tensor(), whole.weight.grad)


# ---- torch.compile, checkpointing, autocast ------------------------------------------------------


@case(2)
def each_public_function_compiles_into_one_graph_that_serves_every_number_of_tokens(group):
    weight, objective = (
        (torch.randn(V, H) / 3)[columns(group)].clone().requires_grad_(),
        RPOObjective(),
    )

    def step(hidden, weight, labels, rewards, ref_logps):
        hidden = hidden.tanh()
        z = hidden @ weight.t()
        logps, entropies = token_logps_and_entropy(z, labels, process_group=group)
        logps = logps + token_logps(z, labels, process_group=group)
        shared = {"ref_logps": ref_logps, "normalizer": 0.5 * len(rewards), "process_group": group}
        loss = rpo_loss(z, labels, rewards, objective, **shared).loss
        loss = loss + linear_rpo_loss(hidden, weight, labels, rewards, objective, **shared).loss
        each = linear_rpo_loss(
            hidden,
            weight,
            labels,
            rewards,
            objective,
            ref_logps=ref_logps,
            reduction="none",
            process_group=group,
        )
        loss = loss + each.loss.square().mean()
        loss = loss + linear_token_logps(hidden, weight, labels, process_group=group).sum()
        lp, h = linear_token_logps_and_entropy(hidden, weight, labels, process_group=group)
        sums = gather_responses(
            sequence_logps(logps * entropies + lp * h, process_group=group), process_group=group
        )
        return loss + sums.square().mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for S, T in ((4, 3), (8, 7), (10, 5)):
            inputs = (
                torch.randn(S, T, H, requires_grad=True),
                weight,
                torch.randint(0, V, (S, T)),
                torch.randn(S),
                torch.randn(S),
            )
            for a, b in zip(
                *(torch.autograd.grad(f(*inputs), inputs[:2]) for f in (compiled, step))
            ):
                close(a, b)
    labels = inputs[2].clone()
    labels[0, 0] = V if group.rank() else 0  # found when the graph runs
    raises(ValueError, "labels", compiled, inputs[0], weight, labels, *inputs[3:])


@case(2)
def linear_token_logps_keeps_what_each_shard_has_room_for_in_graphs_too(group):
    """Chunks of two rows are the same on all ranks; how many rows of P wait is not."""
    width, rows = SPLITS[2][group.rank()], 24
    hidden, labels = torch.randn(rows, H, requires_grad=True), torch.randint(0, V, (rows,))
    weight = torch.randn(V, H)[columns(group)].clone().requires_grad_()
    budget = 10 * 4 * max(SPLITS[2])
    dropped = rows - (budget // (4 * width) // 2 * 2 - 2)

    def step(hidden, weight):
        logps = linear_token_logps(
            hidden, weight, labels, process_group=group, workspace_bytes=budget
        )
        return logps.sin().sum()

    results = []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch("rpo_kernels.ops.head.CPU_CHUNK_ROWS", 2))
            project, backproject, gradient = (
                stack.enter_context(mock.patch.object(gemm, name, wraps=getattr(gemm, name)))
                for name in ("project", "backproject", "weight_gradient")
            )
            results.append(torch.autograd.grad(f(hidden, weight), (hidden, weight)))
        done = [sum(len(x.args[0]) for x in calls.call_args_list) for calls in (project, gradient)]
        assert done == [rows + dropped, rows], (done, dropped)
        assert sum(len(x.args[0]) for x in backproject.call_args_list) == rows
    for a, b in zip(*results):
        close(a, b)


@case(2)
def graphs_hold_dtensors_contexts_and_gathers_whose_size_only_the_ranks_know(group):
    mesh, objective = init_device_mesh("cpu", (2,)), RPOObjective(reference="none")
    weight = distribute_tensor(
        torch.randn(V, H), mesh, [Shard(0)]
    ).requires_grad_()  # as FSDP2 shards it

    def step(hidden, weight, logits, labels, rewards, equal, cu_groups):
        loss = linear_rpo_loss(hidden, weight, labels, rewards, objective).loss
        loss = (
            loss
            + linear_rpo_loss(hidden, weight, labels, equal, objective, context_group=group).loss
        )
        logps = token_logps(logits, labels) + linear_token_logps(hidden, weight, labels)
        gathered, everyone = gather_responses(
            sequence_logps(logps), cu_groups=cu_groups, process_group=group
        )
        rewards, _ = gather_responses(rewards, cu_groups=cu_groups, process_group=group)
        torch._check(rewards.shape[0] == gathered.shape[0])
        return loss + preference_loss(gathered, rewards, objective, cu_groups=everyone).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for S, T in ((4, 5), (8, 9), (10, 2)):
            logits = distribute_tensor(torch.randn(S, T, V), mesh, [Shard(2)]).requires_grad_()
            leaves = torch.randn(S, T, H, requires_grad=True), weight, logits
            rest = (
                torch.randint(0, V, (S, T)),
                *torch.randn(2, S),
                torch.tensor([0, 2 + group.rank(), S], dtype=torch.int32),
            )
            for a, b in zip(
                *(torch.autograd.grad(f(*leaves, *rest), leaves) for f in (compiled, step))
            ):
                assert type(a) is type(b)
                close(*(x.full_tensor() if isinstance(x, DTensor) else x for x in (a, b)))


@case(2)
def checkpoints_and_autocast_change_nothing(group):
    _, labels, rewards, layout = batch()
    leaves = {name: x for name, x in head(labels.shape).items() if name in ("hidden", "weight")}
    mine = of_this_rank(leaves, group)

    def loss(hidden, weight):
        shared = {"labels": labels, "process_group": group}
        out = linear_rpo_loss(
            hidden, weight, rewards=rewards, objective=RPOObjective(), **shared, **layout
        ).loss
        return out + linear_token_logps(hidden, weight, **shared).sum()

    plain = torch.autograd.grad(loss(*mine.values()), list(mine.values()))
    again = torch.autograd.grad(
        checkpoint(loss, *mine.values(), use_reentrant=False), list(mine.values())
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, again))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = loss(*mine.values())
    whole = {name: x.clone().requires_grad_() for name, x in leaves.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        truth = linear_rpo_loss(
            labels=labels, rewards=rewards, objective=RPOObjective(), **whole, **layout
        ).loss
        truth = truth + linear_token_logps(labels=labels, **whole).sum()
    close(total, truth)
    total.backward(), truth.backward()
    for name, x in mine.items():
        other = whole[name].grad if name == "hidden" else whole[name].grad[columns(group)]
        assert x.grad.dtype == torch.float32
        close(x.grad, other, 2**-7)  # dlogits are rounded to bf16


# ---- the tests -----------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 4])
def test_several_ranks_equal_one_process(world, tmp_path, subtests):
    failures = ranks.run(__name__, world, tmp_path)
    assert set(failures) == {name for name, (_, worlds) in CASES.items() if world in worlds}
    for name, failure in failures.items():
        with subtests.test(name.replace("_", " ")):
            assert not failure, "\n".join(failure)


def test_the_example_trains_under_torchrun_and_agrees_with_one_rank():
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
    }
    environment.pop("TRITON_INTERPRET", None)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    program = [
        str(ROOT / "examples" / "tensor_parallel.py"),
        "--steps",
        "11",
        "--vocabulary",
        "101",
    ]
    done = subprocess.run(
        [*launch, *program], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    losses = [float(x) for x in re.findall(r"loss (\S+),", done.stdout)]
    assert len(losses) == 2 and losses[1] < losses[0] / 2, done.stdout
    assert (
        float(re.search(r"2 ranks of 50 rows on cpu: .* by (\S+) at most", done.stdout)[1]) < 1e-5
    ), done.stdout
