"""Whether the installed TRL is what the adapter was written for.

The adapter reaches into private names. It looks at what it finds (which arguments functions take;
in `patch.py` also which numbers they return), never at the number of a release.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable

import trl

TESTED = "1.16"


def refusal(op: str, changes: Iterable[str]) -> RuntimeError:
    """An error that names what TRL does differently."""
    return RuntimeError(
        f"{op}: the installed trl ({trl.__version__}) is not what this was written for (tested "
        f"with {TESTED}): {'; '.join(changes)}. Install a newer rpo_kernels, or "
        f'"trl=={TESTED}.*"'
    )


def changed_calls(calls: dict[Callable, tuple[int, tuple[str, ...]]]) -> list[str]:
    """What keeps TRL's functions from being called with so many positional arguments and with
    keywords of these names.
    """
    changes = []
    for function, (positional, keywords) in calls.items():
        try:
            signature = inspect.signature(function)
            signature.bind(*[None] * positional, **dict.fromkeys(keywords))
        except TypeError as error:
            changes.append(f"{name_of(function)}{signature} is called otherwise ({error})")
    return changes


def changed_methods(ours: type, theirs: type, names: Iterable[str]) -> list[str]:
    """Methods that TRL's trainer calls and ours overrides, where the arguments are not the same."""
    changes = []
    for name in names:
        expected = list(inspect.signature(getattr(ours, name)).parameters)
        method = getattr(theirs, name, None)
        if method is None:
            changes.append(f"{theirs.__name__} has no method `{name}`")
        elif (found := list(inspect.signature(method).parameters)) != expected:
            changes.append(
                f"{theirs.__name__}.{name} takes ({', '.join(found)}), not ({', '.join(expected)})"
            )
    return changes


def name_of(function: Callable) -> str:
    return f"{function.__module__}.{getattr(function, '__qualname__', function)}"
