"""Work shared by the ranks of `torch.distributed`: vocabulary shards, sharded parameters, batches.

Vocabulary-parallel: each rank of a process group holds consecutive columns of the vocabulary, in
rank order and in any number, and the same rows. It reduces its columns of a row to three numbers
(four with entropy). One all-gather exchanges them, and every rank combines the same numbers in the
same order. Log-probabilities are therefore bit-identical, and nothing of vocabulary size is sent.

Every such call begins with an agreement: the ranks exchange the widths of their shards, compare
their arguments, and report errors. If one rank raises, all do. The agreement uses the group's CPU
backend if it has one (`init_process_group("cpu:gloo,cuda:nccl")` makes both); with NCCL only, it
costs one synchronisation with the device. Nothing can be exchanged while a CUDA graph is captured:
the widths of the last agreement are used, so run one step before, as for any capture.

Limits: the value checks of a compiled graph run in its operators and report errors to the ranks of
`process_group` only. A DTensor weight without a group (FSDP2) is gathered by DTensor; its ranks
notice each other's errors when the collectives time out.
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

ELSEWHERE, IGNORED, OUTSIDE = -1, -2, -3  # shard labels: on another shard, not scored, invalid
_agreements: Counter[str] = Counter()  # number made in this process, by group
_widths: dict[
    tuple[str, int], list[int]
] = {}  # last agreed shares of all ranks, by group and this rank's own share


class Shard(NamedTuple):
    """The columns `[first, first + columns)` of the vocabulary that one rank holds."""

    group: dist.ProcessGroup
    first: int
    columns: int
    vocabulary: int
    widest: int  # columns of the widest shard, for plans that are the same on all ranks

    @staticmethod
    def of(name: str, widths: list[int]) -> Shard:
        """Make this rank's shard from the numbers of columns of all ranks of the named group."""
        group = resolve(name)
        return Shard(
            group, sum(widths[: group.rank()]), widths[group.rank()], sum(widths), max(widths)
        )

    def labels(self, labels: Tensor, ignore_index: int) -> Tensor:
        """Return flat labels relative to this shard's first column.

        Others become ELSEWHERE, IGNORED or OUTSIDE.
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
        """Run `vocabulary_forward` on whole rows, which are spread over the ranks.

        rows are this rank's columns `[outer, inner, columns]`, labels those of the shard, `[N]`.
        """
        transform = transform._replace(ignore_index=IGNORED)
        statistics = module_of("vocabulary_forward").shard_statistics(
            rows, labels, transform, entropy
        )
        return module_of("shards").combine(
            gather(statistics, self.group), labels, transform, entropy
        )


def start_sum(x: Tensor, name: str) -> Callable[[], object]:
    """Start an in-place sum over the ranks of the named group; return a function that waits."""
    if not x.numel():
        return lambda: None
    return dist.all_reduce(x, group=resolve(name), async_op=True).wait


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather tensors of equal shape from all ranks to `[R, ...]`."""
    out = x.new_empty((group.size(), *x.shape))
    if x.numel():
        # renamed in torch 2.13
        getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(
            out.view(-1), x.reshape(-1), group=group
        )
    return out


