"""Small tensors of several ranks put together, with gradients: sequences and groups that lie on more than one rank."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import checks, distributed
from .autograd import once_differentiable


@distributed.agreeing
def gather_responses(x: Tensor, *, process_group: ProcessGroup | None = None, group_size: int = 1) -> Tensor:
    """One number per response from all ranks, where each group's responses lie on several: what the group pass needs.

    Each rank holds ``group_size`` responses of every group, in the same order of groups. What comes back has ``R group_size``
    neighbouring responses per group, those of rank 0 first, and is equal on all R ranks. Of a group only these numbers travel.

        logps = gather_responses(sequence_logps(token_logps(...)), process_group=group)
        loss = preference_loss(logps, gather_responses(rewards, process_group=group), objective, group_size=R).loss

    Args:
        x: ``[S_r]``, of any dtype (log-probabilities, rewards, lengths); the same S_r on all ranks.
        process_group: the ranks (needed).
        group_size: responses of each group on this rank.

    Returns:
        ``[R S_r]``. Each rank is to compute the same loss from it; this rank's x then gets the gradient of that one loss, so
        gradients of parameters are sums over the ranks, not means. Second derivatives raise.

    Raises:
        ValueError, TypeError: for arguments that do not fit, on all ranks.
    """
    op = "gather_responses"
    if process_group is None:
        raise TypeError(f"{op}: `process_group` must be a torch.distributed.ProcessGroup, got None")
    distributed.group_name(op, process_group)
    checks.check_tensor(op, "x", x)
    if x.dim() != 1:
        raise ValueError(f"{op}: `x` must be one number per response, [S]; got {checks.shape_of(x)}")
    if isinstance(group_size, bool) or not isinstance(group_size, int):
        raise TypeError(f"{op}: `group_size` must be an int, got {group_size!r}")
    if group_size < 1 or x.shape[0] % group_size:
        raise ValueError(f"{op}: `group_size` {group_size} does not divide the number of responses, {x.shape[0]}")
    return gather(op, x, process_group).view(-1, x.shape[0] // group_size, group_size).transpose(0, 1).reshape(-1)


def gather(op: str, x: Tensor, process_group: ProcessGroup) -> Tensor:
    """``[R, ...]``, equal on all ranks; differentiable in this rank's part."""
    return _gather_op(x, process_group.group_name, process_group.size(), op)


@torch.library.custom_op("rpo_kernels::gather", mutates_args=())
def _gather_op(x: Tensor, group: str, ranks: int, op: str) -> Tensor:
    facts = {"the shape of what is gathered": tuple(x.shape), "its dtype": x.dtype}
    distributed.agree(op, group, 0, facts, lambda: None)
    return distributed.gather(x, distributed.resolve(group))


@_gather_op.register_fake
def _(x, group, ranks, op):
    return x.new_empty((ranks, *x.shape))


def _setup_context(ctx, inputs, output):
    ctx.group = inputs[1]


def _backward(ctx, grad):
    rank = distributed.resolve(ctx.group).rank()
    return once_differentiable(grad[rank].clone(), grad), None, None, None


_gather_op.register_autograd(_backward, setup_context=_setup_context)
