"""The vocabulary pass: rows of logits to token log-probabilities, and coefficients back to gradients of logits.

z = post * y,   y = x                 (post = logit_scale / temperature)
                y = tanh(pre * x)     (pre = logit_scale / softcap, post = softcap / temperature)
"""

from __future__ import annotations

import torch

from .backward import _vocabulary_backward_kernel
from .forward import _vocabulary_forward_kernel, _vocabulary_merge_kernel
from .launch import MAX_PROGRAMS, Launcher, arch_of, launch_settings, part_width, splits_rows

_launch_forward, _launch_merge = Launcher(_vocabulary_forward_kernel), Launcher(_vocabulary_merge_kernel)
_launch_backward = Launcher(_vocabulary_backward_kernel)


def transform_factors(temperature: float, logit_scale: float, softcap: float) -> tuple[float, float]:
    if softcap > 0:
        return logit_scale / softcap, softcap / temperature
    return 0.0, logit_scale / temperature


def vocabulary_forward(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Log p(label) ``[N]``, logsumexp ``[2, N]`` and if asked entropy ``[N]``, fp32, of rows ``[outer, inner, V]``; labels ``[N]``.

    The logsumexp of z comes as (integer, fraction), in units of log 2: their sum would round the digits of small logits away.
    """
    N = labels.numel()
    logps = logits.new_empty(N, dtype=torch.float32)
    lse, entropies = logps.new_empty((2, N)), torch.empty_like(logps) if entropy else None
    _forward(logits, labels, logps, lse, entropies, temperature, logit_scale, softcap, ignore_index, entropy, is_shard=False)
    return logps, lse, entropies


def shard_statistics(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    entropy: bool,
) -> torch.Tensor:
    """What ``shards.combine`` needs of one shard of the columns, fp32 ``[3 or 4, N]``; labels count from its first column.

    The label's y (-inf for label -1, which lies on another shard); of the other columns an exponent, the sum of e^z relative to two
    to that power, and if asked the sum of those times log2 of them.
    """
    statistics = torch.empty((4 if entropy else 3, labels.numel()), dtype=torch.float32, device=logits.device)
    if logits.shape[2]:
        outputs = statistics[0], statistics[1:3], statistics[3:]
        _forward(logits, labels, *outputs, temperature, logit_scale, softcap, ignore_index, entropy, is_shard=True)
    else:
        statistics[1:] = 0
        statistics[0] = torch.where((labels == -1) | (labels == ignore_index), -torch.inf, torch.nan)
    return statistics


def _forward(logits, labels, logps, lse, entropies, temperature, logit_scale, softcap, ignore_index, entropy, is_shard) -> None:
    V, N = logits.shape[2], labels.numel()
    if not N:
        return
    pre, post = transform_factors(temperature, logit_scale, softcap)
    settings = launch_settings("forward", V, logits.element_size(), arch_of(logits.device))
    width = part_width(V, settings.tile)
    parts = -(-V // width)
    split = parts > 1 and splits_rows(N, logits.device)
    partial = torch.empty((N, parts, 3), dtype=torch.float32, device=logits.device) if split else None
    rows = (N, V, logits.shape[1], *logits.stride()[:2])
    plain = softcap == 0 and not entropy
    _launch_forward(
        min(N * parts if split else N, MAX_PROGRAMS),
        (logits, labels, logps, lse, entropies, partial),
        (*rows, width, ignore_index),
        (pre, post),
        {
            "SPLIT": split, "IS_SHARD": is_shard, "HAS_SOFTCAP": softcap > 0, "HAS_ENTROPY": entropy,
            "POLYNOMIAL": settings.polynomial if plain else 0, "LANES": settings.lanes, "VEC": settings.vec,
            "STAGES": settings.num_stages, **settings.compiler[plain],
        },
    )  # fmt: skip
    if split:
        _launch_merge(
            N,
            (logits, labels, partial, logps, lse, entropies),
            (*rows, parts, ignore_index),
            (pre, post),
            {"IS_SHARD": is_shard, "HAS_SOFTCAP": softcap > 0, "HAS_ENTROPY": entropy, "num_warps": 1},
        )


def vocabulary_backward(
    logits: torch.Tensor,
    labels: torch.Tensor,
    logps: torch.Tensor,
    lse: torch.Tensor,
    coef: torch.Tensor,
    *,
    entropies: torch.Tensor | None,
    entropy_coef: torch.Tensor | None,
    upstream: torch.Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    out: torch.Tensor,
) -> None:
    """Write dL/dlogits into ``out`` ``[outer, inner, V]`` (``logits`` itself to work in place), given dL/dlogp ``[N]``."""
    outer, inner, V = logits.shape
    N = outer * inner
    if not N or not V:
        return
    pre, post = transform_factors(temperature, logit_scale, softcap)
    settings = launch_settings("backward", V, out.element_size(), arch_of(logits.device))
    width = part_width(V, settings.tile) if splits_rows(N, logits.device) else V
    pieces = -(-V // width)
    plain = softcap == 0 and entropy_coef is None
    _launch_backward(
        min(N * pieces, MAX_PROGRAMS),
        (logits, labels, logps, lse, coef, entropies, entropy_coef, upstream, out),
        (N, V, inner, *logits.stride()[:2], *out.stride()[:2], width, pieces, ignore_index),
        (pre, post),
        {
            "IN_PLACE": logits.data_ptr() == out.data_ptr() and logits.stride() == out.stride(),
            "HAS_SOFTCAP": softcap > 0, "HAS_ENTROPY": entropy_coef is not None, "HAS_UPSTREAM": upstream is not None,
            "LANES": settings.lanes, "VEC": settings.vec, **settings.compiler[plain],
        },
    )  # fmt: skip
