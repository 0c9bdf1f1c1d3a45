"""The RPO loss of sequence log-probabilities, and sums of token log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import checks, distributed
from ..backend import engine
from ..objectives import RPOObjective
from .autograd import once_differentiable, operator
from .gather import gather
from .output import RPOOutput


def preference_loss(
    logps: Tensor,
    rewards: Tensor | None,
    objective: RPOObjective,
    *,
    ref_logps: Tensor | None = None,
    ref_weights: Tensor | None = None,
    lengths: Tensor | None = None,
    group_size: int | None = None,
    cu_groups: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    backend: str = "auto",
) -> RPOOutput:
    """RPO loss D[s || t] of groups of responses, from the log-probabilities of whole sequences.

        s_i = a_i (l_i - lref_i),   t_i = eta r*_i,   L = mean over groups of D[s || t]      (see :class:`RPOObjective`)

    Args:
        logps: ``[S]`` log-probabilities of the responses, in nats: sums over tokens, also for objectives that average.
        rewards: ``[S]`` explicit rewards r*, or None for objectives with a target of their own, where the first response of
            each group is the chosen one.
        objective: what to minimise.
        ref_logps: ``[S]`` of the reference policy; ``[R, S]`` for objectives with several references; None for
            reference-free ones. No gradient.
        ref_weights: ``[R]``, or ``[R, G]`` per group: weights alpha of several references, summing to 1; uniform if None.
        lengths: ``[S]`` int, scored tokens of each response; needed by objectives that average, or normalise the SFT term.
            A response of length 0 is dropped from its group.
        group_size: K, responses per prompt, 2 by default; groups are contiguous.
        cu_groups: ``[G+1]`` int32 boundaries of ragged groups, in place of group_size.
        reduction: ``"mean"`` over the groups that have something to compare, ``"sum"``, or ``"none"`` for ``[G]``.
        normalizer: number or scalar tensor that divides the sum of losses instead, for gradient accumulation and data
            parallelism.
        backend: ``"auto"`` (Triton on a GPU, PyTorch elsewhere), ``"triton"`` or ``"torch"``.

    Returns:
        :class:`RPOOutput`; float32. Second derivatives raise.

    Raises:
        ValueError, TypeError: for arguments that do not fit, before anything is launched.
    """
    op = "preference_loss"
    checks.check_tensor(op, "logps", logps)
    checks.check_float(op, "logps", logps)
    if logps.dim() != 1:
        raise ValueError(f"{op}: `logps` must be one number per sequence, [S]; got {checks.shape_of(logps)}")
    S = logps.shape[0]
    checks.check_objective(op, objective)
    if lengths is None:
        if objective.needs_lengths:
            raise ValueError(f"{op}: `lengths` are missing: this objective divides by the number of scored tokens")
    else:
        checks.check_tensor(op, "lengths", lengths)
        if lengths.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{op}: `lengths` must be int64 or int32, got {lengths.dtype}")
        if lengths.shape != (S,):
            raise ValueError(f"{op}: `lengths` must be one number per sequence, [S] = [{S}]; got {checks.shape_of(lengths)}")
        checks.check_device(op, "lengths", lengths, logps.device)
    inputs = prepare(op, objective, logps.device, S, [(S,)], rewards, ref_logps, ref_weights, None, group_size, cu_groups,
                     reduction, normalizer, backend)  # fmt: skip
    loss, losses, by_sequence = _forward_op(logps.float(), lengths, *inputs)
    return output(reduction, loss, losses, by_sequence, lengths, cu_groups)


@distributed.agreeing
def sequence_logps(
    token_logps: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    average: bool = False,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Log-probabilities of sequences: l_i = sum_t m_it lp_it, or that over n_i = sum_t m_it.

    Args:
        token_logps: ``[S, T]``, or packed ``[N]`` with cu_seqlens; 0 where not scored, as :func:`token_logps` returns it.
        cu_seqlens: ``[S+1]`` int32 boundaries of packed sequences.
        average: divide by the number of scored tokens (at least 1), which needs labels.
        labels: same shape; positions that hold ignore_index do not count, whatever token_logps holds there.
        ignore_index: see labels.
        process_group: ranks that hold parts of the same sequences (context parallelism): sums run over the tokens of all. Each
            rank passes its own tokens of every sequence, perhaps none, and gets the same sums.

    Returns:
        float32 ``[S]``, in nats; summed in float64. Differentiable. With a process group each rank is to compute the same loss
        from the sums; its tokens then get the gradient of that one loss, so gradients of parameters are sums over the ranks.
    """
    op = "sequence_logps"
    distributed.group_name(op, process_group)
    checks.check_tensor(op, "token_logps", token_logps)
    checks.check_float(op, "token_logps", token_logps)
    if labels is not None:
        checks.check_labels(op, labels, token_logps[..., None], "token_logps", ignore_index)
        checks.check_device(op, "labels", labels, token_logps.device)
    elif average:
        raise ValueError(f"{op}: `labels` are missing: average=True divides by the number of scored tokens")
    x = token_logps.double()
    if labels is not None:
        x = torch.where(labels != ignore_index, x, 0)
    segments = Segments.of(op, "token_logps", token_logps, cu_seqlens)
    sums = segments.sum(x)[None]
    if average:
        sums = torch.cat([sums, segments.sum((labels != ignore_index).double())[None]])
    if process_group is not None:
        sums = gather(op, sums, process_group).sum(0)
    return (sums[0] / sums[1].clamp(min=1) if average else sums[0]).float()


