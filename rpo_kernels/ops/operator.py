"""Functions with a custom backward.

They are a `torch.autograd.Function` in eager mode and an operator of `torch.library` in traces.
Operators take plain types, so structured arguments (`rpo_kernels.inputs`) are packed into lists of
tensors, integers and floats and one string, and rebuilt inside.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from .._ops import add_op_namespace_prefix
from ..backend import module_of
from ..sums import Objective, as_plain, from_plain

# of PyTorch 2.9 and later
_UNSAFE = tuple(filter(None, [getattr(torch.Tag, "cudagraph_unsafe", None)]))
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Operator:
    """A function of leading tensors and other values, with its output shapes and optional backward.

    Args:
        name: name of the operator, in the namespace of `rpo_kernels._ops`.
        tensors: number of leading parameters that are tensors (or None). Only these may be
            differentiated or mutated. The others are values: tensors, numbers, strings, and
            NamedTuples of them.
        forward: the function. Returns a tensor, a tuple of tensors or None, and never one of its
            arguments.
        fake: takes the same arguments and returns empty tensors with the shapes of the results.
        setup_context: `(ctx, inputs, outputs)`, saves what the backward needs; without it there is
            no derivative.
        backward: `(ctx, *gradients)`, returns the gradients of the leading tensors.
        mutates: names of the leading tensors that the function writes to.
        waits: whether the function may synchronise with the device, or derive shapes from values
            that it reads there: compiled graphs then keep it out of their CUDA graphs.
    """

    def __init__(
        self,
        name: str,
        tensors: int,
        forward: Callable,
        fake: Callable,
        setup_context: Callable | None = None,
        backward: Callable | None = None,
        mutates: Sequence[str] = (),
        waits: bool = False,
    ):
        hints = typing.get_type_hints(forward)
        names = list(inspect.signature(forward).parameters)
        self.name = name
        self._tensors, self._layouts = tensors, [_layout(hints[x]) for x in names[tensors:]]
        self.eager = (
            forward
            if setup_context is None or backward is None
            else _function(name, tensors, forward, setup_context, backward)
        )
        marks = [f"(a{i}!)" if x in mutates else "" for i, x in enumerate(names[:tensors])]
        leading = ", ".join(f"Tensor{mark}? {x}" for mark, x in zip(marks, names))
        result = hints["return"]
        returns = (
            "Tensor"
            if result is Tensor
            else f"({', '.join(['Tensor'] * len(typing.get_args(result)))})"
        )
        schema = (
            f"({leading}, Tensor?[] tensors, SymInt[] ints, float[] floats, str text) -> {returns}"
        )
        operator = torch.library.custom_op(
            add_op_namespace_prefix(name),
            lambda *args: forward(*self._unpacked(args)),
            mutates_args=mutates,
            schema=schema,
            tags=_UNSAFE if waits else (),
        )
        operator.register_fake(lambda *args: fake(*self._unpacked(args)))
        if setup_context is not None and backward is not None:

            def setup(ctx: Any, inputs: tuple, output: Any) -> None:
                # torch.library expects a list of gradients for a list of tensors only, and one
                # gradient for anything else
                alone = [all(isinstance(y, Tensor) for y in x) for x in inputs[tensors:-1]]
                ctx.no_gradients = [
                    [None] * len(x) if tree else None for x, tree in zip(inputs[tensors:-1], alone)
                ]
                setup_context(ctx, self._unpacked(inputs), output)

            def differentiate(ctx: Any, *gradients: Tensor | None) -> tuple:
                checks.check_tangents(name, *gradients)
                return (*backward(ctx, *gradients), *ctx.no_gradients, None)

            operator.register_autograd(differentiate, setup_context=setup)
        self._operator = operator

    def on(self, x: Tensor) -> Callable:
        """Return what to call with tensors like x: the function, or the operator inside a trace."""
        plain = (
            type(x) in (Tensor, torch.nn.Parameter)
            and not x.is_meta
            and not torch.compiler.is_compiling()
        )
        return self.eager if plain else self._traced

    def _traced(self, *args: Any) -> Any:
        return self._operator(*self.packed(args))

    def packed(self, args: Sequence[Any]) -> tuple:
        """Convert the function's arguments to those of the operator."""
        streams: tuple[list, list, list, list] = ([], [], [], [])
        for value, layout in zip(args[self._tensors :], self._layouts, strict=True):
            _pack(value, layout, streams)
        tensors, ints, floats, text = streams
        return (*args[: self._tensors], tensors, ints, floats, "\n".join(text))

    def _unpacked(self, args: Sequence[Any]) -> tuple:
        tensors, ints, floats, text = args[self._tensors :]
        streams = iter(tensors), iter(ints), iter(floats), iter(text.split("\n"))
        return (*args[: self._tensors], *(_unpack(layout, streams) for layout in self._layouts))


