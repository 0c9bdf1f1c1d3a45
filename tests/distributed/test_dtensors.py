"""DTensor and FSDP2: several ranks equal one process."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from rpo_kernels import (
    RPOObjective,
    linear_rpo_loss,
    rpo_loss,
)

from .ranks import on_ranks
from .shards import H, V, batch, close, head, raises


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


@on_ranks(2, 4)
def test_linear_rpo_loss_of_a_dtensor_weight_has_the_gradient_that_full_tensor_loses(
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


@on_ranks(2, 4)
def test_linear_rpo_loss_gathers_fp32_weights_in_bf16_and_reduces_gradients_in_fp32(group):
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


@on_ranks(2, 4)
def test_linear_rpo_loss_under_fsdp2_equals_one_process_whatever_unit_the_head_is_in(
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


@on_ranks(2, 4)
def test_rpo_loss_and_linear_rpo_loss_of_dtensors_return_gradients_in_their_layout(group):
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


@on_ranks(4)
def test_linear_rpo_loss_takes_a_weight_sharded_over_two_dimensions_of_a_mesh(group):
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
