"""Heads sharded over the vocabulary: several ranks equal one process."""

from __future__ import annotations

import itertools
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_gather_tensor_autograd

from rpo_kernels import (
    RPOObjective,
    distributed,
    gemm,
    linear_rpo_loss,
    linear_token_logps,
    linear_token_logps_and_entropy,
)

from .ranks import on_ranks
from .shards import (
    ROW,
    WORKSPACES,
    H,
    V,
    batch,
    close,
    columns,
    head,
    of_this_rank,
    same_gradients,
    same_on_all_ranks,
)


@on_ranks(2, 4)
def test_linear_rpo_loss_of_shards_equals_one_process_for_every_distance_plan_and_trained_leaf(
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


@on_ranks(2, 4)
def test_linear_token_logps_and_entropy_of_shards_equal_one_process(group):
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


@on_ranks(2, 4)
def test_linear_rpo_loss_of_shards_takes_reference_heads(
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


@on_ranks(2, 4)
def test_linear_rpo_loss_leaves_the_sum_of_hidden_gradients_to_the_caller(group):
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


@on_ranks(2)
def test_linear_functions_sum_hidden_gradients_while_the_next_gemm_runs(
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


@on_ranks(2, 4)
def test_linear_rpo_loss_adds_the_gradient_of_a_shard_to_weight_grad(group):
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


@on_ranks(2)
def test_linear_rpo_loss_of_16_bit_shards_sums_hidden_gradients_in_their_dtype(group):
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
