"""Work that lies on several ranks of ``torch.distributed``: shards of a vocabulary, sharded
parameters, parts of a batch.

Vocabulary-parallel: each rank of a process group holds neighbouring columns of the vocabulary, in
rank order and in any number, and the same rows. Of its columns it reduces a row to three numbers
(four with entropy); one all-gather of those, and each rank puts the same numbers together in the
same order. So log-probabilities agree bit for bit, and nothing of vocabulary size travels.

Every such call begins with an agreement: the ranks tell each other their shards' widths, what they
are about to do, and whether their arguments are good. A rank that raises makes all raise. The
agreement goes over the group's CPU backend where it has one
(``init_process_group("cpu:gloo,cuda:nccl")`` makes both); with NCCL only, it costs one
synchronisation with the device. While a CUDA graph is captured nothing can be exchanged: the widths
of the last agreement stand, so run a step before, as for any capture.

Beyond that: a compiled graph's checks of values run in its operators, and tell the ranks of
`process_group` alone. A DTensor weight without a group (FSDP2) is gathered by DTensor, whose ranks
learn of each other's errors when its collectives time out.
"""

from __future__ import annotations

import contextlib
import ctypes
import pickle
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .inputs import LogitTransform

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_Parameter = TypeVar("_Parameter", Tensor, Tensor | None)

ELSEWHERE, IGNORED, OUTSIDE = -1, -2, -3  # labels of a shard: on another one, not scored, on none
_agreements: Counter[str] = Counter()  # made so far in this process, by group
_widths: dict[
    tuple[str, int], list[int]
] = {}  # of all ranks' shares, by group and this rank's own, as last agreed


