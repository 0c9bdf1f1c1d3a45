"""Memory traffic of kernels, counted element by element in Triton's interpreter.

    with ledger() as launches:
        token_logps(logits, labels, backend="triton")
    launches[0].kernel, launches[0].loads["logits"]     # times each element was loaded, in the shape of the logits

The interpreter runs programs one after the other and every access through numpy, so that counts are exact and also show
what only a GPU would suffer from: addresses outside the arguments, and accesses that no barrier orders.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch


class Launch:
    """What one launch of a kernel did to its arguments, each under its name without ``_ptr``.

    Attributes:
        kernel: name of the kernel.
        loads, stores: per argument, how often each element was accessed, in its shape. Arguments in the same memory share
            their counts; of arguments that overlap in part, the first takes them.
        stray: accesses to no element of any argument.
        races: accesses to an element that another program stores, or loads of what the same program stored since its last
            barrier.
    """

    def __init__(self, kernel: str, arguments: dict[str, Any]):
        self.kernel, self.races = kernel, 0
        self._outside = 0
        self._epoch = self._program = 0  # barriers and programs so far; epoch in which the present program began
        self._regions: list[_Region] = []
        self._names: dict[str, _Region] = {}
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                same = [region for region in self._regions if region.key == _Region.key_of(value)]
                self._names[name.removesuffix("_ptr")] = region = same[0] if same else _Region(value)
                if not same:
                    self._regions.append(region)

    @property
    def loads(self) -> dict[str, np.ndarray]:
        return {name: region.elements(region.loads) for name, region in self._names.items()}

    @property
    def stores(self) -> dict[str, np.ndarray]:
        return {name: region.elements(region.stores) for name, region in self._names.items()}

    @property
    def loaded_bytes(self) -> dict[str, int]:
        return {name: int(self.loads[name].sum()) * region.itemsize for name, region in self._names.items()}

    @property
    def stored_bytes(self) -> dict[str, int]:
        return {name: int(self.stores[name].sum()) * region.itemsize for name, region in self._names.items()}

    @property
    def stray(self) -> int:
        between = (c.sum() - r.elements(c).sum() for r in self._regions for c in (r.loads, r.stores))  # gaps of strided ones
        return self._outside + int(sum(between))

    def _access(self, pointers: Any, mask: np.ndarray, store: bool) -> None:
        addresses = pointers.data[np.broadcast_to(mask.astype(bool), pointers.data.shape)].astype(np.int64)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        for region in self._regions:
            if not addresses.size:
                return
            offsets = addresses - region.start
            inside = (offsets >= 0) & (offsets < region.span * region.itemsize)
            if region.itemsize != size or not inside.any():
                continue
            fits = offsets[inside]
            self._outside += int((fits % size != 0).sum())
            self.races += region.count(fits // size, store, self._epoch, self._program)
            addresses = addresses[~inside]
        self._outside += addresses.size

    def _advance(self, program: bool) -> None:
        self._epoch += 1
        self._program = self._epoch if program else self._program


class _Region:
    """Counts over the memory from the first to the last element of a tensor."""

    def __init__(self, tensor: torch.Tensor):
        self.key = self.key_of(tensor)
        self.start, self.shape, self.strides, self.itemsize = self.key
        self.span = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides)) if tensor.numel() else 0
        self.loads, self.stores = np.zeros((2, self.span), np.int64)
        self._stored_in, self._loaded_by = np.full((2, self.span), -1)  # epoch; program

    @staticmethod
    def key_of(tensor: torch.Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...], int]:
        return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.element_size()

    def elements(self, counts: np.ndarray) -> np.ndarray:
        return np.lib.stride_tricks.as_strided(counts, self.shape, [8 * s for s in self.strides], writeable=False)

    def count(self, i: np.ndarray, store: bool, epoch: int, program: int) -> int:
        """Book accesses to elements i; how many of them race."""
        stored, loaded = self._stored_in[i], self._loaded_by[i]
        elsewhere = (stored >= 0) & (stored < program)
        races = elsewhere | ((loaded >= 0) & (loaded != program)) if store else elsewhere | (stored == epoch)
        np.add.at(self.stores if store else self.loads, i, 1)
        (self._stored_in if store else self._loaded_by)[i] = epoch if store else program
        return int(races.sum())


@contextlib.contextmanager
def ledger() -> Iterator[list[Launch]]:
    """Within it every launch of a kernel is booked: appended to the list that it yields. Atomics are refused.

    Raises:
        RuntimeError: without triton, or where kernels are compiled.
    """
    from .backend import interpreted

    try:
        if not interpreted():
            raise RuntimeError("ledger: kernels are compiled in this process; start it with TRITON_INTERPRET=1")
        from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder
    except ImportError:
        raise RuntimeError("ledger: counting traffic needs the package triton, which is not installed") from None
    launches: list[Launch] = []
    run, set_grid_idx = InterpretedFunction.run, InterpreterBuilder.set_grid_idx
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def booked_run(fn, *args, **kwargs):
        launches.append(Launch(fn.__name__, dict(zip(fn.arg_names, args)) | kwargs))
        return run(fn, *args, **kwargs)

    def booked_load(builder, pointers, mask, *rest, **kwargs):
        launches[-1]._access(pointers, mask.data, store=False)
        return load(builder, pointers, mask, *rest, **kwargs)

    def booked_store(builder, pointers, value, mask, *rest):
        launches[-1]._access(pointers, mask.data, store=True)
        return store(builder, pointers, value, mask, *rest)

    def next_program(builder, *index):
        launches[-1]._advance(program=True)
        return set_grid_idx(builder, *index)

    def refuse(*_):
        raise NotImplementedError("ledger: atomics are not counted")

    booked = {
        "create_masked_load": booked_load, "create_masked_store": booked_store, "set_grid_idx": next_program,
        "create_barrier": lambda _: launches[-1]._advance(program=False),
        "create_atomic_cas": refuse, "create_atomic_rmw": refuse,
    }  # fmt: skip
    with mock.patch.object(InterpretedFunction, "run", booked_run), mock.patch.multiple(InterpreterBuilder, **booked):
        yield launches
