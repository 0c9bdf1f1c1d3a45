"""Functions with a backward of their own: operators for whatever traces them, plain calls for everyone else."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def operator(name: str, mutates_args: Sequence[str] = ()) -> Callable[[Callable], Operator]:
    """Decorator: :class:`Operator` of a function, ``rpo_kernels::name`` in the traces of others."""
    return lambda function: Operator(name, function, mutates_args)


class Operator:
    """An operator of torch.library, whose plain eager calls go around the dispatcher.

    Compilers, function transforms, dispatch modes, subclasses of tensors and the meta device see an opaque operator. To bring it to
    them costs the CPU several times what its kernels take to launch. So a call that none of them watches runs the same functions at
    once: as they are, or, where a gradient is wanted, as the forward and backward of a ``torch.autograd.Function``.
    """

    def __init__(self, name: str, function: Callable, mutates_args: Sequence[str]) -> None:
        self.name, self.function = name, function
        self._differentiable = lambda first, others: function(first, *others)
        self._mutated = [i for i, x in enumerate(inspect.signature(function).parameters) if x in mutates_args]
        self._operator = torch.library.custom_op(f"rpo_kernels::{name}", function, mutates_args=mutates_args)

    def register_fake(self, fake: Callable) -> None:
        """What it returns, by shape: see ``torch.library.register_fake``."""
        self._operator.register_fake(fake)

    def register_autograd(self, backward: Callable, setup_context: Callable) -> None:
        """Its derivative in its first argument, the only one that has one: see ``torch.library.register_autograd``."""
        self._operator.register_autograd(backward, setup_context=setup_context)
        function = self.function

        def forward(ctx: Any, first: Tensor, others: tuple) -> Any:  # few arguments: each costs time, a setup_context more
            output = function(first, *others)
            setup_context(ctx, (first, *others), output)
            return output

        def differentiate(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
            return backward(ctx, *gradients)[0], None

        methods = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
        eager = type(self.name, (torch.autograd.Function,), methods)
        self._differentiable = super(torch.autograd.Function, eager).apply  # Function.apply looks for transforms again

    def __call__(self, *args: Any) -> Any:
        if is_watched(args):
            if any(map(_has_tangent, args)):
                raise NotImplementedError("rpo_kernels: forward-mode derivatives are not implemented")
            return self._operator(*args)
        wanted = torch.is_grad_enabled() and args[0].requires_grad
        results = self._differentiable(args[0], args[1:]) if wanted else self.function(*args)
        for i in self._mutated:
            torch.autograd.graph.increment_version(args[i])
        return results


_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), bool, int, float, str))


def is_watched(args: Sequence[Any]) -> bool:
    """Whether a call with these arguments, a tensor first, has to pass the dispatcher."""
    return (
        torch.compiler.is_compiling()
        or not _PLAIN.issuperset(map(type, args))
        or args[0].is_meta
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._functorch.is_functorch_wrapped_tensor(args[0])
        or torch._C._is_tracing()
    )


def _has_tangent(x: object) -> bool:
    if torch.compiler.is_compiling() or forward_ad._current_level < 0 or not isinstance(x, Tensor):
        return False
    return forward_ad.unpack_dual(x).tangent is not None


def only_once(op: str, ctx: Any) -> None:
    """At the start of a backward that overwrites what it is made of; in a second one, raises."""
    if getattr(ctx, "spent", False):
        raise RuntimeError(f"{op}: no second backward: the first has overwritten what it was made of; call {op} again")
    ctx.spent = True


def once_differentiable(gradient: Tensor, *sources: object) -> Tensor:
    """The gradient; to differentiate it again in one of its sources raises, instead of leaving that term out."""
    return _OnceDifferentiable.apply(gradient, *sources) if torch.is_grad_enabled() else gradient


class _OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradient: Tensor, *sources: object) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *_: Tensor) -> None:
        raise NotImplementedError("rpo_kernels: second derivatives are not implemented")
