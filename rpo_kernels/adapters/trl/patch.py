"""TRL's fused LM head, computed by our kernels.

All trainers of TRL 1.16 get their log-probabilities from one function,
`trl.trainer.utils._ChunkedLogProbFunction`, which is looked up when the model is called. Replacing
that name serves them all, and leaves losses, metrics and generation unchanged.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import trl.trainer.utils as host
from torch import Tensor
from transformers.utils import logging
from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS

from rpo_kernels import (
    linear_token_logps,
    linear_token_logps_and_entropy,
    token_logps,
    token_logps_and_entropy,
)

from .version import check_version

logger = logging.get_logger(__name__)

ARGUMENTS = (
    "ctx",
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
)
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

# TRL's own, while replaced
_original: dict[str, Any] = {}
_active = 0


class LogProbs:
    """Replacement of TRL's autograd function, with the same arguments and outputs.

    Outputs that are not requested are None.
    """

    @staticmethod
    def apply(
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [N]
        temperature: float,
        chunk_size: int,  # unused: the workspace decides
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OUTPUTS,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        why = _not_ours(weight, temperature, logit_scale, outputs)
        if why:
            logger.warning_once(f"accelerate_trl: TRL's own log-probabilities are used where {why}")
            return _original["_ChunkedLogProbFunction"].apply(
                hidden,
                weight,
                bias,
                targets,
                temperature,
                chunk_size,
                final_logit_softcapping,
                logit_scale,
                outputs,
            )
        if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
            # with cast_lm_head_to_fp32
            weight, bias = (
                weight.to(hidden.dtype),
                None if bias is None else bias.to(hidden.dtype),
            )
        options: dict[str, Any] = {
            "bias": bias,
            "temperature": temperature,
            "logit_scale": logit_scale,
            "softcap": final_logit_softcapping,
            "count": targets.numel(),
        }
        rest = RowStatistics(set(outputs) & {"log_sum_sq_probs", "mean_logits", "is_top1"})
        options["on_logits"] = rest if rest.wanted and targets.numel() else None
        entropy = None
        if "entropy" in outputs:
            logps, entropy = linear_token_logps_and_entropy(hidden, weight, targets, **options)
        else:
            logps = linear_token_logps(hidden, weight, targets, **options)
        return (
            logps,
            entropy,
            rest.of("log_sum_sq_probs", logps),
            rest.of("mean_logits", logps),
            rest.of("is_top1", logps),
        )


def _not_ours(
    weight: Tensor, temperature: float, logit_scale: float, outputs: tuple[str, ...]
) -> str | None:
    """Return why TRL's own function must serve a call, or None."""
    if hasattr(weight, "ds_id"):
        return "DeepSpeed ZeRO-3 takes the LM head apart between forward and backward"
    if temperature <= 0 or logit_scale <= 0:
        return f"temperature or logit scale is not positive ({temperature}, {logit_scale})"
    unknown = set(outputs) - {"log_probs", *OUTPUTS}
    return f"an unknown output is asked ({', '.join(sorted(unknown))})" if unknown else None


class RowStatistics:
    """Statistics of whole rows of logits for TRL's metrics, without gradients.

        z = softcap tanh(logit_scale x / softcap) / temperature,   p = softmax(z)

    They are `entropy` H(p), `log_sum_sq_probs` log sum p^2, `mean_logits` mean z, and `is_top1`,
    whether the label has the largest logit.
    """

    def __init__(self, wanted: set[str]):
        self.wanted = wanted
        self.parts: dict[str, list[Tensor]] = {name: [] for name in wanted}

    def __call__(self, logits: Tensor, labels: Tensor, transform: dict) -> None:
        """Process a chunk `[n, V]`; this is an `on_logits` of the linear functions."""
        temperature, scale, softcap = (
            transform[name] for name in ("temperature", "logit_scale", "softcap")
        )
        for name, parts in self.parts.items():
            if name == "entropy":
                parts.append(token_logps_and_entropy(logits, labels, **transform)[1])
            elif name == "is_top1":
                # z grows with x; the first of equal ones, as in TRL
                parts.append(logits.argmax(-1) == labels)
            # log p^2 = 2 z - 2 lse(z), and 2 z is z at half the temperature
            elif name == "log_sum_sq_probs":
                halved = token_logps(logits, labels, **transform | {"temperature": temperature / 2})
                parts.append(2 * token_logps(logits, labels, **transform) - halved)
            elif softcap is None:
                parts.append(logits.mean(-1, dtype=torch.float32) * (scale / temperature))
            else:
                parts.append(
                    (logits * (scale / softcap)).tanh_().mean(-1, dtype=torch.float32)
                    * (softcap / temperature)
                )

    def of(self, name: str, like: Tensor) -> Tensor | None:
        """Return `rows`, or None if it is not requested."""
        return self.rows(name, like) if name in self.wanted else None

    def rows(self, name: str, like: Tensor) -> Tensor:
        """Return a statistic `[N]` of all rows, in the order in which they came."""
        return (
            torch.cat(self.parts[name])
            if self.parts[name]
            else like.new_zeros(0, dtype=None if name != "is_top1" else torch.bool)
        )


class Acceleration:
    """Result of `accelerate_trl`: call `undo()`, or use it as a context manager.

    Nested ones end with the last.
    """

    def __init__(self) -> None:
        global _active
        if not _active:
            for name, ours in (
                ("_ChunkedLogProbFunction", LogProbs),
                ("_use_triton", _scores_valid_positions_only),
            ):
                _original[name] = getattr(host, name)
                setattr(host, name, ours)
        _active += 1
        self._undone = False

    def undo(self) -> None:
        """Restore TRL's own function; a second call does nothing."""
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

    def __exit__(self, *_: object) -> None:
        self.undo()


def accelerate_trl() -> Acceleration:
    """Make TRL's trainers (DPO, KTO, GRPO, RLOO, SFT, subclasses) use our kernels.

        accelerate_trl()                # for the rest of the process

        with accelerate_trl():          # temporarily
            trainer.train()

    Losses and metrics keep their values, except that 16-bit runs are more accurate: our logits are
    fp32, where TRL rounds them to the compute dtype. On a CPU, too, only scored positions are
    computed.

    Other quantities that TRL requests (entropy, mean logit, top-1, sum of squared probabilities)
    are computed from the same chunks of logits, without another GEMM. Calls that the kernels do not
    support (ZeRO-3, scales that are not positive) use TRL's own function, which is logged once.

    Returns:
        `Acceleration`, whose `undo()` restores TRL.

    Raises:
        ImportError: for an untested release of TRL.
        RuntimeError: if TRL's function has another signature than in the tested release.
    """
    check_version()
    if not _active:
        _check_signature()
    return Acceleration()


def _check_signature() -> None:
    found = tuple(inspect.signature(host._ChunkedLogProbFunction.forward).parameters)
    if (
        found != ARGUMENTS
        or OPTIONAL_OUTPUTS != OUTPUTS
        or not callable(getattr(host, "_use_triton", None))
    ):
        raise RuntimeError(
            "accelerate_trl: TRL's `_ChunkedLogProbFunction.forward` must take "
            f"({', '.join(ARGUMENTS)}) and offer {', '.join(OUTPUTS)}; got ({', '.join(found)}) "
            f"and {', '.join(OPTIONAL_OUTPUTS)}: did another package patch TRL?"
        )


def _scores_valid_positions_only(device: torch.device) -> bool:
    """TRL selects positions where its Triton kernels run; ours take any number on a CPU, too."""
    return device.type == "cpu" or _original["_use_triton"](device)