class Segments:
    """How tokens lie in sequences: rows of ``[S, T]``, or packed ``[N]`` between offsets."""

    def __init__(self, sequences: int, cu_seqlens: Tensor | None):
        self.sequences, self.cu_seqlens = sequences, cu_seqlens

    @staticmethod
    def of(op: str, name: str, tokens: Tensor, cu_seqlens: Tensor | None) -> Segments:
        if cu_seqlens is None:
            if tokens.dim() != 2:
                raise ValueError(
                    f"{op}: `{name}` must be rows [S, T], or packed [N] with `cu_seqlens`; got {checks.shape_of(tokens)}"
                    f"{' without cu_seqlens' if tokens.dim() == 1 else ''}"
                )
            return Segments(tokens.shape[0], None)
        if tokens.dim() != 1:
            raise ValueError(f"{op}: with `cu_seqlens`, `{name}` must be packed [N], got {checks.shape_of(tokens)}")
        checks.check_offsets(op, "cu_seqlens", cu_seqlens, tokens.device)
        checks.check_offset_values(op, "cu_seqlens", cu_seqlens, tokens.shape[0], "tokens")
        return Segments(cu_seqlens.shape[0] - 1, cu_seqlens)

    def sum(self, x: Tensor) -> Tensor:
        if self.cu_seqlens is None:
            return x.sum(1)
        offsets = self.cu_seqlens.long()
        inside = offsets.clamp(0, x.shape[0]).cummax(0).values  # where no check sees them, bad offsets give NaN
        broken = (inside != offsets).any() | (offsets[0] != 0) | (offsets[-1] != x.shape[0])
        total = torch.segment_reduce(x, "sum", offsets=inside, axis=0, initial=0, unsafe=True)
        return torch.where(broken, torch.nan, total)


def prepare(
    op, objective, device, S, ref_shapes, rewards, ref_logps, ref_weights, cu_seqlens, group_size, cu_groups, reduction,
    normalizer, backend,
) -> tuple:  # fmt: skip
    """Check what the group pass takes and bring it into the types of an operator."""
    group_size = checks.check_groups(op, objective, S, group_size, cu_groups, device)
    G = S // group_size if cu_groups is None else cu_groups.shape[0] - 1
    checks.check_rewards(op, rewards, objective, S, device)
    checks.check_reference(op, objective, ref_logps, ref_weights, ref_shapes, G, device)
    checks.check_normalizer(op, reduction, normalizer, device)
    checks.check_backend(op, backend)
    if rewards is not None:
        rewards = _constant(rewards)
    if ref_logps is not None:
        several = objective.reference in ("harmonic", "geometric")
        ref_logps = _constant(ref_logps).view(ref_logps.shape[0] if several else 1, -1)
        if several:
            R = ref_logps.shape[0]
            ref_weights = torch.full((R,), 1 / R, device=device) if ref_weights is None else ref_weights.detach().float()
    if normalizer is not None:
        is_tensor = isinstance(normalizer, Tensor)
        normalizer = _constant(normalizer).view(()) if is_tensor else torch.full((), normalizer, dtype=torch.float32, device=device)
    return (rewards, ref_logps, ref_weights, cu_groups, normalizer, group_size, objective.spec, reduction == "mean", backend)


