"""Options and fixtures of `pytest benchmarks/bench.py`."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import pytest
import torch
from cases import Case, full, smoke
from measure import Ceilings
from providers import PROVIDERS
from results import Results, about, publish
from truth import truth_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROTATED_BYTES = 4 << 30  # smaller inputs come in two sets


def pytest_addoption(parser):
    group = parser.getgroup("loss head")
    group.addoption(
        "--smoke",
        action="store_true",
        help="small sizes that run on a CPU in two minutes; the default there",
    )
    group.addoption(
        "--results",
        type=Path,
        metavar="FILE",
        help="JSON file; a run on the same device and commit goes on with it",
    )
    group.addoption(
        "--budget", type=float, metavar="SECONDS", help="begin no measurement after this"
    )


def sizes(config) -> str:
    return "smoke" if config.getoption("--smoke") or DEVICE == "cpu" else "full"


def pytest_configure(config):
    config.addinivalue_line("markers", "benchmark: pytest-benchmark's, where it is installed")
    config.addinivalue_line("filterwarnings", "default")  # peers' warnings are not ours to fix
    config.started = time.monotonic()


def pytest_report_header(config):
    return f"loss head: {sizes(config)} sizes on {DEVICE}" + (
        "; full sizes need a GPU" if DEVICE == "cpu" and not config.getoption("--smoke") else ""
    )


def pytest_generate_tests(metafunc):
    if {"case", "provider"} <= set(metafunc.fixturenames):
        cases = smoke() if sizes(metafunc.config) == "smoke" else full()
        pairs = [(case, provider) for case in cases for provider in PROVIDERS]
        metafunc.parametrize(
            "case,provider", pairs, ids=[f"{case.id}, {provider.name}" for case, provider in pairs]
        )


class Bench:
    """Results, ceilings, and the inputs and truth of the current case."""

    def __init__(self, config):
        self.device, self.case = DEVICE, None
        self.ends = config.started + (config.getoption("--budget") or float("inf"))
        self.ceilings = Ceilings(DEVICE)
        path = (
            config.getoption("--results")
            or Path(__file__).parent / "results" / f"bench-{sizes(config)}-{DEVICE}.json"
        )
        self.results = Results(
            path, about(DEVICE, sizes(config), copy_rate=self.ceilings.copy_rate)
        )

    def load(self, case: Case) -> None:
        if case == self.case:
            return
        self.case = self.inputs = self.truth = None
        torch.compiler.reset()  # too many shapes would make compiled providers run uncompiled
        self.free()
        sets = 2 if case.input_bytes < ROTATED_BYTES else 1
        self.inputs = [case.inputs(self.device, seed) for seed in range(sets)]
        self.truth = truth_of(case, self.inputs[0])
        self.case = case
        self.free()

    def free(self) -> None:
        if self.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def bench(pytestconfig):
    bench = Bench(pytestconfig)
    yield bench
    if bench.results.rows:
        bench.results.save()
        print("\n", *publish(bench.results.path), bench.results.path, sep="\n")


@pytest.fixture
def timer(request):
    """pytest-benchmark's fixture, or None if it is not installed: bench.py then times by itself."""
    return (
        request.getfixturevalue("benchmark")
        if request.config.pluginmanager.hasplugin("benchmark")
        else None
    )
