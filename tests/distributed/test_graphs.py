"""torch.compile, checkpoints and autocast on several ranks."""

from __future__ import annotations

import contextlib
from unittest import mock

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from rpo_kernels import (
    RPOObjective,
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

from .ranks import on_ranks
from .shards import SPLITS, H, V, batch, close, columns, head, of_this_rank, raises


@on_ranks(2)
def test_public_functions_of_shards_compile_into_one_dynamic_graph(group):
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


@on_ranks(2)
def test_linear_token_logps_keeps_what_each_shard_has_room_for_in_graphs_too(group):
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


@on_ranks(2)
def test_public_functions_of_dtensors_contexts_and_gathers_compile_into_one_graph(group):
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


@on_ranks(2)
def test_linear_functions_of_shards_under_checkpoint_and_autocast(group):
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
