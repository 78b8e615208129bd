"""What a run tells while it trains."""

from __future__ import annotations

import re

from sphereface2.training import logging
from sphereface2.training.logging import RunLog


def test_a_log_file_gets_a_line_a_minute_however_long_a_step_takes(tmp_path, capsys, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(logging.time, "monotonic", lambda: now)
    values = {"loss": 1.0, "images_per_second": 200.0, "seconds_per_step": 1.3}
    with RunLog(tmp_path, main=True, total_steps=5520) as log:
        for step in range(20, 5521, 20):
            now += 26.0
            log.train(step, step / 184, values)
    told = [int(step) for step in re.findall(r"^step (\d+)/5520 ", capsys.readouterr().out, re.M)]
    assert told == [20, *range(80, 5520, 60), 5520]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 276


def test_a_far_is_told_as_in_tables_and_kept_as_it_was(tmp_path, capsys):
    values = {"held-out TAR@0.001": 0.5, "held-out a TAR@b accuracy": 0.9}
    with RunLog(tmp_path, main=True, total_steps=2) as log:
        log.validation(2, 1.0, 3.0, values)
    assert (
        "held-out TAR@1e-3 50.00 % · held-out a TAR@b accuracy 90.00 %" in capsys.readouterr().out
    )
    assert '"held-out TAR@0.001": 0.5' in (tmp_path / "metrics.jsonl").read_text()