class Shard(NamedTuple):
    """One rank's columns ``[first, first + columns)`` of a vocabulary."""

    group: dist.ProcessGroup
    first: int
    columns: int
    vocabulary: int
    widest: int  # columns of the largest shard: plans made from it are the same on all ranks

    @staticmethod
    def of(name: str, widths: list[int]) -> Shard:
        """From the columns of each rank of the named group."""
        group = resolve(name)
        return Shard(
            group, sum(widths[: group.rank()]), widths[group.rank()], sum(widths), max(widths)
        )

    def labels(self, labels: Tensor, ignore_index: int) -> Tensor:
        """Flat labels that count from this shard's first column; those of other kinds have the
        names above.
        """
        labels = labels.reshape(-1)
        local = labels - self.first
        local = torch.where((local >= 0) & (local < self.columns), local, ELSEWHERE)
        local = torch.where((labels >= 0) & (labels < self.vocabulary), local, OUTSIDE)
        return torch.where(labels == ignore_index, IGNORED, local)

    def forward(
        self,
        module_of: Callable[[str], Any],
        rows: Tensor,
        labels: Tensor,
        transform: LogitTransform,
        entropy: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """``vocabulary_forward`` of whole rows, from this rank's columns ``[outer, inner,
        columns]`` and shard labels ``[N]``.
        """
        transform = transform._replace(ignore_index=IGNORED)
        statistics = module_of("vocabulary_forward").shard_statistics(
            rows, labels, transform, entropy
        )
        return module_of("shards").combine(
            gather(statistics, self.group), labels, transform, entropy
        )


def start_sum(x: Tensor, name: str) -> Callable[[], object]:
    """Begin to sum a tensor over the ranks of the named group, in place; what is returned waits for
    the end.
    """
    if not x.numel():
        return lambda: None
    return dist.all_reduce(x, group=resolve(name), async_op=True).wait


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tensors of all ranks, of one shape, ``[R, ...]``."""
    out = x.new_empty((group.size(), *x.shape))
    if x.numel():
        # its name since torch 2.13, and before
        getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(
            out.view(-1), x.reshape(-1), group=group
        )
    return out


def group_name(op: str, process_group: object, argument: str = "process_group") -> str:
    """A group's name, which an operator can take; "" for None."""
    if process_group is None:
        return ""
    if not isinstance(process_group, dist.ProcessGroup):
        hint = "; pass mesh.get_group()" if hasattr(process_group, "get_group") else ""
        raise TypeError(
            f"{op}: `{argument}` must be a torch.distributed.ProcessGroup, got "
            f"{process_group!r}{hint}"
        )
    return process_group.group_name


def resolve(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]  # a NewType


# ---- agreement -----------------------------------------------------------------------------------


class raising_together:
    """Around the checks of a public function that takes groups of ranks: what raises before the
    agreement with one of them raises on all its ranks. A class, so that it is no frame of what runs
    inside.
    """

    def __init__(self, op: str, **groups: object) -> None:
        self.op = op
        traced = torch.compiler.is_compiling()
        self.groups = (
            {}
            if traced
            else {name: x for name, x in groups.items() if isinstance(x, dist.ProcessGroup)}
        )

    def __enter__(self) -> None:
        self.before = _agreements.copy() if self.groups else Counter()

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if not isinstance(error, Exception):
            return
        for argument, group in self.groups.items():
            if _agreements[group.group_name] == self.before[group.group_name]:
                with contextlib.suppress(Exception):  # the error itself is raised when this returns
                    _exchange(group, self.op, 0, {}, error, argument)


def agree(
    op: str,
    name: str,
    share: int,
    facts: Mapping[str, object],
    check: Callable[[], None],
    argument: str = "process_group",
) -> list[int]:
    """Run the checks, and settle with the other ranks of the named group how much (columns, tokens)
    each of them has.

    Returns:
        The shares of all ranks; nothing without a group.

    Raises:
        The error of the checks, or of another rank's; ValueError where the facts of the ranks
        differ.
    """
    if not name:
        check()
        return []
    group, error = resolve(name), None
    if _capturing():
        check()
        if (name, share) not in _widths:
            raise RuntimeError(
                f"{op}: ranks cannot agree while a CUDA graph is captured; run the step once before"
            )
        return _widths[name, share]
    try:
        check()
    except Exception as raised:
        error = raised
    _widths[name, share] = _exchange(group, op, share, facts, error, argument)
    return _widths[name, share]


def check_capture(op: str, argument: str) -> None:
    """Raise where a call would wait for the device while a CUDA graph is captured."""
    if _capturing():
        raise RuntimeError(
            f"{op}: `{argument}` must be given while a CUDA graph is captured; without it the call "
            "waits for the device"
        )


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def digest(*tensors: Tensor | None) -> int:
    """Of values, on a CPU, where looking at them is free; of shapes elsewhere."""
    total = 0
    for x in tensors:
        if x is not None:
            x, data = x.detach().contiguous(), b""
            if x.device.type == "cpu":
                data = ctypes.string_at(x.data_ptr(), x.nbytes)
            total = zlib.crc32(data, zlib.crc32(repr((tuple(x.shape), x.dtype)).encode(), total))
    return total


def tell(numbers: list[int], group: dist.ProcessGroup) -> list[list[int]]:
    """The numbers of all ranks, as many on each; over the group's CPU backend where it has one."""
    on_cpu = "cpu" in dist.get_backend_config(group)
    device = torch.device("cpu") if on_cpu else group._device_types[0]
    return gather(torch.tensor(numbers, dtype=torch.int64, device=device), group).tolist()


def _tell_words(word: object, group: dist.ProcessGroup) -> list[Any]:
    """What all ranks say; ``all_gather_object`` needs numpy."""
    own = pickle.dumps(word)
    sizes = [size for (size,) in tell([len(own)], group)]
    told = tell([*own, *[0] * (max(sizes) - len(own))], group)
    return [pickle.loads(bytes(word[:size])) for word, size in zip(told, sizes)]


def _exchange(
    group: dist.ProcessGroup,
    op: str,
    share: int,
    facts: Mapping[str, object],
    error: Exception | None,
    argument: str,
) -> list[int]:
    """Shares of the ranks, after all of them said that they are ready."""
    _agreements[group.group_name] += 1
    facts = {"operation": op, **facts}
    headers = tell([error is not None, share, zlib.crc32(repr(facts).encode())], group)
    failed = any(status for status, *_ in headers)
    if not failed and len({told for *_, told in headers}) == 1:
        return [share for _, share, _ in headers]
    # Every rank sees the same headers, so every rank comes here.
    words = _tell_words((type(error).__name__, str(error)) if error is not None else facts, group)
    if error is not None:
        raise error
    for rank, word in enumerate(words):
        if isinstance(word, tuple):
            kind = {"ValueError": ValueError, "TypeError": TypeError}.get(word[0], RuntimeError)
            raise kind(f"{word[1]} (raised by rank {rank} of `{argument}`)")
    for fact in sorted(set().union(*words)):
        told = [word.get(fact) for word in words]
        if any(x != told[0] for x in told):
            hint = (
                "; they work on the same rows, did you pass the data-parallel group?"
                if "`labels`" in fact
                else ""
            )
            raise ValueError(
                f"{op}: the ranks of `{argument}` must agree on {fact}, got {told}{hint}"
            )
    raise AssertionError("unreachable: digests differ, so facts do")


# ---- DTensor -------------------------------------------------------------------------------------


def is_dtensor(x: object) -> TypeGuard[DTensor]:
    return getattr(x, "device_mesh", None) is not None  # importing DTensor to ask takes seconds


def local_logits(
    op: str, logits: Tensor, process_group: dist.ProcessGroup | None
) -> tuple[Tensor, dist.ProcessGroup | None]:
    """This rank's columns, and the group that shares the vocabulary, of logits that may be a
    DTensor (loss parallelism).
    """
    if not is_dtensor(logits):
        return logits, process_group
    placements, mesh = logits.placements, logits.device_mesh
    if (
        process_group is not None
        or mesh.ndim != 1
        or not (placements[0].is_shard(logits.dim() - 1) or placements[0].is_replicate())
    ):
        raise ValueError(
            f"{op}: `logits` as a DTensor must be replicated or sharded in the last dimension over "
            "a mesh of one dimension, "
            f"without `process_group`; got placements {placements} on {mesh}; for others pass "
            "logits.to_local() and `process_group`"
        )
    return logits.to_local(), mesh.get_group() if placements[0].is_shard() else None


def local_hidden(
    op: str, name: str, hidden: Tensor, process_group: dist.ProcessGroup | None
) -> tuple[Tensor, dist.ProcessGroup | None]:
    """All hidden states, and the group that shares the vocabulary, of hidden states that may be a
    DTensor.

    Sharded ones (sequence parallelism) are gathered. The gradient that they get is this rank's part
    of a sum, which DTensor
    reduces: to all ranks, or scattered as the hidden states were.
    """
    if not is_dtensor(hidden):
        return hidden, process_group
    mesh, placements = hidden.device_mesh, hidden.placements
    if (
        process_group is not None
        or mesh.ndim != 1
        or placements[0].is_partial()
        or placements[0].is_shard(hidden.dim() - 1)
    ):
        raise ValueError(
            f"{op}: `{name}` as a DTensor must be replicated, or sharded in a leading dimension, "
            "over a mesh of one dimension, "
            f"without `process_group`; got placements {placements} on {mesh}; for others pass "
            f"{name}.to_local() and `process_group`"
        )
    from torch.distributed.tensor import Partial, Replicate

    return hidden.redistribute(placements=[Replicate()]).to_local(
        grad_placements=[Partial()]
    ), mesh.get_group()


def local_parameter(
    op: str,
    name: str,
    x: _Parameter,
    process_group: dist.ProcessGroup | None,
    dtype: torch.dtype | None = None,
) -> _Parameter:
    """A parameter of the head as a plain tensor: this rank's shard along the process group, whole
    along all other dimensions of its mesh. Those are data-parallel (FSDP2): the gradient is the
    mean over their ranks, reduced in float32, once.

    ``full_tensor()`` without grad_placements would take each rank's own part of its own gradient,
    and drop the others'.
    """
    if not is_dtensor(x):
        return x
    from torch.distributed.tensor import Partial, Replicate

    mesh, placements = x.device_mesh, x.placements
    here, grads = list(placements), list(placements)
    for i, placement in enumerate(placements):
        if process_group is not None and mesh.get_group(i).group_name == process_group.group_name:
            if not placement.is_shard(0):
                raise ValueError(
                    f"{op}: `{name}` must be sharded in dimension 0 over `process_group`, got "
                    f"placements {placements}"
                )
        else:
            here[i], grads[i] = Replicate(), Partial("avg")
    moved = x.redistribute(placements=here, forward_dtype=dtype, backward_dtype=torch.float32)
    return moved.to_local(grad_placements=grads)
