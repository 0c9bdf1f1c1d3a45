"""Checks of arguments; messages name the operation, the argument, what was expected and what came.

Shapes, dtypes and devices are always checked. Values are checked where reading them is free: on a
CPU, and not while a graph is traced (its operators check when they run). On a GPU reading them
would synchronise; there the kernels turn invalid values into NaN losses, without reading out of
bounds.
"""

from __future__ import annotations

import math
from typing import TypeGuard

import torch
from torch import Tensor

from .backend import BACKENDS
from .tangents import check_tangents

_LOGITS = (torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32)
_FP32 = torch.finfo(torch.float32)


def shape_of(x: Tensor) -> str:
    return "[" + ", ".join(map(str, x.shape)) + "]"


def check_tensor(op: str, name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{op}: `{name}` must be a torch.Tensor, got {type(x).__name__}{_tensor_in(name, x)}"
        )
    if x.is_nested:
        raise TypeError(
            f"{op}: `{name}` must be a plain tensor, got a nested one; pass {name}.values(), "
            f"packed, and {name}.offsets().int() as `cu_seqlens` where sequences matter"
        )


def _tensor_in(name: str, x: object) -> str:
    """Where the tensor is, in what is often passed in its place."""
    attribute = {"hidden": "last_hidden_state", "weight": "weight", "logits": "logits"}.get(
        name.removeprefix("ref_"), ""
    )
    if isinstance(getattr(x, attribute, None), Tensor):
        return f"; pass its .{attribute}"
    if isinstance(x, (list, tuple)) and x and all(isinstance(i, (int, float)) for i in x):
        return f"; pass torch.tensor({name})"
    return ""


def check_device(op: str, name: str, x: Tensor | None, device: torch.device) -> None:
    if x is not None and x.device != device:
        raise ValueError(
            f"{op}: `{name}` must be on {device} like the first argument, got {x.device}; pass "
            f"{name}.to({str(device)!r})"
        )


def check_float(op: str, name: str, x: Tensor) -> None:
    """Check for fp32, fp16 or bf16."""
    if x.dtype not in _LOGITS:
        hint = (
            f"; pass {name}.float(): the kernels compute in float32, rpo_kernels.reference in "
            "float64"
            if x.dtype == torch.float64
            else ""
        )
        raise TypeError(f"{op}: `{name}` must be float32, float16 or bfloat16, got {x.dtype}{hint}")


def check_constant(op: str, name: str, x: Tensor) -> None:
    """Check that no gradient is expected of an argument that gets none."""
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: `{name}` gets no gradient, but requires one; pass {name}.detach()")
    check_tangents(op, x)


def check_labels(op: str, labels: Tensor, like: Tensor, name: str, ignore_index: int) -> None:
    """Check integer labels in the shape of the leading dimensions of logits or hidden states."""
    check_tensor(op, "labels", labels)
    is_mask = labels.dtype == torch.bool
    slip = "did you pass a mask? shift_labels(input_ids, mask) makes labels" if is_mask else ""
    check_integers(op, "labels", labels, slip)
    expected = like.shape[:-1]
    if labels.shape != expected:
        raise ValueError(
            f"{op}: `labels` must be {list(expected)}, one for each position of `{name}`; got "
            f"{shape_of(labels)}{_slip_of_labels(labels, like, name)}"
        )
    check_ignore_index(op, ignore_index, labels.dtype)


def check_ignore_index(op: str, ignore_index: object, dtype: torch.dtype) -> None:
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"{op}: `ignore_index` must be an int, got {ignore_index!r}")
    range_ = torch.iinfo(dtype)
    if not range_.min <= ignore_index <= range_.max:
        raise ValueError(f"{op}: `ignore_index` must be one of {dtype}, got {ignore_index}")


def check_integers(op: str, name: str, x: Tensor, slip: str = "") -> None:
    if x.dtype not in _INTEGERS:
        cure = slip or f"pass {name}.long()"
        raise TypeError(f"{op}: `{name}` must be int64 or int32, got {x.dtype}; {cure}")


def check_flag(op: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: `{name}` must be True or False, got {value!r}")


def _slip_of_labels(labels: Tensor, like: Tensor, name: str) -> str:
    """Why labels may have another shape than logits or hidden states."""
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


def check_logits(
    op: str,
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    inplace_backward: bool,
    is_shard: bool = False,
) -> None:
    """Check logits and labels; with `is_shard` the columns are one rank's, possibly none."""
    check_tensor(op, "logits", logits)
    check_float(op, "logits", logits)
    if logits.dim() == 0 or (logits.shape[-1] == 0 and not is_shard):
        raise ValueError(
            f"{op}: `logits` must be [..., V] with a vocabulary of at least one, got "
            f"{shape_of(logits)}"
        )
    check_labels(op, labels, logits, "logits", ignore_index)
    check_flag(op, "inplace_backward", inplace_backward)
    check_device(op, "labels", labels, logits.device)
    check_tangents(op, logits)
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(
            f"{op}: the last dimension of `logits` must be contiguous, got strides "
            f"{tuple(logits.stride())}; pass logits.contiguous()"
        )
    if inplace_backward and logits.is_leaf and logits.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: `inplace_backward` would overwrite `logits`, a leaf that requires a gradient, "
            "with that gradient; pass logits that a model computed, or inplace_backward=False"
        )
    if inplace_backward and overlaps(logits):
        raise ValueError(
            f"{op}: with `inplace_backward` the rows of `logits` must not share memory, got shape "
            f"{shape_of(logits)} with strides {tuple(logits.stride())}; pass logits.contiguous()"
        )


