"""Groups of responses processed in windows: as many whole groups at a time as the workspace has
room for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import distributed
from ..backend import module_of
from ..inputs import Groups, PerSequence, Sequences
from .head import Options
from .ranks import Context


class Reference(NamedTuple):
    """A reference policy that is evaluated in the same call; without a weight its head is the
    policy's.
    """

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


class Batch(NamedTuple):
    """What the loss takes beside the head."""

    labels: Tensor
    sequences: Sequences
    groups: Groups
    reference: Reference
    counts: list[int] | None  # scored tokens of each sequence, where the caller knows them
    context_ranks: str  # name of the process group whose ranks hold parts of the same sequences


class Window(NamedTuple):
    """Neighbouring groups that are processed together."""

    groups: slice
    sequences: slice
    rows: slice


def split_into_windows(
    counts: list[int], bounds: list[int], rows: int, most: list[int] | None = None
) -> Iterator[Window]:
    """Whole groups with at most ``rows`` scored tokens; a larger group has a window to itself.

    ``counts`` are the scored tokens of each sequence, ``bounds`` ``[G+1]`` the groups' boundaries
    among the sequences. Ranks that share sequences make the same windows from ``most``, the largest
    count of each sequence on any of them.
    """
    tokens, sizes = ([0, *itertools.accumulate(x)] for x in (counts, most or counts))
    first, held = 0, 0
    for g, (a, b) in enumerate(itertools.pairwise(bounds)):
        size = sizes[b] - sizes[a]
        if held and size and held + size > rows:  # groups without tokens never begin a window
            yield _window(first, g, bounds, tokens)
            first, held = g, 0
        held += size
    yield _window(first, len(bounds) - 1, bounds, tokens)


def _window(first: int, last: int, bounds: list[int], tokens: list[int]) -> Window:
    a, b = bounds[first], bounds[last]
    return Window(slice(first, last), slice(a, b), slice(tokens[a], tokens[b]))


class Layout:
    """Where the scored rows of a batch lie in its sequences and groups, and the group pass over
    some of them.

    Made by the only synchronisation with the device, and an agreement of the ranks that share the
    sequences.

    Attributes:
        counts: scored rows of each sequence on this rank; ``most`` on the rank that has most of it.
        lengths: ``[S]`` int32, scored tokens of whole sequences.
    """

    def __init__(
        self, op: str, data: Batch, options: Options, needs: list[bool], widest: int
    ) -> None:
        labels, sequences, groups = data.labels, data.sequences, data.groups
        self.op, self.groups, self.backend = op, groups, options.backend
        S, self.device = sequences.number, labels.device
        own = sequences.sum((labels != options.transform.ignore_index).double()).int()
        offsets = groups.cu_groups
        if data.counts is None or offsets is not None:
            distributed.check_capture(op, "counts" if data.counts is None else "group_size")
        bounds = list(range(0, S + 1, groups.group_size)) if offsets is None else []
        if data.counts is None:
            known = (own if offsets is None else torch.cat([own, offsets])).tolist()
            self.counts, self.bounds = known[:S], bounds or known[S:]
        else:
            self.counts, self.bounds = (
                list(data.counts),
                bounds if offsets is None else offsets.tolist(),
            )
            # Elsewhere wrong counts leave offsets that do not partition the rows: the group pass
            # makes NaN of those.
            if self.device.type == "cpu" and self.counts != (true := own.tolist()):
                raise ValueError(
                    f"{op}: `counts` must be the scored tokens of each sequence, {true[:16]}; got "
                    f"{self.counts[:16]}"
                )
        # On any device: bad offsets of the whole would be good ones of its windows.
        if (
            self.bounds[0] != 0
            or self.bounds[-1] != S
            or any(b < a for a, b in itertools.pairwise(self.bounds))
        ):
            raise ValueError(
                f"{op}: `cu_groups` must begin at 0, not decrease, and end at {S}, the sequences; "
                f"got {self.bounds[:16]}"
            )
        if any(count < 0 for count in self.counts):
            raise ValueError(
                f"{op}: `cu_seqlens` must begin at 0, not decrease, and end at {labels.numel()}, "
                "the number of tokens"
            )
        self.offsets = pad(own.cumsum(0, dtype=torch.int32), (1, 0))  # [S+1], of this rank's rows
        self.most, self.lengths = self.counts, own
        self.context: Context | None = None
        if data.context_ranks:
            values = groups.cu_groups, groups.rewards, groups.normalizer, groups.ref_weights
            facts = {
                "gradients": needs,
                "`objective`": groups.objective.spec,
                "`reduction`": groups.mean,
                "`group_size`": groups.group_size,
                "whether `ref_hidden` is given": data.reference.hidden is not None,
                "how logits are made": str((options._replace(backend="", vocab_ranks=""), widest)),
                "the values of what belongs to sequences and groups (their checksum)": (
                    distributed.digest(*values)
                ),
            }
            self.context = Context(
                op,
                data.context_ranks,
                self.counts,
                labels.numel(),
                groups.ref_logps,
                self.device,
                facts,
            )
            self.most, self.lengths = self.context.most, self.context.lengths
            self.groups = groups._replace(ref_per_token=self.context.ref_per_token)

    def refer(self, index: Tensor, logps: Tensor | None) -> None:
        """Reference log-probabilities of the scored rows: those of an own pass ``[n]``, or of the
        positions ``index``.
        """
        if logps is not None:
            self.groups = self.groups._replace(ref_logps=logps[None], ref_per_token=True)
        elif self.groups.ref_logps is not None and self.groups.ref_per_token:
            self.groups = self.groups._replace(ref_logps=self.groups.ref_logps[:, index])

    def windows(self, rows: int) -> list[Window]:
        """Of at most ``rows`` rows.

        Where there are several, what divides their losses is settled first.
        """
        windows = list(split_into_windows(self.counts, self.bounds, rows, self.most))
        context = None if self.device.type == "cpu" else self.context
        if len(windows) > 1 or context is not None:
            self._normalize()
        if context is not None:  # a rank that told the others wrong counts gives NaN
            own = context.by_rank[context.group.rank()] == self.offsets.diff()
            one = (
                torch.ones((), device=self.device)
                if self.groups.normalizer is None
                else self.groups.normalizer
            )
            self.groups = self.groups._replace(normalizer=torch.where(own.all(), one, torch.nan))
        return windows

    def _normalize(self) -> None:
        """The number of groups that count, and their share of the chosen responses' tokens, of the
        whole batch.

        Which groups count does not depend on log-probabilities, and the group pass knows it.
        """
        groups, objective = self.groups, self.groups.objective
        by_tokens = objective.sft_weight > 0 and objective.sft_normalizer == "tokens"
        if by_tokens or (groups.mean and groups.normalizer is None):
            alone = groups._replace(
                objective=replace(objective, reference="none"),
                ref_logps=None,
                ref_weights=None,
                ref_per_token=False,
                normalizer=None,
            )
            zeros = torch.zeros(len(self.lengths), device=self.device)
            by_sequence = self._group_pass(zeros, None, self.lengths, Sequences(len(zeros)), alone)[
                2
            ]
            is_chosen = PerSequence(*by_sequence).roles == 2
            counted = is_chosen.sum()
            if by_tokens:
                share = counted / torch.where(is_chosen, self.lengths, 0).sum().clamp(min=1)
                groups = groups._replace(sft_share=share.float())
            if groups.mean and groups.normalizer is None:
                groups = groups._replace(normalizer=counted.clamp(min=1).float())
        self.groups = groups._replace(mean=False)

    def group_pass(self, window: Window, logps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """loss, losses ``[G]``, ``[5, S]`` of the window, and dL/dlogp of this rank's rows of it;
        logps ``[n]`` of all rows.
        """
        _, s, part = window
        groups, offsets = self.groups, self.offsets[s.start : s.stop + 1] - part.start
        logps, ref_logps = logps[part], groups.ref_logps
        if ref_logps is not None:
            ref_logps = ref_logps[:, part if groups.ref_per_token else s].contiguous()
        merged = None
        if self.context is not None:
            merged = self.context.merged(s)
            logps, offsets = merged.merge(logps), merged.offsets
            if ref_logps is not None and groups.ref_per_token:
                ref_logps = merged.merge(ref_logps)
        groups = groups._replace(
            ref_logps=ref_logps,
            rewards=None if groups.rewards is None else groups.rewards[s],
            ref_weights=groups.ref_weights
            if groups.ref_weights is None or groups.ref_weights.dim() == 1
            else (groups.ref_weights[:, window.groups]),
            cu_groups=None
            if groups.cu_groups is None
            else groups.cu_groups[window.groups.start : window.groups.stop + 1] - s.start,
        )
        everything_scored = torch.zeros_like(logps, dtype=torch.int32)
        sequences = Sequences(s.stop - s.start, offsets)
        loss, losses, by_sequence, _, coef = self._group_pass(
            logps, everything_scored, None, sequences, groups
        )
        return loss, losses, by_sequence, coef if merged is None else coef[merged.mine]

    def _group_pass(
        self,
        logps: Tensor,
        labels: Tensor | None,
        lengths: Tensor | None,
        sequences: Sequences,
        groups: Groups,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        function = module_of(self.op, self.backend, self.device, "group_pass").group_pass
        return function(logps, labels, lengths, sequences, groups, -1)
