"""The page about many GPUs says what its script says, and the script what its formulas should."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("tabulate")
PATH = Path(__file__).parents[2] / "benchmarks" / "scaling.py"


@pytest.fixture(scope="module")
def scaling():
    spec = importlib.util.spec_from_file_location("scaling", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_scaling_page_is_what_the_script_writes(scaling):
    assert PATH.with_suffix(".md").read_text() == scaling.page()


def test_scaling_crossing_is_where_all_reduce_and_gemms_take_equally_long(scaling):
    V, link = 1 << 20, scaling.LINKS["InfiniBand"]
    for trainable, gemms in ((True, 3), (False, 2)):
        tp = round(scaling.crossing(V, link, gemms))
        below, above = (scaling.cost(4096, 512, V, r, link, trainable) for r in (tp - 1, tp + 1))
        assert below["dhidden"] < below["gemms"] and above["dhidden"] > above["gemms"]


def test_scaling_of_one_rank_has_no_communication(scaling):
    one, eight = (scaling.cost(32_768, 4096, 128_256, r) for r in (1, 8))
    assert one["statistics"] == one["dhidden"] == 0
    for name in ("gemms", "rows", "naive"):
        assert eight[name] == pytest.approx(one[name] / 8)
