"""Segments of which several ranks hold parts: tokens of sequences (context parallelism), responses of groups."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import distributed


class Merged(NamedTuple):
    """Segments of which each rank has a part, put together: in each segment the entries of rank 0 first."""

    group: ProcessGroup
    widest: int  # entries of the rank that has most
    order: Tensor  # [n] int64: where merged entries lie among R times ``widest`` gathered ones
    offsets: Tensor  # [S+1] int32, of merged segments
    mine: Tensor  # [n_r] int64: where this rank's entries lie among the merged

    @staticmethod
    def of(offsets: Tensor, sizes: list[int], group: ProcessGroup) -> Merged:
        """From all ranks' offsets ``[R, S+1]`` and how many entries each has. Offsets that do not partition them stay unusable."""
        widest, S = max(sizes), offsets.shape[1] - 1
        entry = torch.arange(widest, device=offsets.device, dtype=offsets.dtype).expand(len(sizes), widest).contiguous()
        total = torch.tensor(sizes, dtype=offsets.dtype, device=offsets.device)[:, None]
        segment = torch.searchsorted(offsets[:, 1:].contiguous(), entry, right=True).clamp(max=S - 1)
        order = torch.where(entry < total, segment, S).view(-1).argsort(stable=True)  # what fills up goes last
        place = torch.empty_like(order)
        place[order] = torch.arange(order.shape[0], device=order.device)
        rank = group.rank()
        broken = (offsets.diff() < 0).any() | (offsets[:, :1] != 0).any() | (offsets[:, -1:] != total).any()
        merged = torch.where(broken, -1, offsets.sum(0, dtype=torch.int32))
        return Merged(group, widest, order[: sum(sizes)], merged, place.view(-1, widest)[rank, : sizes[rank]])

    def merge(self, x: Tensor) -> Tensor:
        """``[..., n]`` of all ranks' ``[..., n_r]``."""
        padded = x.new_zeros((*x.shape[:-1], self.widest))
        padded[..., : x.shape[-1]] = x
        return distributed.gather(padded, self.group).movedim(0, -2).flatten(-2)[..., self.order].contiguous()


class Context:
    """Sequences whose scored tokens lie on several ranks, of which the group pass sees all: a few numbers per token travel."""

    def __init__(
        self, op: str, name: str, counts: list[int], N: int, ref_logps: Tensor | None, device: torch.device,
        facts: dict[str, object],
    ):  # fmt: skip
        """``counts`` of this rank's scored tokens of each sequence, N positions in all, ``ref_logps`` ``[R, N]`` or ``[R, S]``;
        facts that the ranks of the named group are to agree on."""
        facts = {"the number of sequences": len(counts), **facts}
        distributed.agree(op, name, sum(counts), facts, lambda: None, "context_group")
        self.group = distributed.resolve(name)
        own = [N, -1 if ref_logps is None else ref_logps.shape[1], distributed.digest(ref_logps)]
        told = distributed.tell([*own, *counts], self.group)
        self.counts = [counts for _, _, _, *counts in told]  # [R, S]
        self.by_rank = torch.tensor(self.counts, dtype=torch.int32, device=device)
        # A rank with as many positions as there are sequences leaves it to the others.
        self.ref_per_token = all(given == positions for positions, given, *_ in told)
        if not self.ref_per_token and len({(given, values) for _, given, values, *_ in told}) > 1:
            raise ValueError(
                f"{op}: `ref_logps` must be per token of each rank's own on all ranks of `context_group`, or per sequence and the "
                f"same on all; got {[given for _, given, *_ in told]} numbers for {[positions for positions, *_ in told]} positions"
            )

    @property
    def lengths(self) -> Tensor:
        """``[S]`` int32, of whole sequences."""
        return self.by_rank.sum(0, dtype=torch.int32)

    @property
    def most(self) -> list[int]:
        """Tokens of each sequence on the rank that has most of it."""
        return [max(counts) for counts in zip(*self.counts)]

    def merged(self, sequences: slice) -> Merged:
        offsets = torch.nn.functional.pad(self.by_rank[:, sequences].cumsum(1, dtype=torch.int32), (1, 0))
        return Merged.of(offsets, [sum(counts[sequences]) for counts in self.counts], self.group)
