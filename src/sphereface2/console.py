"""What a command shows in a terminal: progress bars, tables, lines and JSON.

Results go to standard output, progress to standard error, so that a command's output can be piped.
"""

from __future__ import annotations

import codecs
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import TextIOWrapper
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from sphereface2.files import visible

_NAMED = 20
A_LINE = 60.0
"""Seconds between lines of progress where there is no terminal."""
_ASCII = str.maketrans("–—−…·×→←≤≥“”‘’─│±█", "---..x><<>\"\"''-|~#")


def bars(*, counted: bool = False) -> Progress:
    """Progress bars on standard error, which vanish when done; lines where it is no terminal.

    Args:
        counted: show "done/total" instead of a percentage.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        return _Lines(counted)
    middle: ProgressColumn = MofNCompleteColumn() if counted else TaskProgressColumn()
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        middle,
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


class _Lines(Progress):
    """A line a minute, for a log file: how far the task is that advanced last."""

    def __init__(self, counted: bool) -> None:
        # Of slow steps too, a time that is left.
        super().__init__(disable=True, get_time=time.monotonic, speed_estimate_period=600)
        self._counted, self._due = counted, time.monotonic() + A_LINE

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + A_LINE
        task = next(one for one in self.tasks if one.id == task_id)
        done = f"{task.percentage:.0f} %"
        if self._counted:
            done = f"{task.completed:,.0f}/{task.total:,.0f}"
        left = "" if task.time_remaining is None else f", {duration(task.time_remaining)} left"
        with suppress(OSError):  # a full disk under the log is no reason to stop the work
            print(f"{task.description} {done}{left}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Minutes, or hours from two on, for people.

    Examples:
        >>> duration(61), duration(9000)
        ('2 min', '2.5 h')
    """
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def advance(progress: Progress | None, title: str, total: float) -> Callable[[float], None]:
    """Add a bar and return the function that takes the amount done since its last call."""
    if progress is None:
        return lambda amount: None
    task = progress.add_task(title, total=total)
    return lambda amount: progress.advance(task, amount)


def table(title: str, columns: Sequence[str], *, dim: Sequence[int] = ()) -> Table:
    """A table of a text column and number columns.

    Args:
        title: stands above, on the left.
        columns: headers; the first column is set on the left, the others on the right.
        dim: indices of columns in a fainter colour.
    """
    result = Table(title=cell(title), title_justify="left")
    for index, header in enumerate(columns):
        result.add_column(
            header,
            justify="right" if index else "left",
            style="dim" if index in dim else None,
            overflow="fold",  # in a narrow terminal the widest column wraps first, and none ends
        )
    return result


def cell(text: str) -> str:
    """A text of unknown origin for a table, whose cells have markup; see `visible`."""
    return escape(visible(text))


def say(console: Console, line: str) -> None:
    """Print a line as it is: neither wrapped, as a log file has no width, nor interpreted.

    Not by the terminal either, whatever names of files and people it holds; see `visible`.
    """
    console.print(visible(line), soft_wrap=True, highlight=False, markup=False, emoji=False)


def note(line: object) -> None:
    """Print a line on standard error, no more interpreted than by `say`."""
    print(visible(str(line)), file=sys.stderr)


def show(*parts: Table | str) -> None:
    """Print tables and lines on standard output."""
    console = Console(emoji=False)  # ``:cat:`` may be a part of a name
    for part in parts:
        if isinstance(part, str):
            say(console, part)
        else:
            console.print(part)


def tell(as_json: bool, report: Any, *parts: Table | str) -> None:
    """Print a command's report on standard output: as JSON, or tables and lines that tell of it."""
    if as_json:
        json.dump(report, sys.stdout, indent=2, allow_nan=False)
        sys.stdout.write("\n")
    else:
        show(*parts)


def percent(value: float | None) -> str:
    """A share with two decimals, a dash for None.

    Examples:
        >>> percent(0.98765), percent(None)
        ('98.77 %', '–')
    """
    return "–" if value is None else f"{100 * value:.2f} %"


def accept_any_encoding() -> None:
    """Let standard output and error write every character, whatever their encoding.

    What an encoding such as cp1252, cp437, cp932 or cp949 lacks becomes the nearest ASCII character
    or "?", instead of a UnicodeEncodeError. Bars and boxes are drawn in ASCII there by rich. What
    is written to a stream that was closed (``>&-``) is lost.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    codecs.register_error("ascii-likeness", _likeness)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(errors="ascii-likeness")


def _likeness(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end].translate(_ASCII)
    return "".join(c if c.isascii() else "?" for c in lost), error.end


def named(what: str, names: Sequence[str], rest: str = "") -> list[str]:
    """Lines that count and name things, the first twenty of them; none if there are none.

    Examples:
        >>> named("with no face found", ["a.jpg"])
        ['1 with no face found:', '  a.jpg']
    """
    if not names:
        return []
    lines = [f"{len(names):,} {what}:", *(f"  {name}" for name in names[:_NAMED])]
    return lines + ([f"  … and {len(names) - _NAMED:,} more{rest}"] if len(names) > _NAMED else [])
