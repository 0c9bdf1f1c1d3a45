"""Labels aligned with logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks


def shift_labels(
    input_ids: Tensor, mask: Tensor, *, cu_seqlens: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """Align labels with logits.

        labels[t] = input_ids[t + 1]  if mask[t + 1],  else ignore_index

    Shifting the labels instead of the logits avoids a copy of `[S, T, V]`.

    Args:
        input_ids: `[..., T]` int64 or int32, or packed `[N]`.
        mask: same shape, bool or 0/1: the tokens to score (the response, without prompt and
            padding).
        cu_seqlens: `[S+1]` int32 boundaries of packed sequences; the last token of each predicts
            nothing.
        ignore_index: label of the positions that are not scored.

    Returns:
        Labels of the shape and dtype of input_ids.

    Raises:
        ValueError, TypeError: if an argument does not fit.
    """
    op = "shift_labels"
    checks.check_tensor(op, "input_ids", input_ids)
    checks.check_tensor(op, "mask", mask)
    checks.check_integers(op, "input_ids", input_ids)
    checks.check_ignore_index(op, ignore_index, input_ids.dtype)
    if not input_ids.dim() or (cu_seqlens is not None and input_ids.dim() != 1):
        expected = "[..., T]" if cu_seqlens is None else "packed [N] with `cu_seqlens`"
        raise ValueError(f"{op}: `input_ids` must be {expected}, got {checks.shape_of(input_ids)}")
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"{op}: `mask` must have the shape of `input_ids`, {checks.shape_of(input_ids)}; got "
            f"{checks.shape_of(mask)}"
        )
    checks.check_device(op, "mask", mask, input_ids.device)
    if cu_seqlens is not None:
        checks.check_offsets(op, "cu_seqlens", cu_seqlens, input_ids.device)
        checks.check_offset_values(op, "cu_seqlens", cu_seqlens, input_ids.shape[-1], "tokens")
    labels = torch.full_like(input_ids, ignore_index)
    labels[..., :-1] = torch.where(mask[..., 1:].bool(), input_ids[..., 1:], ignore_index)
    if cu_seqlens is not None and labels.numel():
        # -1, if the first sequence is empty, is also the last token of one
        labels[cu_seqlens[1:].long() - 1] = ignore_index
    return labels
