"""What travels from a public function to the kernels: values that are checked once, when they are
made, and handed on whole.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .objectives import RPOObjective


class LogitTransform(NamedTuple):
    """How raw logits x become those that are normalised: z = post * x, or z = post * tanh(pre * x)
    with a softcap.
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
    """How tokens lie in sequences: rows of ``[S, T]``, or packed ``[N]`` between offsets."""

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
        """Sums ``[S]`` of what tokens hold, ``[S, T]`` or ``[N]``.

        NaN where no check sees that offsets are bad.
        """
        if self.cu_seqlens is None:
            return x.sum(1)
        offsets = self.cu_seqlens.long()
        inside = offsets.clamp(0, x.shape[0]).cummax(0).values
        broken = (inside != offsets).any() | (offsets[0] != 0) | (offsets[-1] != x.shape[0])
        total = torch.segment_reduce(x, "sum", offsets=inside, axis=0, initial=0, unsafe=True)
        return torch.where(broken, torch.nan, total)

    def of_token(self, N: int, device: torch.device) -> Tensor:
        """The sequence ``[N]`` of each of N tokens."""
        token = torch.arange(N, device=device, dtype=torch.int32)
        if self.cu_seqlens is None:
            return token // max(N // max(self.number, 1), 1)
        return torch.searchsorted(self.cu_seqlens[1:-1], token, right=True)


class Groups(NamedTuple):
    """What the group pass takes beside log-probabilities. All tensors are constants."""

    objective: RPOObjective
    rewards: Tensor | None  # [S] fp32
    ref_logps: Tensor | None  # [R, S] fp32, or [R, N] of tokens
    ref_weights: Tensor | None  # [R] or [R, G] fp32
    cu_groups: Tensor | None  # [G+1] int32
    normalizer: Tensor | None  # [] fp32; divides the sum of losses in place of the mean
    group_size: int
    mean: bool
    ref_per_token: bool = False
    sft_share: Tensor | None = (
        None  # [] fp32, counted groups / tokens of their chosen responses, of a batch seen in parts
    )

    @staticmethod
    def of(
        op: str,
        objective: RPOObjective,
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
        is_live: bool = False,
    ) -> Groups:
        """``tokens``: shape that ref_logps may have beside ``[S]``, or None; ``is_live`` if they
        are still to be computed.
        """
        S = sequences.number
        group_size = checks.check_groups(op, objective, S, group_size, cu_groups, device)
        G = S // group_size if cu_groups is None else cu_groups.shape[0] - 1
        checks.check_rewards(op, rewards, objective, S, device)
        shapes: list[tuple[int, ...]] = [(S,)] if tokens is None else [(S,), tokens]
        checks.check_reference(op, objective, ref_logps, ref_weights, shapes, G, device, is_live)
        checks.check_normalizer(op, reduction, normalizer, device)
        per_token = False
        if ref_logps is not None:
            several = objective.reference in ("harmonic", "geometric")
            per_token = tokens is not None and tuple(ref_logps.shape[int(several) :]) == tokens
            ref_logps = _constant(ref_logps).view(ref_logps.shape[0] if several else 1, -1)
            if several:
                R = ref_logps.shape[0]
                ref_weights = (
                    torch.full((R,), 1 / R, device=device)
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
        )

    def number(self, S: int) -> int:
        """G, of S sequences."""
        return S // self.group_size if self.cu_groups is None else self.cu_groups.shape[0] - 1

    def check_values(self, op: str, device: torch.device, sequences: Sequences, N: int) -> None:
        """What only the values of tensors tell; on a CPU, where reading them is free."""
        checks.check_group_values(
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
        )


class PerSequence(NamedTuple):
    """What the group pass says of each sequence, ``[S]`` each: the rows of its ``[5, S]`` fp32."""

    rewards: Tensor  # implicit rewards s
    logps: Tensor
    targets: Tensor
    dlogps: Tensor  # dL/dlogp
    roles: Tensor  # 0 dropped, 1 counted, 2 counted and chosen


def groups_of(S: int, group_size: int, cu_groups: Tensor | None, device: torch.device) -> Tensor:
    """The group ``[S]`` of each sequence."""
    sequence = torch.arange(S, device=device, dtype=torch.int32)
    if cu_groups is None:
        return sequence // group_size
    return torch.searchsorted(cu_groups[1:-1], sequence, right=True)


def _constant(x: Tensor) -> Tensor:
    """In float32, contiguous and without a gradient; most are already."""
    if x.dtype == torch.float32 and not x.requires_grad and x.is_contiguous():
        return x
    return x.detach().float().contiguous()
