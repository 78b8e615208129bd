"""What commands print in terminals of any encoding."""

import subprocess
import sys

import pytest

from sphereface2 import console

SCRIPT = """
from rich.progress import Progress
from sphereface2 import console

console.accept_any_encoding()
table = console.table("Lüders – scores", ["", "value ± …"])
table.add_row("TAR at FAR ≤ 1e-3", "98.00 – 99.00 %")
console.show(table, "3 × 4 → 12 顔 ñ")
with console.bars() as progress:
    console.advance(progress, "images – all", 3)(3)
print("plain – print")
"""


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437", "cp932", "cp949", "utf-8"])
def test_output_survives_every_encoding(encoding):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        env={"PYTHONIOENCODING": encoding, "COLUMNS": "60", "PYTHONPATH": ":".join(sys.path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown = done.stdout.decode(encoding)
    assert "TAR at FAR" in shown and "plain" in shown
    if encoding == "utf-8":
        assert "3 × 4 → 12 顔 ñ" in shown and "┃" in shown
    else:
        assert "┃" not in shown and "|" in shown
    if encoding == "ascii":
        assert "3 x 4 > 12 ? ?" in shown and "98.00 - 99.00 %" in shown


def test_progress_without_a_terminal_is_a_line_a_minute(monkeypatch, capsys):
    monkeypatch.delenv("FORCE_COLOR", raising=False)  # by which rich takes a log for a terminal
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with console.bars(counted=True) as progress:
        advance = console.advance(progress, "images", 7200)
        for _ in range(119):  # a second each
            clock[0] += 1
            advance(10)
    assert capsys.readouterr().err == "images 600/7,200, 11 min left\n"


def test_a_narrow_terminal_loses_no_cell(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    table = console.table("set", ["", "value", "95 % interval over people"])
    table.add_row("TAR at FAR 1e-3", "99.12 ± 0.32 %", "97.00 % – 99.00 %")
    console.show(table)
    shown = capsys.readouterr().out
    assert all(
        word in shown for word in ["TAR at", "1e-3", "99.12", "0.32 %", "97.00 %", "99.00 %"]
    )
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 40


def test_names_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither as markup nor as emoji."""
    console.show("team:key:7 [/] [red]", console.table("[old] [/]", ["", ":cat:"]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "team:key:7 [/] [red]" and lines[1].rstrip() == "[old] [/]"
    assert ":cat:" in lines[3]
