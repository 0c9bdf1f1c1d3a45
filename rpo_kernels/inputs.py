"""Structured arguments of the kernels: checked once, when they are made, and passed on whole."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, group_checks
from .objectives import RPOObjective
from .sums import Objective, weighted_parts


class LogitTransform(NamedTuple):
    """The map from raw logits x to the logits z that are normalised.

        z = post * x,   with a softcap   z = post * tanh(pre * x)

    See `factors` for pre and post.
    """

    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float = 0.0  # 0: none
    ignore_index: int = -100  # label of rows that are not scored

    @staticmethod
    def of(
        op: str, temperature: float, logit_scale: float, softcap: float | None, ignore_index: int
    ) -> LogitTransform:
        checks.check_transform(op, temperature, logit_scale, softcap)
        return LogitTransform(
            float(temperature), float(logit_scale), float(softcap or 0.0), ignore_index
        )

    @property
    def factors(self) -> tuple[float, float]:
        """(pre, post); pre is 0 without a softcap."""
        if self.softcap > 0:
            return self.logit_scale / self.softcap, self.softcap / self.temperature
        return 0.0, self.logit_scale / self.temperature


class Sequences(NamedTuple):
    """How tokens form sequences: rows of `[S, T]`, or packed `[N]` with boundaries."""

    number: int  # S
    cu_seqlens: Tensor | None = None  # [S+1] int32

    @staticmethod
    def of(op: str, name: str, tokens: Tensor, cu_seqlens: Tensor | None) -> Sequences:
        if cu_seqlens is None:
            if tokens.dim() != 2:
                without = " without cu_seqlens" if tokens.dim() == 1 else ""
                raise ValueError(
                    f"{op}: `{name}` must be rows [S, T], or packed [N] with `cu_seqlens`; got "
                    f"{checks.shape_of(tokens)}{without}"
                )
            return Sequences(tokens.shape[0])
        if tokens.dim() != 1:
            raise ValueError(
                f"{op}: with `cu_seqlens`, `{name}` must be packed [N], got "
                f"{checks.shape_of(tokens)}; flatten the tokens, or leave out `cu_seqlens` for rows"
            )
        checks.check_offsets(op, "cu_seqlens", cu_seqlens, tokens.device)
        checks.check_offset_values(op, "cu_seqlens", cu_seqlens, tokens.shape[0], "tokens")
        return Sequences(cu_seqlens.shape[0] - 1, cu_seqlens)

    def sum(self, x: Tensor) -> Tensor:
        """Sum `[S, T]` or `[N]` over the tokens of each sequence, to `[S]`.

        NaN if the offsets are invalid and no check can see it.
        """
        if self.cu_seqlens is None:
            return x.sum(1)
        offsets = self.cu_seqlens.long()
        inside = offsets.clamp(0, x.shape[0]).cummax(0).values
        broken = (inside != offsets).any() | (offsets[0] != 0) | (offsets[-1] != x.shape[0])
        total = torch.segment_reduce(x, "sum", offsets=inside, axis=0, initial=0, unsafe=True)
        return torch.where(broken, torch.nan, total)

    def of_token(self, N: int, device: torch.device) -> Tensor:
        """Return the sequence `[N]` of each of N tokens."""
        token = torch.arange(N, device=device, dtype=torch.int32)
        if self.cu_seqlens is None:
            return token // max(N // max(self.number, 1), 1)
        return torch.searchsorted(self.cu_seqlens[1:-1], token, right=True)


class Groups(NamedTuple):
    """The arguments of the group pass other than log-probabilities; all tensors are constants."""

    objective: Objective
    rewards: Tensor | None  # [S] fp32
    ref_logps: Tensor | None  # [R, S] fp32, or [R, N] of tokens
    ref_weights: Tensor | None  # [R] or [R, G] fp32
    cu_groups: Tensor | None  # [G+1] int32
    normalizer: Tensor | None  # [] fp32; divides the sum of losses in place of the mean
    group_size: int
    mean: bool
    ref_per_token: bool = False
    group_weights: Tensor | None = None  # [G] fp32; factors on the losses of the groups
    # [] fp32, counted groups / tokens of their chosen responses, for a batch that is read in parts
    sft_share: Tensor | None = None

    @staticmethod
    def of(
        op: str,
        objective: Objective,
        sequences: Sequences,
        tokens: tuple[int, ...] | None,
        device: torch.device,
        *,
        rewards: Tensor | None,
        ref_logps: Tensor | None,
        ref_weights: Tensor | None,
        group_size: int | None,
        cu_groups: Tensor | None,
        reduction: str,
        normalizer: Tensor | float | None,
        group_weights: Tensor | None,
        is_live: bool = False,
    ) -> Groups:
        """Check and convert the arguments.

        `tokens` is the shape that per-token ref_logps may have, or None; with `is_live` the
        reference's log-probabilities are computed later.
        """
        S = sequences.number
        group_size = group_checks.check_groups(op, objective, S, group_size, cu_groups, device)
        G = S // group_size if cu_groups is None else cu_groups.shape[0] - 1
        group_checks.check_rewards(op, rewards, objective, S, device)
        shapes: list[tuple[int, ...]] = [(S,)] if tokens is None else [(S,), tokens]
        group_checks.check_reference(
            op, objective, ref_logps, ref_weights, shapes, G, device, is_live
        )
        group_checks.check_normalizer(op, reduction, normalizer, device)
        group_checks.check_group_weights(op, group_weights, G, device)
        per_token = False
        if ref_logps is not None:
            several = objective.reference in ("harmonic", "geometric")
            per_token = tokens is not None and tuple(ref_logps.shape[int(several) :]) == tokens
            ref_logps = _constant(ref_logps).view(ref_logps.shape[0] if several else 1, -1)
            if several:
                R = ref_logps.shape[0]
                ref_weights = (
                    torch.full((R,), 1 / R, dtype=torch.float32, device=device)
                    if ref_weights is None
                    else ref_weights.detach().float()
                )
        if isinstance(normalizer, Tensor):
            normalizer = _constant(normalizer).view(())
        elif normalizer is not None:
            normalizer = torch.full((), normalizer, dtype=torch.float32, device=device)
        return Groups(
            objective,
            None if rewards is None else _constant(rewards),
            ref_logps,
            ref_weights,
            cu_groups,
            normalizer,
            group_size,
            reduction == "mean",
            per_token,
            None if group_weights is None else _constant(group_weights),
        )

    def parts(self) -> list[Groups]:
        """Return the arguments of the group pass for each part of the objective."""
        if isinstance(self.objective, RPOObjective):
            return [self]
        return [
            self._replace(
                objective=part,
                rewards=self.rewards if part.uses_rewards else None,
                **({} if part.reference != "none" else WITHOUT_REFERENCE),
            )
            for part in weighted_parts(self.objective)
        ]

    def number(self, S: int) -> int:
        """G, for S sequences."""
        return S // self.group_size if self.cu_groups is None else self.cu_groups.shape[0] - 1

    def check_values(self, op: str, device: torch.device, sequences: Sequences, N: int) -> None:
        """Check values; on a CPU only, where reading them is free."""
        group_checks.check_group_values(
            op,
            device,
            self.objective,
            sequences.number,
            N,
            sequences.cu_seqlens,
            self.cu_groups,
            self.rewards,
            self.ref_weights,
            self.normalizer,
            self.group_weights,
        )


WITHOUT_REFERENCE: dict[str, Any] = {
    "ref_logps": None,
    "ref_weights": None,
    "ref_per_token": False,
}


class PerSequence(NamedTuple):
    """Results of the group pass per sequence, `[S]` each: the rows of its `[5, S]` fp32."""

    rewards: Tensor  # implicit rewards s
    logps: Tensor
    targets: Tensor
    dlogps: Tensor  # dL/dlogp
    roles: Tensor  # 0 dropped, 1 counted, 2 counted and chosen


def groups_of(S: int, group_size: int, cu_groups: Tensor | None, device: torch.device) -> Tensor:
    """Return the group `[S]` of each sequence."""
    sequence = torch.arange(S, device=device, dtype=torch.int32)
    if cu_groups is None:
        return sequence // group_size
    return torch.searchsorted(cu_groups[1:-1], sequence, right=True)


def _constant(x: Tensor) -> Tensor:
    """Convert to fp32, contiguous and without a gradient."""
    if x.dtype == torch.float32 and not x.requires_grad and x.is_contiguous():
        return x
    return x.detach().float().contiguous()