def group_name(op: str, process_group: object, argument: str = "process_group") -> str:
    """Return the group's name, which an operator can take; "" for None."""
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
    """Context of a public function's checks: an error before an agreement raises on all ranks.

    A context manager, because a decorator would add a frame to every call.
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
                with contextlib.suppress(Exception):  # the error itself is raised on return
                    _exchange(group, self.op, 0, {}, error, argument)


def agree(
    op: str,
    name: str,
    share: int,
    facts: Mapping[str, object],
    check: Callable[[], None],
    argument: str = "process_group",
) -> list[int]:
    """Run the checks, and exchange with the ranks of the named group how much each of them has.

    Args:
        op: operation, for messages.
        name: name of the group; "" runs the checks only.
        share: this rank's number of columns or tokens.
        facts: what must be equal on all ranks, by the words that messages use for it.
        check: raises if this rank's arguments are invalid.
        argument: the argument that the group came from, for messages.

    Returns:
        The shares of all ranks; empty without a group.

    Raises:
        Exception: the error of the checks, or that of another rank.
        ValueError: if the facts differ between ranks.
    """
    if not name:
        check()
        return []
    group, error = resolve(name), None
    if _capturing():
        check()
        if (name, share) not in _widths:
            raise RuntimeError(
                f"{op}: ranks cannot compare their arguments while a CUDA graph is captured; run "
                "the step once before"
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
    """Return a checksum of values on a CPU, where reading them is free, and of shapes elsewhere."""
    total = 0
    for x in tensors:
        if x is not None:
            x, data = x.detach().contiguous(), b""
            if x.device.type == "cpu":
                data = ctypes.string_at(x.data_ptr(), x.nbytes)
            total = zlib.crc32(data, zlib.crc32(repr((tuple(x.shape), x.dtype)).encode(), total))
    return total


def tell(numbers: list[int], group: dist.ProcessGroup) -> list[list[int]]:
    """Exchange equally many numbers with all ranks, over the group's CPU backend if it has one."""
    on_cpu = "cpu" in dist.get_backend_config(group)
    device = torch.device("cpu") if on_cpu else group._device_types[0]
    return gather(torch.tensor(numbers, dtype=torch.int64, device=device), group).tolist()


def _tell_words(word: object, group: dist.ProcessGroup) -> list[Any]:
    """Exchange an object with all ranks (`all_gather_object` would need numpy)."""
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
    """Return the shares of all ranks once all of them have reported no error and equal facts."""
    _agreements[group.group_name] += 1
    facts = {"operation": op, **facts}
    headers = tell([error is not None, share, zlib.crc32(repr(facts).encode())], group)
    failed = any(status for status, *_ in headers)
    if not failed and len({told for *_, told in headers}) == 1:
        return [share for _, share, _ in headers]
    # all ranks see the same headers, so all of them get here
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
                "; its ranks hold the same rows, did you pass the data-parallel group?"
                if "`labels`" in fact
                else ""
            )
            raise ValueError(
                f"{op}: the ranks of `{argument}` must agree on {fact}, got {told}{hint}"
            )
    raise AssertionError("unreachable: digests differ, so facts do")


# ---- DTensor -------------------------------------------------------------------------------------


def is_dtensor(x: object) -> TypeGuard[DTensor]:
    return getattr(x, "device_mesh", None) is not None  # importing DTensor takes seconds


def local_logits(
    op: str, logits: Tensor, process_group: dist.ProcessGroup | None
) -> tuple[Tensor, dist.ProcessGroup | None]:
    """Return this rank's columns of logits, and the group that shares the vocabulary.

    The logits may be a DTensor (loss parallelism).
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
            f"a mesh of one dimension, without `process_group`; got placements {placements} on "
            f"{mesh}; otherwise pass logits.to_local() and `process_group`"
        )
    return logits.to_local(), mesh.get_group() if placements[0].is_shard() else None


def local_hidden(
    op: str, name: str, hidden: Tensor, process_group: dist.ProcessGroup | None
) -> tuple[Tensor, dist.ProcessGroup | None]:
    """Return the whole hidden states, and the group that shares the vocabulary.

    They may be a DTensor; one that is sharded (sequence parallelism) is gathered. Its gradient on
    this rank is a summand, which DTensor reduces: to all ranks, or scattered like the hidden
    states.
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
            f"over a mesh of one dimension, without `process_group`; got placements {placements} "
            f"on {mesh}; otherwise pass {name}.to_local() and `process_group`"
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
    """Return a parameter of the head as a plain tensor.

    It is this rank's shard along the process group, and whole along all other dimensions of its
    mesh. Those are data-parallel (FSDP2): the gradient is the mean over their ranks, reduced once,
    in fp32. `full_tensor()` without grad_placements would keep each rank's part of its own gradient
    and drop the parts of the others.
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
