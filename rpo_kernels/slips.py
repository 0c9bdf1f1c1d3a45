"""The likely slip behind an argument that does not fit: the end of a message, "" where none is
likely. docs/errors.md shows them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def of_tensor(name: str, x: object) -> str:
    """``x`` is no tensor, but may hold the one that was meant."""
    attribute = {"hidden": "last_hidden_state", "weight": "weight", "logits": "logits"}.get(
        name.removeprefix("ref_"), ""
    )
    if isinstance(getattr(x, attribute, None), Tensor):
        return f"; pass its .{attribute}"
    if isinstance(x, (list, tuple)) and x and all(isinstance(i, (int, float)) for i in x):
        return f"; pass torch.tensor({name})"
    return ""


def of_label_dtype(labels: Tensor) -> str:
    if labels.dtype == torch.bool:
        return "; did you pass a mask? shift_labels(input_ids, mask) makes labels"
    return "; pass labels.long()"


def of_label_shape(labels: Tensor, like: Tensor, name: str) -> str:
    """Labels have another shape than logits or hidden states."""
    got, expected = list(labels.shape), list(like.shape[:-1])
    if labels.numel() == math.prod(expected):
        return "; flatten both or neither" if 1 in (len(got), len(expected)) else ""
    if got[:-1] == expected:
        return f"; pass `{name}` of all positions, not of one"
    if len(got) == len(expected) and got[:-1] == expected[:-1]:
        if got[-1] == expected[-1] + 1:
            slip = "labels[:, 1:]" if len(got) == 2 else "labels[1:]"
            return f"; labels[t] is the token that position t predicts, did you mean `{slip}`?"
        if got[-1] == expected[-1] - 1:
            return "; shift_labels(input_ids, mask) shifts them and keeps their length"
    return ""


def of_label(op: str, label: int, V: int, ignore_index: int) -> str:
    """A label lies outside the vocabulary."""
    if label < 0:
        return f"; pass {ignore_index} where nothing is scored, or ignore_index={label}"
    if op.startswith("linear_"):
        return f"; the head has {V} rows"
    return f"; the logits have {V} columns, call linear_{op} with hidden states"


def of_offsets(name: str, offsets: Tensor, total: int) -> str:
    """Boundaries do not begin at 0 and end at the total."""
    if int(offsets.sum()) == total:  # sizes
        return f"; pass torch.nn.functional.pad({name}.cumsum(0, dtype=torch.int32), (1, 0))"
    if int(offsets[0]) and int(offsets[-1]) == total:
        return f"; pass torch.nn.functional.pad({name}, (1, 0))"
    return ""


def of_reference(got: tuple[int, ...], shapes: list[tuple[int, ...]]) -> str:
    """One reference's log-probabilities have another shape than ``[S]``, or per token."""
    (S,), tokens = shapes[0], shapes[-1]
    if got[1:] in shapes:
        return "; several references need an objective with reference='harmonic' or 'geometric'"
    if math.prod(got) == S:
        return "; pass ref_logps.flatten()"
    if len(tokens) == 2 and got == (S, tokens[1] - 1):
        return "; pass torch.nn.functional.pad(ref_logps, (0, 1)): the last position predicts none"
    if len(shapes) == 1 and len(got) == 2 and got[0] == S:
        return "; pass sequence_logps(ref_logps)"
    return ""
