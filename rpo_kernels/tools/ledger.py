"""Memory traffic of kernels, counted element by element in Triton's interpreter.

    with ledger() as launches:
        token_logps(logits, labels, backend="triton")
    launches[0].loads["logits"]  # how often each element was loaded, in the shape of the logits

The interpreter runs programs one after another and sees every address. Counts are therefore exact,
and show what would fail on a GPU only: accesses outside the arguments, and accesses without a
barrier between them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch


class Launch:
    """Accesses of one launch to its tensors, by argument name without `_ptr`.

    Attributes:
        kernel: name of the kernel.
        loads: per tensor, how often each element was loaded, in its shape. Tensors that share
            memory share counts.
        stores: the same for stores.
        loaded_bytes: per tensor.
        stored_bytes: per tensor.
        stray: number of accesses outside all arguments.
        races: number of accesses to what another program stores, and of loads of what the same
            program has stored since its last barrier.
    """

    def __init__(self, kernel: str, arguments: dict[str, Any]):
        self.kernel, self.races, self._outside = kernel, 0, 0
        # barriers and programs so far; the epoch in which the current program began
        self._epoch = self._program = 0
        self._regions: dict[tuple, _Region] = {}
        tensors = {
            name.removesuffix("_ptr"): x
            for name, x in arguments.items()
            if isinstance(x, torch.Tensor)
        }
        keys = {
            name: (x.data_ptr(), tuple(x.shape), x.stride(), x.element_size())
            for name, x in tensors.items()
        }
        self._named = {
            name: self._regions.setdefault(key, _Region(*key)) for name, key in keys.items()
        }

    @property
    def loads(self) -> dict[str, np.ndarray]:
        return {name: region.by_element(region.loads) for name, region in self._named.items()}

    @property
    def stores(self) -> dict[str, np.ndarray]:
        return {name: region.by_element(region.stores) for name, region in self._named.items()}

    @property
    def loaded_bytes(self) -> dict[str, int]:
        return {
            name: int(counts.sum()) * self._named[name].size for name, counts in self.loads.items()
        }

    @property
    def stored_bytes(self) -> dict[str, int]:
        return {
            name: int(counts.sum()) * self._named[name].size for name, counts in self.stores.items()
        }

    @property
    def stray(self) -> int:
        gaps = (
            c.sum() - r.by_element(c).sum()
            for r in self._regions.values()
            for c in (r.loads, r.stores)
        )
        return self._outside + int(sum(gaps))

    def advance(self, program: bool) -> None:
        """Begin a new epoch, at a barrier or the next program."""
        self._epoch += 1
        self._program = self._epoch if program else self._program

    def book(self, pointers: Any, mask: Any, store: bool) -> None:
        """Count an access to a block of the interpreter's pointers."""
        addresses = pointers.data[
            np.broadcast_to(mask.data.astype(bool), pointers.data.shape)
        ].astype(np.int64)
        size = max(8, pointers.get_element_ty().primitive_bitwidth) // 8
        for region in self._regions.values():
            inside = (addresses >= region.start) & (
                addresses < region.start + region.span * region.size
            )
            if size % region.size == 0 and inside.any():
                # a word may hold several elements
                offsets = (
                    addresses[inside, None] - region.start + np.arange(0, size, region.size)
                ).flatten()
                self._outside += int(
                    ((offsets % region.size != 0) | (offsets >= region.span * region.size)).sum()
                )
                offsets = offsets[offsets < region.span * region.size]
                self.races += region.book(offsets // region.size, store, self._epoch, self._program)
                addresses = addresses[~inside]
        self._outside += addresses.size


class _Region:
    """Counts over the memory from a tensor's first element to its last."""

    def __init__(self, start: int, shape: tuple[int, ...], strides: tuple[int, ...], size: int):
        self.start, self.shape, self.strides, self.size = start, shape, strides, size
        self.span = (
            0 if 0 in shape else 1 + sum((n - 1) * stride for n, stride in zip(shape, strides))
        )
        self.loads, self.stores = np.zeros((2, self.span), np.int64)
        self._stored_in, self._loaded_by = np.full((2, self.span), -1)  # an epoch; a program

    def by_element(self, counts: np.ndarray) -> np.ndarray:
        strides = [counts.itemsize * stride for stride in self.strides]
        return np.lib.stride_tricks.as_strided(counts, self.shape, strides, writeable=False)

    def book(self, i: np.ndarray, store: bool, epoch: int, program: int) -> int:
        """Count accesses to elements i, and return how many of them race."""
        stored, loaded = self._stored_in[i], self._loaded_by[i]
        races = (stored >= 0) & (stored < program)
        races |= (loaded >= 0) & (loaded != program) if store else stored == epoch
        np.add.at(self.stores if store else self.loads, i, 1)
        (self._stored_in if store else self._loaded_by)[i] = epoch if store else program
        return int(races.sum())


@contextlib.contextmanager
def ledger() -> Iterator[list[Launch]]:
    """Context that yields a list, to which every launch of a kernel is appended.

    Atomics are not supported.

    Raises:
        RuntimeError: if kernels are compiled, not interpreted.
    """
    from ..backend import interpreted

    if not interpreted():
        raise RuntimeError(
            "ledger: traffic is counted in Triton's interpreter; start the process with "
            "TRITON_INTERPRET=1"
        )
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

    launches: list[Launch] = []

    def before(owner: type, name: str, action: Any) -> Any:
        original = getattr(owner, name)
        return mock.patch.object(
            owner,
            name,
            lambda *args, **kwargs: (action(*args, **kwargs), original(*args, **kwargs))[1],
        )

    def launch(fn: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(fn.__name__, dict(zip(fn.arg_names, args)) | kwargs))

    def refuse(*_: Any) -> None:
        raise NotImplementedError("ledger: atomics are not counted")

    with contextlib.ExitStack() as patches:
        for owner, name, action in [
            (InterpretedFunction, "run", launch),
            (InterpreterBuilder, "set_grid_idx", lambda *_: launches[-1].advance(program=True)),
            (InterpreterBuilder, "create_barrier", lambda *_: launches[-1].advance(program=False)),
            (
                InterpreterBuilder,
                "create_masked_load",
                lambda _, at, mask, *rest, **kw: launches[-1].book(at, mask, False),
            ),
            (
                InterpreterBuilder,
                "create_masked_store",
                lambda _, at, x, mask, *rest: launches[-1].book(at, mask, True),
            ),
            (InterpreterBuilder, "create_atomic_cas", refuse),
            (InterpreterBuilder, "create_atomic_rmw", refuse),
        ]:
            patches.enter_context(before(owner, name, action))
        yield launches
