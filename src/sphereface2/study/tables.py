"""Numbers as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sphereface2 import markdown
from sphereface2.markdown import Markdown, table
from sphereface2.study.statistics import Contrast, Series, half_width

NONE = "–"


@dataclass(frozen=True)
class Column:
    """A figure as a column: its name, its title, how it is printed and which value is best."""

    name: str
    title: str
    scale: float = 100.0
    digits: int = 2
    best: str | None = "max"


def by_arm(header: Sequence[str], arms: Iterable[str], columns: Iterable[Sequence[str]]) -> str:
    """A table with a row for each arm, from its columns."""
    return table(header, [*zip(arms, *columns, strict=True)])


def number(value: float | None, *, scale: float = 1.0, digits: int = 2, sign: bool = False) -> str:
    """``scale`` times the value, with a true minus; a dash where there is none.

    Examples:
        >>> number(-0.001, sign=True), number(-0.5)
        ('+0.00', '−0.50')
    """
    if value is None or value != value:
        return NONE
    shown = f"{scale * value:{'+' if sign else ''}z.{digits}f}"  # z: no negative zero
    return shown.replace("-", "−")


def mean(
    values: Sequence[float], *, scale: float = 1.0, digits: int = 2, bold: bool = False
) -> str:
    """Mean ± half-width of the interval over seeds; without ± for one seed.

    A dash where any seed has no number: the mean of the others would hide what failed in it.
    """
    if not values or any(value != value for value in values):
        return NONE
    middle = number(sum(values) / len(values), scale=scale, digits=digits)
    half = half_width(values)
    after = "" if half is None else f" ± {number(half, scale=scale, digits=digits)}"
    return Markdown(f"**{middle}**{after}" if bold else f"{middle}{after}")


def means(
    column: Sequence[Series], *, scale: float = 100.0, digits: int = 2, best: str | None = "max"
) -> list[str]:
    """A column of `mean`, the best (``max`` or ``min``) in bold if there is more than one."""
    values = [[figure.value for figure in series.values()] for series in column]
    middles = [sum(row) / len(row) if row else float("nan") for row in values]
    shown = [middle for middle in middles if middle == middle]
    first = None
    if best is not None and len(shown) > 1:
        first = max(shown) if best == "max" else min(shown)
    return [
        mean(row, scale=scale, digits=digits, bold=middle == first)
        for row, middle in zip(values, middles, strict=True)
    ]


def difference(found: Contrast | None, *, scale: float = 100.0, digits: int = 2) -> str:
    """Three lines of a cell: the difference, bold if marked; over people; over seeds."""
    if found is None or found.value != found.value:
        return NONE
    value = number(found.value, scale=scale, digits=digits, sign=True)
    shown = [Markdown(f"**{value}**") if found.marked else value]
    for bounds in (found.people, found.seeds):
        if bounds is None:
            shown.append(NONE)
        else:
            low, high = (number(b, scale=scale, digits=digits, sign=True) for b in bounds)
            shown.append(f"{low} … {high}")
    return markdown.lines(*shown)


def value(setting: Any) -> str:
    """A setting's value in words."""
    if isinstance(setting, float):
        return f"{setting:g}"
    if isinstance(setting, list | tuple):
        return ", ".join(value(part) for part in setting)
    return "none" if setting is None else str(setting)


def settings(changed: Mapping[str, Any]) -> str:
    """``{section.key: value}``, or nested settings, in words."""
    return ", ".join(f"{key} {value(what)}" for key, what in _flat(changed)) or NONE


def _flat(tree: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, what in tree.items():
        if isinstance(what, dict):
            yield from _flat(what, f"{before}{key}.")
        else:
            yield before + key, what
