"""``pytest -m gpu``: correctness on the device, before any figure counts.

The modules run side by side, each in a process of its own: a test waits for the host far longer
than for the device.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpu.measure import ROOT, Part

OUTCOME = re.compile(r"^(\S*::.+?) (PASSED|FAILED|ERROR|SKIPPED)", re.MULTILINE)
SUMMARY = re.compile(r"^(?:FAILED|ERROR) (\S*::.+?) - (.*)$", re.MULTILINE)


def run(part: Part, folder: Path = ROOT / "tests" / "gpu") -> None:
    marks = "gpu" if part.device.type == "cuda" else "not gpu and not slow"
    words = [sys.executable, "-m", "pytest", "-v", "-m", marks, "--tb=short", "--durations=3"]
    # The project's own options print a dot a test; the names tell what was found in time.
    words += ["-o", "addopts="]
    words += ["-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(ROOT)]
    if part.tiny:
        words += ["-k", "tiny"]
    with tempfile.TemporaryDirectory() as scratch:
        running = {}
        for module in sorted(folder.glob("test_*.py")):
            log = Path(scratch) / module.stem
            with log.open("w") as out:
                running[log] = subprocess.Popen(
                    [*words, str(module)],
                    cwd=ROOT,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "COLUMNS": "300"},
                )
        while part.left > 0 and any(process.poll() is None for process in running.values()):
            time.sleep(0.2)
        for log, process in running.items():
            collect(part, log, process)
    # A run in which nothing was tested has shown nothing.
    part.failures += int(not sum(row.get("passed", 0) for row in part.rows))


def collect(part: Part, log: Path, process: subprocess.Popen[bytes]) -> None:
    """Record what a module's tests came to; one that is not at its end by now is ended."""
    status: int | str | None = process.poll()
    if status is None:
        process.send_signal(signal.SIGINT)  # pytest then shows where it was
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        status = "cut short"
    text = log.read_text(errors="replace")
    print(text)
    outcomes = dict(OUTCOME.findall(text))
    counts = {
        name: sum(outcome in kinds for outcome in outcomes.values())
        for name, kinds in (
            ("passed", ("PASSED",)),
            ("failed", ("FAILED", "ERROR")),
            ("skipped", ("SKIPPED",)),
        )
    }
    part.record(module=log.name, **counts, status=status)
    for test, message in SUMMARY.findall(text):
        part.record(test=test, message=message[:160])
    # 5: pytest chose none of the module's tests.
    part.failures += int(status not in (0, 5))
