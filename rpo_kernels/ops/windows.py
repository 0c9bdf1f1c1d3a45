"""Windows of groups: as many whole groups as the workspace holds are processed together."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import distributed
from ..inputs import WITHOUT_REFERENCE, Groups, Sequences
from .group_pass import Losses, group_pass, parts_of
from .head import Options
from .ranks import Context


class Reference(NamedTuple):
    """A reference policy evaluated in the same call, with the policy's head if weight is None."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


class Batch(NamedTuple):
    """The arguments of the loss other than the head."""

    labels: Tensor
    sequences: Sequences
    groups: Groups
    reference: Reference
    counts: list[int] | None  # scored tokens of each sequence, if the caller knows them
    context_ranks: str  # name of the process group that shares the sequences


class Window(NamedTuple):
    """Consecutive groups that are processed together."""

    groups: slice
    sequences: slice
    rows: slice


def split_into_windows(
    counts: list[int], bounds: list[int], rows: int, most: list[int] | None = None
) -> Iterator[Window]:
    """Split into windows of whole groups with at most `rows` scored tokens, or one larger group.

    Args:
        counts: scored tokens of each sequence.
        bounds: `[G+1]`, boundaries of the groups among the sequences.
        rows: bound on the scored tokens of a window.
        most: the largest count of each sequence on any rank, so that ranks that share sequences
            make the same windows; counts if None.
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
    """Positions of a batch's scored rows in its sequences and groups, and the group pass over them.

    Its construction is the only synchronisation with the device; ranks that share sequences compare
    their arguments in it.

    Attributes:
        counts: scored rows of each sequence on this rank.
        most: the largest such count on any rank.
        lengths: `[S]` int32, scored tokens of whole sequences.
    """

    def __init__(
        self, op: str, data: Batch, options: Options, needs: list[bool], widest: int
    ) -> None:
        labels, sequences, groups = data.labels, data.sequences, data.groups
        self.op, self.backend = op, options.backend
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
            # On a GPU, wrong counts give offsets that do not partition the rows, and the group pass
            # returns NaN for those.
            if self.device.type == "cpu" and self.counts != (true := own.tolist()):
                raise ValueError(
                    f"{op}: `counts` must be the scored tokens of each sequence, {true[:16]}; got "
                    f"{self.counts[:16]}"
                )
        # checked on every device: parts of invalid offsets could be valid for a window
        if (
            self.bounds[0] != 0
            or self.bounds[-1] != S
            or any(b < a for a, b in itertools.pairwise(self.bounds))
        ):
            raise ValueError(
                f"{op}: `cu_groups` must begin at 0, not decrease, and end at the number of "
                f"sequences, {S}; got {self.bounds[:16]}"
            )
        if sequences.cu_seqlens is not None and any(count < 0 for count in self.counts):
            raise ValueError(
                f"{op}: `cu_seqlens` must begin at 0, not decrease, and end at the number of "
                f"tokens, {labels.numel()}; got {sequences.cu_seqlens.tolist()[:16]}"
            )
        self.offsets = pad(own.cumsum(0, dtype=torch.int32), (1, 0))  # [S+1], of this rank's rows
        self.most, self.lengths = self.counts, own
        self.context: Context | None = None
        if data.context_ranks:
            values = (
                groups.cu_groups,
                groups.rewards,
                groups.normalizer,
                groups.ref_weights,
                groups.group_weights,
            )
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
            groups = groups._replace(ref_per_token=self.context.ref_per_token)
        self.parts = groups.parts()

    def refer(self, index: Tensor, logps: Tensor | None) -> None:
        """Set the reference of the scored rows: `logps` `[n]`, or the given ones at `index`."""

        def referred(part: Groups) -> Groups:
            if part.objective.reference == "none":
                return part
            if logps is not None:
                return part._replace(ref_logps=logps[None], ref_per_token=True)
            if part.ref_logps is not None and part.ref_per_token:
                return part._replace(ref_logps=part.ref_logps[:, index])
            return part

        self.parts = [referred(part) for part in self.parts]

    def windows(self, rows: int) -> list[Window]:
        """Return windows of at most `rows` rows.

        If there are several, the normalizer of the whole batch is computed first.
        """
        windows = list(split_into_windows(self.counts, self.bounds, rows, self.most))
        context = None if self.device.type == "cpu" else self.context
        if len(windows) > 1 or context is not None:
            self.parts = [self._normalized(part) for part in self.parts]
        if context is not None:  # NaN if this rank reported wrong counts to the others
            own = context.by_rank[context.group.rank()] == self.offsets.diff()
            one = torch.ones((), device=self.device)
            self.parts = [
                part._replace(
                    normalizer=torch.where(
                        own.all(), one if part.normalizer is None else part.normalizer, torch.nan
                    )
                )
                for part in self.parts
            ]
        return windows

    def _normalized(self, part: Groups) -> Groups:
        """Set what normalises losses and SFT terms, over the whole batch.

        These are the number of valid groups, and that number per token of their chosen responses.
        Neither depends on log-probabilities, so a group pass over zeros gives both.
        """
        (objective,) = part.objective.parts
        by_tokens = objective.sft_weight > 0 and objective.sft_normalizer == "tokens"
        is_mean = part.mean and part.normalizer is None
        if by_tokens or is_mean:
            objective = replace(objective, reference="none")
            counting = part._replace(objective=objective, normalizer=None, **WITHOUT_REFERENCE)
            zeros = torch.zeros(len(self.lengths), dtype=torch.float32, device=self.device)
            sequences = Sequences(len(zeros))
            losses, *_ = group_pass(
                self.op, self.backend, zeros, None, self.lengths, sequences, [counting], -1
            )
            is_chosen = parts_of(losses.by_sequence)[0].roles == 2
            counted = is_chosen.sum().float()
            if by_tokens:
                share = counted / torch.where(is_chosen, self.lengths, 0).sum().clamp(min=1)
                part = part._replace(sft_share=share)
            if is_mean:
                part = part._replace(normalizer=counted.clamp(min=1))
        return part._replace(mean=False)

    def group_pass(self, window: Window, logps: Tensor) -> tuple[Losses, Tensor]:
        """Return the losses of a window and dL/dlogp of this rank's rows in it.

        logps are `[n]` of all rows.
        """
        _, s, rows = window
        offsets, logps = self.offsets[s.start : s.stop + 1] - rows.start, logps[rows]
        merged = None if self.context is None else self.context.merged(s)
        if merged is not None:
            logps, offsets = merged.merge(logps), merged.offsets

        def within(part: Groups) -> Groups:
            ref_logps, cu_groups = part.ref_logps, part.cu_groups
            if ref_logps is not None:
                ref_logps = ref_logps[:, rows if part.ref_per_token else s].contiguous()
                if merged is not None and part.ref_per_token:
                    ref_logps = merged.merge(ref_logps)
            if cu_groups is not None:
                cu_groups = cu_groups[window.groups.start : window.groups.stop + 1] - s.start
            ref_weights, group_weights = part.ref_weights, part.group_weights
            if ref_weights is not None and ref_weights.dim() == 2:
                ref_weights = ref_weights[:, window.groups]
            return part._replace(
                rewards=None if part.rewards is None else part.rewards[s],
                ref_logps=ref_logps,
                ref_weights=ref_weights,
                cu_groups=cu_groups,
                group_weights=None if group_weights is None else group_weights[window.groups],
            )

        losses, _, coef = group_pass(
            self.op,
            self.backend,
            logps,
            torch.zeros_like(logps, dtype=torch.int32),  # every row is scored
            None,
            Sequences(s.stop - s.start, offsets),
            [within(part) for part in self.parts],
            -1,
        )
        return losses, coef if merged is None else coef[merged.mine]