def overlaps(x: Tensor) -> bool:
    """Return whether two elements may share an address.

    They may if some stride does not step over all dimensions of smaller strides. Compared one by
    one: a graph with symbolic shapes cannot sort them.
    """
    dims = [(stride, n) for stride, n in zip(x.stride(), x.shape) if n > 1]
    for i, (stride, _) in enumerate(dims):
        if any(stride == other for other, _ in dims[:i]):
            return True
        if stride <= sum(other * (n - 1) for other, n in dims if other < stride):
            return True
    return False


def check_transform(op: str, temperature: float, logit_scale: float, softcap: float | None) -> None:
    for name, value in (
        ("temperature", temperature),
        ("logit_scale", logit_scale),
        ("softcap", softcap),
    ):
        if value is None and name == "softcap":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{op}: `{name}` must be a number, got {value!r}")
        check_factor(op, name, value)


def check_factor(op: str, name: str, value: float) -> None:
    """Check a number by which fp32 numbers are multiplied or divided.

    Without math.isfinite, which torch.compile cannot trace.
    """
    if not _FP32.tiny <= value <= _FP32.max:
        raise ValueError(f"{op}: `{name}` must be a finite number > 0 in float32, got {value!r}")


def check_choice(op: str, name: str, value: object, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ValueError(
            f"{op}: `{name}` must be one of {', '.join(map(repr, valid))}; got {value!r}"
        )


def check_backend(op: str, backend: object) -> None:
    check_choice(op, "backend", backend, BACKENDS)


def check_offsets(op: str, name: str, offsets: Tensor, device: torch.device) -> None:
    check_tensor(op, name, offsets)
    if offsets.dtype != torch.int32:
        raise TypeError(
            f"{op}: `{name}` must be int32 as in FlashAttention, got {offsets.dtype}; pass "
            f"{name}.int()"
        )
    if offsets.dim() != 1 or offsets.shape[0] < 2:
        raise ValueError(
            f"{op}: `{name}` must hold the boundaries [0, ..., total], at least two of them; got "
            f"shape {shape_of(offsets)}"
        )
    check_device(op, name, offsets, device)


# ---- values, checked on a CPU only ---------------------------------------------------------------


def may_read(device: torch.device) -> bool:
    return device.type == "cpu" and not torch.compiler.is_compiling()


def is_readable(x: Tensor | None) -> TypeGuard[Tensor]:
    return x is not None and may_read(x.device)


def check_label_values(op: str, labels: Tensor, V: int, ignore_index: int) -> None:
    if not is_readable(labels):
        return
    outside = (labels != ignore_index) & ((labels < 0) | (labels >= V))
    if outside.any():
        label = int(labels[outside][0])
        if label < 0:
            slip = f"; pass {ignore_index} where nothing is scored, or ignore_index={label}"
        elif op.startswith("linear_"):
            slip = f"; the head has {V} rows"
        else:
            slip = f"; the logits have {V} columns, call linear_{op} with hidden states"
        raise ValueError(
            f"{op}: `labels` must lie in [0, {V}) or be ignore_index {ignore_index}, got {label}"
            f"{slip}"
        )


def check_offset_values(op: str, name: str, offsets: Tensor | None, total: int, what: str) -> None:
    if not is_readable(offsets):
        return
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != total:
        slip = ""
        if int(offsets.sum()) == total:  # sizes
            slip = f"; pass torch.nn.functional.pad({name}.cumsum(0, dtype=torch.int32), (1, 0))"
        elif last == total:
            slip = f"; pass torch.nn.functional.pad({name}, (1, 0))"
        raise ValueError(
            f"{op}: `{name}` must begin at 0 and end at the number of {what}, {total}; got {first} "
            f"and {last}{slip}"
        )
    if (offsets.diff() < 0).any():
        raise ValueError(f"{op}: `{name}` must not decrease, got {offsets.tolist()[:16]}")


def check_length_values(op: str, lengths: Tensor | None) -> None:
    if is_readable(lengths) and (lengths < 0).any():
        raise ValueError(f"{op}: `lengths` must be >= 0, got {int(lengths.min())}")
