"""The RPO loss of sequence log-probabilities, and sums of token log-probabilities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import checks, distributed, group_checks
from ..inputs import Groups, PerSequence, Sequences, groups_of
from ..sums import AnyObjective, names_of
from .group_pass import Losses, fake_losses, group_pass, parts_of, total
from .operator import Operator, once_differentiable
from .output import RPOOutput
from .ranks import gather


def preference_loss(
    logps: Tensor,
    rewards: Tensor | None,
    objective: AnyObjective,
    *,
    ref_logps: Tensor | None = None,
    ref_weights: Tensor | None = None,
    lengths: Tensor | None = None,
    group_size: int | None = None,
    cu_groups: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    group_weights: Tensor | None = None,
    backend: str = "auto",
) -> RPOOutput:
    """RPO loss of groups of responses, from the log-probabilities of whole sequences.

        s_i = a_i (l_i - lref_i),   t_i = eta r*_i,   L = mean over groups of D[s || t]

    See `RPOObjective` for a, eta and D. Source: Sun et al., Reward-aware Preference Optimization,
    arXiv:2502.00203.

    Args:
        logps: `[S]`, log-probabilities l of the responses in nats: sums over tokens, also for
            objectives that average.
        rewards: `[S]`, explicit rewards r*; None for objectives with a fixed target, where the
            first response of each group is the chosen one.
        objective: what to minimise, or a weighted sum `[(weight, objective), ...]`, weights > 0.
            Its parts share groups, rewards and references; a part that uses none gets none.
        ref_logps: `[S]`, log-probabilities lref under the reference policy; `[R, S]` for objectives
            with several references, None for those without one. Gets no gradient.
        ref_weights: `[R]`, or `[R, G]` per group: weights of several references, with sum 1;
            uniform if None.
        lengths: `[S]` int, number of scored tokens of each response; needed by objectives that
            average or that normalise the SFT term. A response of length 0 is dropped from its
            group.
        group_size: K, responses per prompt, 2 by default; groups are contiguous.
        cu_groups: `[G+1]` int32 boundaries of ragged groups, in place of group_size.
        reduction: `"mean"` over the groups that have something to compare, `"sum"`, or `"none"` for
            `[G]`.
        normalizer: number or scalar tensor that the sum of the losses is divided by instead, for
            gradient accumulation and data parallelism.
        group_weights: `[G]`, factors on the losses of the groups; a mean is still one over the
            number of groups.
        backend: `"auto"` (Triton on a GPU, PyTorch elsewhere), `"triton"` or `"torch"`.

    Returns:
        `RPOOutput`, float32. Second derivatives raise.

    Raises:
        ValueError, TypeError: if an argument does not fit; checked before any launch.
    """
    op = "preference_loss"
    checks.check_tensor(op, "logps", logps)
    checks.check_float(op, "logps", logps)
    checks.check_tangents(op, logps)
    if logps.dim() != 1:
        raise ValueError(
            f"{op}: `logps` must be one number per sequence, [S]; got {checks.shape_of(logps)}; "
            "sum tokens with sequence_logps, flatten groups with logps.flatten()"
        )
    S = logps.shape[0]
    whole = group_checks.check_objective(op, objective)
    if isinstance(rewards, Tensor) and rewards.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: `rewards` gets no gradient, but requires one; pass rewards.detach(), or, if "
            "these are log-probabilities of the rejected responses, interleave both in `logps`: "
            "torch.stack([chosen, rejected], 1).flatten()"
        )
    if lengths is None:
        if whole.needs_lengths:
            raise ValueError(
                f"{op}: `lengths` must be [S] = [{S}] for this objective, which divides by the "
                "number of scored tokens, got None; pass (labels != -100).sum(1)"
            )
    else:
        checks.check_tensor(op, "lengths", lengths)
        if lengths.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{op}: `lengths` must be int64 or int32, got {lengths.dtype}")
        if lengths.shape != (S,):
            raise ValueError(
                f"{op}: `lengths` must be one number per sequence, [S] = [{S}]; got "
                f"{checks.shape_of(lengths)}"
            )
        checks.check_device(op, "lengths", lengths, logps.device)
    checks.check_backend(op, backend)
    groups = Groups.of(
        op,
        whole,
        Sequences(S),
        None,
        logps.device,
        rewards=rewards,
        ref_logps=ref_logps,
        ref_weights=ref_weights,
        group_size=group_size,
        cu_groups=cu_groups,
        reduction=reduction,
        normalizer=normalizer,
        group_weights=group_weights,
    )
    results = Losses(*_preference_loss.on(logps)(logps.float(), lengths, groups, backend))
    return output(reduction, results, lengths, groups)


def sequence_logps(
    token_logps: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    average: bool = False,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Sum token log-probabilities over sequences, or average them over the scored tokens.

        l_i = sum_t m_it lp_it           or, with average,  l_i / n_i,   n_i = sum_t m_it

    Args:
        token_logps: `[S, T]`, or packed `[N]` with cu_seqlens; 0 where not scored, as `token_logps`
            returns them.
        cu_seqlens: `[S+1]` int32 boundaries of packed sequences.
        average: divide by the number of scored tokens (at least 1); needs labels.
        labels: same shape; positions labelled ignore_index do not count, whatever token_logps is
            there.
        ignore_index: see labels.
        process_group: ranks that hold parts of the same sequences (context parallelism). Each
            passes its own tokens of every sequence, possibly none, and gets the sums over all
            ranks.

    Returns:
        float32 `[S]`, in nats, summed in float64; differentiable. With a process group, every rank
        must compute the same loss from the sums; its tokens then get the gradient of that one loss,
        so the gradient of a parameter is the sum over the ranks.

    Raises:
        ValueError, TypeError: if an argument does not fit.
    """
    op = "sequence_logps"
    with distributed.raising_together(op, process_group=process_group):
        return _sequence_logps(
            op, token_logps, cu_seqlens, average, labels, ignore_index, process_group
        )


