"""A plugin of pytest: a run that was cut short goes on behind the tests that have passed.

    python -m pytest -p benchmarks.resume --passed FILE

FILE is read at the start and renewed at the end; it counts for one commit (RPO_COMMIT), device and
torch.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption("--passed", type=Path, metavar="FILE", help="JSON: tests that have passed")


class Passed:
    def __init__(self, path: Path, about: dict):
        self.path, self.about = path, about
        found = json.loads(path.read_text()) if path.exists() else {}
        self.tests = set(found["passed"]) if found.get("about") == about else set()
        self.before = frozenset(self.tests)

    def pytest_collection_modifyitems(self, items):
        skip = pytest.mark.skip(reason="has passed before")
        for item in items:
            if item.nodeid in self.before:
                item.add_marker(skip)

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            self.tests.add(report.nodeid)

    def pytest_sessionfinish(self, session):
        if not hasattr(session.config, "workerinput"):  # pytest-xdist's workers report to it
            text = json.dumps({"about": self.about, "passed": sorted(self.tests)}, indent=1)
            self.path.write_text(text + "\n")


def pytest_configure(config):
    if path := config.getoption("--passed"):
        import torch

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        about = {"commit": os.environ["RPO_COMMIT"], "device": device, "torch": torch.__version__}
        config.pluginmanager.register(Passed(path, about))