def _constant(x: Tensor) -> Tensor:
    """In float32, contiguous and without a gradient; most are already."""
    if x.dtype == torch.float32 and not x.requires_grad and x.is_contiguous():
        return x
    return x.detach().float().contiguous()


def group_pass(
    op, logps, labels, ignore_index, S, lengths, cu_seqlens, rewards, ref_logps, ref_weights, cu_groups, normalizer,
    group_size, spec, mean, backend, sft_share=None, ref_per_token=False,
):  # fmt: skip
    """Run the group pass of the chosen engine, on values that ``checks.check_group_values`` has seen."""
    objective = RPOObjective.from_spec(spec)
    # kernels know no strides of these
    lengths, cu_seqlens, cu_groups = [None if x is None else x.contiguous() for x in (lengths, cu_seqlens, cu_groups)]
    return engine(op, backend, logps.device, "preference").preference_forward(
        logps, objective, labels=labels, ignore_index=ignore_index, sequences=S, group_size=group_size, lengths=lengths,
        cu_seqlens=cu_seqlens, cu_groups=cu_groups, ref_logps=ref_logps, ref_per_token=ref_per_token, ref_weights=ref_weights,
        rewards=rewards, normalizer=normalizer, sft_share=sft_share, mean=mean,
    )  # fmt: skip


def output(reduction, loss, losses, by_sequence, lengths, cu_groups) -> RPOOutput:
    rewards, logps, targets = by_sequence.unbind()[:3]
    return RPOOutput(losses if reduction == "none" else loss, losses.detach(), rewards, logps, lengths, targets, cu_groups)


def groups_of(S: int, group_size: int, cu_groups: Tensor | None, device: torch.device) -> Tensor:
    """Group of each sequence, ``[S]``."""
    sequence = torch.arange(S, device=device, dtype=torch.int32)
    if cu_groups is None:
        return sequence // group_size
    return torch.searchsorted(cu_groups[1:-1], sequence, right=True)


@operator("preference_loss")
def _forward_op(
    logps: Tensor,
    lengths: Tensor | None,
    rewards: Tensor | None,
    ref_logps: Tensor | None,
    ref_weights: Tensor | None,
    cu_groups: Tensor | None,
    normalizer: Tensor | None,
    group_size: int,
    objective: str,
    mean: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    op, S = "preference_loss", logps.shape[0]
    checks.check_length_values(op, lengths)
    spec = RPOObjective.from_spec(objective)
    checks.check_group_values(op, logps.device, spec, S, 0, None, cu_groups, rewards, ref_weights, normalizer)
    loss, losses, by_sequence, _, _ = group_pass(
        op, logps.contiguous(), None, 0, S, lengths, None, rewards, ref_logps, ref_weights,
        cu_groups, normalizer, group_size, objective, mean, backend,
    )  # fmt: skip
    return loss, losses, by_sequence


@_forward_op.register_fake
def _(logps, lengths, rewards, ref_logps, ref_weights, cu_groups, normalizer, group_size, objective, mean, backend):
    G = logps.shape[0] // group_size if cu_groups is None else cu_groups.shape[0] - 1
    return logps.new_empty(()), logps.new_empty(G), logps.new_empty(5, logps.shape[0])


def _setup_context(ctx, inputs, output):
    logps, _, _, _, _, cu_groups, _, ctx.group_size, *_ = inputs
    ctx.save_for_backward(logps, output[2], cu_groups)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])


def _backward(ctx, dloss, dlosses, _):
    logps, by_sequence, cu_groups = ctx.saved_tensors
    coef = by_sequence[3]
    upstream = dloss
    if dlosses is not None:  # reduction "none"
        upstream = dlosses[groups_of(coef.shape[0], ctx.group_size, cu_groups, coef.device)]
    return (None if upstream is None else once_differentiable(coef * upstream, logps), *(None,) * 10)


_forward_op.register_autograd(_backward, setup_context=_setup_context)