def _sequence_logps(
    op: str,
    token_logps: Tensor,
    cu_seqlens: Tensor | None,
    average: bool,
    labels: Tensor | None,
    ignore_index: int,
    process_group: ProcessGroup | None,
) -> Tensor:
    distributed.group_name(op, process_group)
    checks.check_tensor(op, "token_logps", token_logps)
    checks.check_float(op, "token_logps", token_logps)
    checks.check_flag(op, "average", average)
    if labels is not None:
        checks.check_labels(op, labels, token_logps[..., None], "token_logps", ignore_index)
        checks.check_device(op, "labels", labels, token_logps.device)
    elif average:
        raise ValueError(
            f"{op}: `labels` must be {checks.shape_of(token_logps)} for average=True, which "
            "divides by the number of scored tokens, got None"
        )
    x = token_logps.double()
    scored = None if labels is None else labels.ne(ignore_index)
    if scored is not None:
        x = torch.where(scored, x, 0)
    sequences = Sequences.of(op, "token_logps", token_logps, cu_seqlens)
    sums = sequences.sum(x)[None]
    if average and scored is not None:
        sums = torch.cat([sums, sequences.sum(scored.double())[None]])
    if process_group is not None:
        sums = gather(op, sums, process_group).sum(0)
    return (sums[0] / sums[1].clamp(min=1) if average else sums[0]).float()


def output(reduction: str, results: Losses, lengths: Tensor | None, groups: Groups) -> RPOOutput:
    def of_part(loss: Tensor, losses: Tensor, part: PerSequence) -> RPOOutput:
        return RPOOutput(
            losses if reduction == "none" else loss,
            losses.detach(),
            part.rewards,
            part.logps,
            lengths,
            part.targets,
            groups.cu_groups,
        )

    loss, losses, part_losses, by_sequence = results
    parts = parts_of(by_sequence)
    whole = of_part(loss, losses, parts[0])
    if len(parts) == 1:
        return whole
    by_name = {
        name: of_part(x.sum() / _divisor(reduction, groups, part), x, part)
        for name, x, part in zip(names_of(groups.objective.parts), part_losses, parts)
    }
    return whole._replace(parts=by_name)


def _divisor(reduction: str, groups: Groups, part: PerSequence) -> Tensor | float:
    """What the sum of the losses of a part is divided by."""
    if groups.normalizer is not None:
        return groups.normalizer
    return (part.roles == 2).sum().clamp(min=1) if reduction == "mean" else 1.0


def _forward(
    logps: Tensor, lengths: Tensor | None, groups: Groups, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op, sequences = "preference_loss", Sequences(logps.shape[0])
    checks.check_length_values(op, lengths)
    groups.check_values(op, logps.device, sequences, 0)
    x, parts = logps.contiguous(), groups.parts()
    return group_pass(op, backend, x, None, lengths, sequences, parts, 0)[0]


def _fake_forward(
    logps: Tensor, lengths: Tensor | None, groups: Groups, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return fake_losses(logps, groups, logps.shape[0])


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    logps, _, groups, _ = inputs
    results = Losses(*output)
    ctx.save_for_backward(logps, results.by_sequence, groups.cu_groups)
    ctx.group_size = groups.group_size
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*results[2:])


def _backward(
    ctx: Any, dloss: Tensor | None, dlosses: Tensor | None, *_: None
) -> tuple[Tensor | None]:
    logps, by_sequence, cu_groups = ctx.saved_tensors
    coef = total(part.dlogps for part in parts_of(by_sequence))
    upstream = dloss
    if dlosses is not None:  # reduction="none"
        upstream = dlosses[groups_of(coef.shape[0], ctx.group_size, cu_groups, coef.device)]
    return (None if upstream is None else once_differentiable(coef * upstream, logps),)


_preference_loss = Operator(
    "preference_loss", 1, _forward, _fake_forward, _setup_context, _backward
)
