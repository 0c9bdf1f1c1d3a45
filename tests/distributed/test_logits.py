"""Logits sharded over the vocabulary: several ranks equal one process."""

from __future__ import annotations

import torch

from rpo_kernels import (
    RPOObjective,
    rpo_loss,
    token_logps,
    token_logps_and_entropy,
)

from .ranks import on_ranks
from .shards import INF, V, batch, close, columns, same_on_all_ranks


@on_ranks(2, 4)
def test_token_logps_and_entropy_of_shards_are_those_of_whole_rows_and_equal_on_all_ranks(
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


@on_ranks(2, 4)
def test_token_logps_of_shards_keep_the_digits_of_confident_tokens(group):
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


@on_ranks(2, 4)
def test_token_logps_of_shards_treat_infinities_and_nans_as_log_softmax_does(group):
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


@on_ranks(2, 4)
def test_rpo_loss_of_shards_equals_one_process_for_every_distance_and_layout(group):
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


@on_ranks(2)
def test_rpo_loss_of_shards_writes_gradients_in_place(group):
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


@on_ranks(2, 4)
def test_token_logps_of_shards_of_empty_and_unscored_batches_do_not_hang(group):
    logits, labels, *_ = batch()
    shard = logits[..., columns(group)].contiguous().requires_grad_()
    nothing = token_logps(shard, torch.full_like(labels, -100), process_group=group)
    nothing.sum().backward()
    assert (nothing == 0).all() and (shard.grad == 0).all()
    assert token_logps(shard[:0], labels[:0], process_group=group).shape == (0, 5)
