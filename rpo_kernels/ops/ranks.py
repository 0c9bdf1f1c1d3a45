"""Groups and sequences that are spread over several ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import checks, distributed
from .._ops import add_op_namespace_prefix
from .operator import once_differentiable


def gather_responses(
    x: Tensor,
    *,
    process_group: ProcessGroup | None = None,
    group_size: int = 1,
    cu_groups: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Gather one number per response from all ranks, for groups that are spread over ranks.

    Each rank holds `group_size` responses of every group, or with its own `cu_groups` any number of
    them, possibly none; the groups have the same order on all ranks. In the result the responses of
    a group are contiguous, those of rank 0 first, and all R ranks have the same result. Nothing but
    these numbers is exchanged.

        logps = gather_responses(sequence_logps(token_logps(...)), process_group=ranks)
        rewards = gather_responses(rewards, process_group=ranks)
        loss = preference_loss(logps, rewards, objective, group_size=R).loss

        logps, whole = gather_responses(logps, cu_groups=cu_groups, process_group=ranks)
        rewards, _ = gather_responses(rewards, cu_groups=cu_groups, process_group=ranks)
        loss = preference_loss(logps, rewards, objective, cu_groups=whole).loss

    Args:
        x: `[S_r]`, of any dtype (log-probabilities, rewards, lengths); without cu_groups the same
            S_r on all ranks.
        process_group: the ranks; required.
        group_size: number of responses of each group on this rank.
        cu_groups: `[G+1]` int32 boundaries of this rank's part of each group, in place of
            group_size; the same G on all ranks.

    Returns:
        `[S]`, where S is the sum of S_r over the ranks; with cu_groups a pair of that and the
        boundaries `[G+1]` int32 of the whole groups. Every rank must compute the same loss from it;
        its x then gets the gradient of that one loss, so the gradient of a parameter is the sum
        over the ranks, not the mean. Second derivatives raise. Under `torch.compile` the S of
        ragged groups is known only at run time: for two results of equal length call
        `torch._check(rewards.shape[0] == logps.shape[0])`.

    Raises:
        ValueError, TypeError: if an argument does not fit; on all ranks.
    """
    op = "gather_responses"
    with distributed.raising_together(op, process_group=process_group):
        return _gather_responses(op, x, process_group, group_size, cu_groups)


