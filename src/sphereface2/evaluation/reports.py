"""What the reports of different evaluations say in the same words."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.progress import Progress

from sphereface2.evaluation.verification import LEVEL, far_key


def advance(progress: Progress | None, title: str, total: float) -> Callable[[float], None]:
    """A new bar's callback, which takes the amount done since the last call."""
    if progress is None:
        return lambda amount: None
    task = progress.add_task(title, total=total)
    return lambda amount: progress.advance(task, amount)


def untold(figure: str, rates: Sequence[float], count: int, kind: str) -> list[str]:
    """The note on ``rates`` that ``count`` trials of a ``kind`` are too few for, if there are any.

    ``figure`` names what is not told, for instance "TAR at FAR".
    """
    if not rates:
        return []
    return [f"{figure} {far_key(max(rates))} and below cannot be told from {count:,} {kind}"]


def pair(ci: tuple[float, float] | None) -> list[float] | None:
    """An interval as JSON has it."""
    return None if ci is None else list(ci)


def how(over: str, replicates: int, seed: int) -> dict[str, Any]:
    """How intervals were made, with thresholds found anew in each resample."""
    return {"level": LEVEL, "over": over, "replicates": replicates, "seed": seed}


def how_fixed(over: str, replicates: int, seed: int) -> dict[str, Any]:
    """How intervals were made, with thresholds held fixed."""
    return how(over, replicates, seed) | {"thresholds": "fixed"}


def percent(value: float | None) -> str:
    """A share in a table; a dash where it is not told."""
    return "–" if value is None else f"{100 * value:.2f} %"


def interval(ci: Sequence[float] | None, told: Callable[[float], str] = percent) -> str:
    """An interval in a table; nothing where there is none."""
    return "" if ci is None else f"{told(ci[0])} – {told(ci[1])}"


def print_json(report: Mapping[str, Any]) -> None:
    """A command's report on standard output, for ``--json``."""
    json.dump(report, sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")
