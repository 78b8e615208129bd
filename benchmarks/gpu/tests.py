"""``pytest -m gpu``: correctness on the device, before any figure counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gpu.measure import ROOT, Part


class Counter:
    """A pytest plugin that counts outcomes and keeps what failed."""

    def __init__(self) -> None:
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.failures: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = str(crash.message if crash is not None else report.longrepr)
            self.failures[report.nodeid] = message.splitlines()[0][:160]


def run(part: Part, folder: Path = ROOT / "tests" / "gpu") -> None:
    on_device = part.device.type == "cuda"
    counter = Counter()
    words = ["-m", "gpu" if on_device else "not gpu and not slow", "--tb=short"]
    words += ["-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(ROOT)]
    if part.tiny:
        words += ["-k", "tiny"]
    status = pytest.main([*words, str(folder)], plugins=[counter])
    figures: dict[str, Any] = {**counter.counts, "exit status": int(status)}
    part.record(**figures)
    for test, message in counter.failures.items():
        part.record(test=test, message=message)
    # A run in which nothing was tested has shown nothing.
    part.failures += int(status != 0 or counter.counts["passed"] == 0)
