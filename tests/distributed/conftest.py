from __future__ import annotations

import functools
from collections import defaultdict

import pytest

from . import ranks


@pytest.fixture(scope="session")
def failures_on(request, tmp_path_factory):
    """``failures_on(world)``: the failures of each selected test of :func:`ranks.on_ranks`."""
    selected = defaultdict(list)
    for item in request.session.items:
        if hasattr(item.function, "on_one_rank"):
            selected[item.callspec.params["world"]].append(ranks.name_of(item.function))
    return functools.cache(
        lambda world: ranks.run(selected[world], world, tmp_path_factory.mktemp("ranks"))
    )