def _function(
    name: str, tensors: int, forward: Callable, setup_context: Callable, backward: Callable
) -> Callable:
    others = len(inspect.signature(forward).parameters) - tensors
    # PyTorch binds the arguments of every call to the signature: to one name in a fraction of the
    # time, a seventh of what rpo_loss costs the CPU (benchmarks/results/host.json)
    any_number = inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)
    setattr(forward, "__signature__", inspect.Signature([any_number]))  # noqa: B010

    def differentiate(ctx: Any, *gradients: Tensor | None) -> tuple:
        checks.check_tangents(name, *gradients)
        return (*backward(ctx, *gradients), *(None,) * others)

    methods = {"forward": forward, "setup_context": setup_context, "backward": differentiate}
    static = {name: staticmethod(x) for name, x in methods.items()}
    function: type[torch.autograd.Function] = type(name, (torch.autograd.Function,), static)
    return function.apply


# ---- values as plain types -----------------------------------------------------------------------


def _layout(hint: Any) -> Any:
    """Return which of the four streams carries a value.

    For a NamedTuple, return the class and the layouts of its fields.
    """
    if isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields"):
        hints = typing.get_type_hints(hint)
        return hint, [_layout(hints[field]) for field in hint._fields]
    if hint in (Tensor, Tensor | None):
        return "tensor"
    if hint in (list[int] | None, list[bool]):
        return "ints"
    return {
        int: "int",
        bool: "bool",
        float: "float",
        str: "text",
        Objective: "objective",
        torch.dtype: "dtype",
    }[hint]


def _pack(value: Any, layout: Any, packed: tuple[list, list, list, list]) -> None:
    tensors, ints, floats, text = packed
    if isinstance(layout, tuple):
        for field, inner in zip(value, layout[1]):
            _pack(field, inner, packed)
    elif layout == "tensor":
        tensors.append(value)
    elif layout == "ints":
        ints.append(-1 if value is None else len(value))
        ints.extend(map(int, value or ()))  # a list with a symbolic integer may not hold bools
    elif layout in ("int", "bool"):
        ints.append(int(value) if layout == "bool" else value)
    elif layout == "dtype":
        ints.append(_DTYPES.index(value))
    elif layout == "float":
        floats.append(value)
    elif layout == "objective":
        weights, specs = as_plain(value)
        ints.append(len(weights))
        floats.extend(weights)
        text.append(specs)
    else:
        text.append(value)


def _unpack(layout: Any, streams: tuple[Iterator, Iterator, Iterator, Iterator]) -> Any:
    tensors, ints, floats, text = streams
    if isinstance(layout, tuple):
        return layout[0](*(_unpack(inner, streams) for inner in layout[1]))
    if layout == "ints":
        size = next(ints)
        return None if size < 0 else [next(ints) for _ in range(size)]
    if layout in ("int", "bool", "dtype"):
        value = next(ints)
        return bool(value) if layout == "bool" else _DTYPES[value] if layout == "dtype" else value
    if layout == "objective":
        weights = [next(floats) for _ in range(next(ints))]
        return from_plain(weights, next(text))
    return next(tensors if layout == "tensor" else floats if layout == "float" else text)


# ---- shared by the backwards ---------------------------------------------------------------------


def only_once(op: str, ctx: Any) -> None:
    """Raise in a second backward; for backwards that overwrite what they read."""
    if getattr(ctx, "spent", False):
        raise RuntimeError(
            f"{op}: a second backward is not possible, the first has overwritten what it needs; "
            f"call {op} again"
        )
    ctx.spent = True


def once_differentiable(gradient: Tensor, *sources: object) -> Tensor:
    """Return the gradient; differentiating it again raises instead of omitting a term."""
    return _OnceDifferentiable.apply(gradient, *sources) if torch.is_grad_enabled() else gradient


class _OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(gradient: Tensor, *sources: object) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise NotImplementedError("rpo_kernels: second derivatives are not implemented")


def _scale(x: Tensor, factor: Tensor, backend: str) -> None:
    module_of("scale", backend, x.device, "scaling").scale(x, factor.detach().float())
    torch.autograd.graph.increment_version(x)


def _require_one(upstream: Tensor) -> Tensor:
    if upstream.device.type == "cpu" and float(upstream) != 1:
        raise ValueError(
            "linear_rpo_loss: with `weight_grad` the upstream gradient of the loss must be 1, got "
            f"{float(upstream):g}: that buffer holds the gradient already; do not scale the loss, "
            "pass `normalizer`"
        )
    return torch.where(upstream == 1, upstream, torch.nan)


# x *= factor in place; nothing is read or written where the factor is 1
scale_ = Operator("scale_", 1, _scale, lambda x, factor, backend: None, mutates=("x",))
# Returns an upstream gradient that is 1. Any other raises on a CPU and becomes NaN elsewhere, where
# reading it would synchronise.
require_one = Operator("require_one", 1, _require_one, torch.empty_like)