def _gather_responses(
    op: str,
    x: Tensor,
    process_group: ProcessGroup | None,
    group_size: int,
    cu_groups: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    if process_group is None:
        raise TypeError(f"{op}: `process_group` must be a torch.distributed.ProcessGroup, got None")
    distributed.group_name(op, process_group)
    checks.check_tensor(op, "x", x)
    if x.dim() != 1:
        raise ValueError(
            f"{op}: `x` must be one number per response, [S]; got {checks.shape_of(x)}"
        )
    if isinstance(group_size, bool) or not isinstance(group_size, int):
        raise TypeError(f"{op}: `group_size` must be an int, got {group_size!r}")
    if cu_groups is not None:
        if group_size != 1:
            raise ValueError(
                f"{op}: `group_size` and `cu_groups` both say which responses belong together, got "
                f"{group_size} and offsets; pass one of them"
            )
        checks.check_offsets(op, "cu_groups", cu_groups, x.device)
        checks.check_tangents(op, x)
        return _gather_ragged_op(x, cu_groups, process_group.group_name)[:2]
    if group_size < 1 or x.shape[0] % group_size:
        raise ValueError(
            f"{op}: `group_size` must divide the number of responses, {x.shape[0]}, got "
            f"{group_size}"
        )
    return (
        gather(op, x, process_group)
        .view(-1, x.shape[0] // group_size, group_size)
        .transpose(0, 1)
        .reshape(-1)
    )


def gather(op: str, x: Tensor, process_group: ProcessGroup) -> Tensor:
    """Gather to `[R, ...]`, equal on all ranks; differentiable in this rank's part."""
    checks.check_tangents(op, x)
    return _gather_op(x, process_group.group_name, process_group.size(), op)


@torch.library.custom_op(add_op_namespace_prefix("gather"), mutates_args=())
def _gather_op(x: Tensor, group: str, ranks: int, op: str) -> Tensor:
    facts = {"the shape of what is gathered": tuple(x.shape), "its dtype": x.dtype}
    distributed.agree(op, group, 0, facts, lambda: None)
    return distributed.gather(x, distributed.resolve(group))


@_gather_op.register_fake
def _(x: Tensor, group: str, ranks: int, op: str) -> Tensor:
    return x.new_empty((ranks, *x.shape))


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.group = inputs[1]


def _backward(ctx: Any, grad: Tensor) -> tuple:
    rank = distributed.resolve(ctx.group).rank()
    return once_differentiable(grad[rank].clone(), grad), None, None, None


_gather_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op(add_op_namespace_prefix("gather_ragged"), mutates_args=())
def _gather_ragged_op(x: Tensor, cu_groups: Tensor, group: str) -> tuple[Tensor, Tensor, Tensor]:
    op, ranks = "gather_responses", distributed.resolve(group)
    facts = {
        "the number of groups": cu_groups.shape[0] - 1,
        "the dtype of what is gathered": x.dtype,
    }
    check = lambda: checks.check_offset_values(op, "cu_groups", cu_groups, x.shape[0], "responses")
    sizes = distributed.agree(op, group, x.shape[0], facts, check)
    merged = Merged.of(distributed.gather(cu_groups, ranks), sizes, ranks)
    return merged.merge(x), merged.offsets, merged.mine


@_gather_ragged_op.register_fake
def _(x: Tensor, cu_groups: Tensor, group: str) -> tuple[Tensor, Tensor, Tensor]:
    total = torch.library.get_ctx().new_dynamic_size(min=1)
    return (
        x.new_empty(total),
        torch.empty_like(cu_groups),
        x.new_empty(x.shape[0], dtype=torch.int64),
    )


def _setup_ragged(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, offsets, mine = output
    ctx.save_for_backward(mine)
    ctx.mark_non_differentiable(offsets, mine)
    ctx.set_materialize_grads(False)


def _backward_ragged(ctx: Any, grad: Tensor | None, *_: None) -> tuple:
    (mine,) = ctx.saved_tensors
    return None if grad is None else once_differentiable(grad[mine], grad), None, None


_gather_ragged_op.register_autograd(_backward_ragged, setup_context=_setup_ragged)


# ---- tokens of sequences -------------------------------------------------------------------------


class Merged(NamedTuple):
    """Segments that are spread over ranks, merged, with the entries of rank 0 first in each."""

    group: ProcessGroup
    widest: int  # most entries of any rank
    order: Tensor  # [n] int64: positions of merged entries among the R * widest gathered ones
    offsets: Tensor  # [S+1] int32, boundaries of merged segments
    mine: Tensor  # [n_r] int64: positions of this rank's entries among the merged ones

    @staticmethod
    def of(offsets: Tensor, sizes: list[int], group: ProcessGroup) -> Merged:
        """Merge offsets `[R, S+1]` of all ranks, whose numbers of entries are `sizes`.

        Invalid offsets give invalid merged offsets (-1).
        """
        widest, S = max(sizes), offsets.shape[1] - 1
        entry = (
            torch.arange(widest, device=offsets.device, dtype=offsets.dtype)
            .expand(len(sizes), widest)
            .contiguous()
        )
        total = torch.tensor(sizes, dtype=offsets.dtype, device=offsets.device)[:, None]
        segment = torch.searchsorted(offsets[:, 1:].contiguous(), entry, right=True).clamp(
            max=S - 1
        )
        # padding goes last
        order = torch.where(entry < total, segment, S).view(-1).argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(order.shape[0], device=order.device)
        rank = group.rank()
        broken = (
            (offsets.diff() < 0).any()
            | (offsets[:, :1] != 0).any()
            | (offsets[:, -1:] != total).any()
        )
        merged = torch.where(broken, -1, offsets.sum(0, dtype=torch.int32))
        return Merged(
            group, widest, order[: sum(sizes)], merged, place.view(-1, widest)[rank, : sizes[rank]]
        )

    def merge(self, x: Tensor) -> Tensor:
        """Merge `[..., n_r]` of all ranks to `[..., n]`."""
        padded = x.new_zeros((*x.shape[:-1], self.widest))
        padded[..., : x.shape[-1]] = x
        return (
            distributed.gather(padded, self.group)
            .movedim(0, -2)
            .flatten(-2)[..., self.order]
            .contiguous()
        )


class Context:
    """Sequences whose scored tokens are spread over ranks (context parallelism).

    The group pass runs on whole sequences, for which a few numbers per token are exchanged.
    """

    def __init__(
        self,
        op: str,
        name: str,
        counts: list[int],
        N: int,
        ref_logps: Tensor | None,
        device: torch.device,
        facts: dict[str, object],
    ):
        """Exchange numbers of tokens and compare arguments with the ranks of the group `name`.

        Args:
            counts: scored tokens of each sequence on this rank.
            N: positions on this rank.
            ref_logps: `[R, N]`, `[R, S]` or None.
            facts: what must be equal on all ranks.
        """
        facts = {"the number of sequences": len(counts), **facts}
        distributed.agree(op, name, sum(counts), facts, lambda: None, "context_group")
        self.group = distributed.resolve(name)
        own = [N, -1 if ref_logps is None else ref_logps.shape[1], distributed.digest(ref_logps)]
        told = distributed.tell([*own, *counts], self.group)
        self.counts = [counts for _, _, _, *counts in told]  # [ranks, S]
        self.by_rank = torch.tensor(self.counts, dtype=torch.int32, device=device)
        # if this rank has as many positions as sequences, the other ranks decide
        self.ref_per_token = all(given == positions for positions, given, *_ in told)
        if not self.ref_per_token and len({(given, values) for _, given, values, *_ in told}) > 1:
            raise ValueError(
                f"{op}: `ref_logps` must be one number for each token of the rank, on all ranks of "
                "`context_group`, or one for each sequence, the same on all; got "
                f"{[given for _, given, *_ in told]} numbers for "
                f"{[positions for positions, *_ in told]} positions"
            )

    @property
    def lengths(self) -> Tensor:
        """`[S]` int32, scored tokens of whole sequences."""
        return self.by_rank.sum(0, dtype=torch.int32)

    @property
    def most(self) -> list[int]:
        """Largest number of tokens of each sequence on any rank."""
        return [max(counts) for counts in zip(*self.counts)]

    def merged(self, sequences: slice) -> Merged:
        offsets = torch.nn.functional.pad(
            self.by_rank[:, sequences].cumsum(1, dtype=torch.int32), (1, 0)
        )
        return Merged.of(offsets, [sum(counts[sequences]) for counts in self.counts], self.group)
