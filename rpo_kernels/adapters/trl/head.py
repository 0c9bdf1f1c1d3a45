"""TRL's fused LM head on our kernels.

Every trainer of TRL 1.16 gets its log-probabilities from one function, ``trl.trainer.utils._ChunkedLogProbFunction``, looked up
when the model is called. Replacing that name serves them all, and leaves losses, metrics and generation as they are.
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
import trl.trainer.utils as host
from torch import Tensor
from transformers.utils import logging
from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS

from rpo_kernels import linear_token_logps, linear_token_logps_and_entropy

from .version import check_version

logger = logging.get_logger(__name__)

ARGUMENTS = (
    "ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping", "logit_scale", "outputs",
)  # fmt: skip
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
CHUNK_BYTES = 256 << 20  # of the logits that statistics are read from

# What TRL has, while ours takes its place.
_original: dict[str, object] = {}
_active = 0


class LogProbs:
    """Stands where TRL has an autograd function: same arguments, same five outputs, None for what is not asked."""

    @staticmethod
    def apply(
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [N]
        temperature: float,
        chunk_size: int,  # ours follows from the workspace
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OUTPUTS,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        why = _not_ours(weight, temperature, logit_scale, outputs)
        if why:
            logger.warning_once(f"accelerate_trl: TRL's own log-probabilities are used where {why}")
            return _original["_ChunkedLogProbFunction"].apply(
                hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
            )
        if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
            weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)  # cast_lm_head_to_fp32
        options = {
            "bias": bias,
            "temperature": temperature,
            "logit_scale": logit_scale,
            "softcap": final_logit_softcapping,
            "count": targets.numel(),
        }
        entropy = None
        if "entropy" in outputs:
            logps, entropy = linear_token_logps_and_entropy(hidden, weight, targets, **options)
        else:
            logps = linear_token_logps(hidden, weight, targets, **options)
        rest = _statistics(hidden, weight, bias, targets, temperature, final_logit_softcapping, logit_scale, outputs)
        return logps, entropy, rest.get("log_sum_sq_probs"), rest.get("mean_logits"), rest.get("is_top1")


def _not_ours(weight: Tensor, temperature: float, logit_scale: float, outputs: tuple[str, ...]) -> str | None:
    """Why this call stays TRL's, if it does."""
    if hasattr(weight, "ds_id"):
        return "DeepSpeed ZeRO-3 takes the LM head apart between forward and backward"
    if temperature <= 0 or logit_scale <= 0:
        return f"temperature or logit scale is not positive ({temperature}, {logit_scale})"
    unknown = set(outputs) - {"log_probs", *OUTPUTS}
    return f"an unknown output is asked ({', '.join(sorted(unknown))})" if unknown else None


@torch.no_grad()
def _statistics(hidden, weight, bias, targets, temperature, softcap, logit_scale, outputs) -> dict[str, Tensor]:
    """What only TRL's metrics read, none of it differentiable: log sum p^2, the mean of z, and whether the target leads.

        z = softcap tanh(logit_scale (hidden weight^T + bias) / softcap) / temperature

    As in TRL, from logits in the dtype of the GEMM.
    """
    scale = logit_scale / temperature
    found: dict[str, Tensor] = {}
    if "mean_logits" in outputs and softcap is None:  # linear in the weight: no logits needed
        mean = weight.mean(0, dtype=torch.float32)
        found["mean_logits"] = scale * (hidden.float() @ mean + (0.0 if bias is None else bias.float().mean()))
    wanted = {"log_sum_sq_probs", "mean_logits", "is_top1"} & set(outputs) - set(found)
    if not wanted:
        return found
    columns: dict[str, list[Tensor]] = {name: [] for name in wanted}
    rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    for x, y in zip(hidden.split(rows), targets.split(rows)):
        z = F.linear(x, weight, bias).float()
        if softcap is None:
            z *= scale
        else:
            z = z.mul_(logit_scale / softcap).tanh_().mul_(softcap / temperature)
        if "mean_logits" in wanted:
            columns["mean_logits"].append(z.mean(-1))
        if "is_top1" in wanted:
            columns["is_top1"].append(z.argmax(-1) == y)  # the first of equals, as in TRL
        if "log_sum_sq_probs" in wanted:
            lse = z.logsumexp(-1)
            columns["log_sum_sq_probs"].append(z.mul_(2).logsumexp(-1) - 2 * lse)
    return found | {name: torch.cat(parts) for name, parts in columns.items()}


class Acceleration:
    """What :func:`accelerate_trl` returns: ``undo()`` it, or use it as a context manager. Nested ones end with the last."""

    def __init__(self) -> None:
        global _active
        if not _active:
            for name, ours in (("_ChunkedLogProbFunction", LogProbs), ("_use_triton", _scores_valid_positions_only)):
                _original[name] = getattr(host, name)
                setattr(host, name, ours)
        _active += 1
        self._undone = False

    def undo(self) -> None:
        """Give TRL its own function back. A second call does nothing."""
        global _active
        if self._undone:
            return
        self._undone = True
        _active -= 1
        if not _active:
            for name, theirs in _original.items():
                setattr(host, name, theirs)

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(self, *_) -> None:
        self.undo()


def accelerate_trl() -> Acceleration:
    """Let TRL's trainers compute log-probabilities and entropies on our kernels: DPO, KTO, GRPO, RLOO, SFT, and what subclasses them.

    Losses and metrics keep their values: logits are fp32 where TRL rounds them to the compute dtype, so 16-bit runs come out
    closer to the truth, not equal to the last digit. On a CPU only scored positions take part, as elsewhere.

        accelerate_trl()                            # for the rest of the process
        with accelerate_trl(): trainer.train()      # or for a while

    ``mean_logits`` needs no logits unless they are soft-capped; ``is_top1`` (DPO's and SFT's ``mean_token_accuracy``) and
    ``log_sum_sq_probs`` (DPO's ``use_weighting``) cost one more GEMM forward. Calls that the kernels cannot serve (ZeRO-3, scales that are not
    positive) go to TRL's own function, which is said once in the log.

    Returns:
        :class:`Acceleration`, whose ``undo()`` restores TRL.

    Raises:
        ImportError: for a release of TRL that was not tested.
        RuntimeError: where TRL's function has another signature than the tested one.
    """
    check_version()
    if not _active:
        _check_signature()
    return Acceleration()


def _check_signature() -> None:
    found = tuple(inspect.signature(host._ChunkedLogProbFunction.forward).parameters)
    if found != ARGUMENTS or OPTIONAL_OUTPUTS != OUTPUTS or not callable(getattr(host, "_use_triton", None)):
        raise RuntimeError(
            f"accelerate_trl: TRL's `_ChunkedLogProbFunction.forward` must take ({', '.join(ARGUMENTS)}) and offer "
            f"{', '.join(OUTPUTS)}; found ({', '.join(found)}) and {', '.join(OPTIONAL_OUTPUTS)}: is TRL patched by someone else?"
        )


def _scores_valid_positions_only(device: torch.device) -> bool:
    """TRL compacts where its own Triton kernels run; ours take any number of rows on a CPU too."""
    return device.type == "cpu" or _original["_use_triton"](device)
