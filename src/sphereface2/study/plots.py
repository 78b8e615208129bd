"""Pictures of a study, as PNG. Each function takes what it draws, ready made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.ticker import MaxNLocator, NullLocator

from sphereface2.evaluation.plots import COLOURS, GENUINE, GRID, IMPOSTOR, INK, panels, write
from sphereface2.evaluation.results import far_key
from sphereface2.study import tables
from sphereface2.study.measure import PeopleMeasures
from sphereface2.study.results import is_number
from sphereface2.study.statistics import Contrast, Series, half_width

_MARKERS = "osD^vP"
_STYLES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
_DASHED: dict[str, Any] = {"color": "#777777", "lw": 1.1, "ls": (0, (4, 3))}


@dataclass(frozen=True)
class Panel:
    """A figure to draw: its title and, for each line, its series at each place on the x axis."""

    title: str
    lines: Mapping[str, Sequence[Series]]


def plot_conditions(drawn: Sequence[Panel], conditions: Sequence[str], path: Path) -> None:
    """One panel a figure: a marker for each arm under each condition, with intervals over seeds."""
    canvas, axes = panels([panel.title for panel in drawn], size=(6.4, 3.1 * len(drawn) + 0.6))
    count = len(drawn[0].lines)
    for place, panel in zip(axes, drawn, strict=True):
        for k, (name, line) in enumerate(panel.lines.items()):
            # Side by side, so that error bars do not hide each other.
            shift = 0.28 * ((k + 0.5) / count - 0.5)
            _line(place, np.arange(len(line)) + shift, line, k, name, joined=False)
        place.set_xlim(-0.4, len(conditions) - 0.6)
        _categories(place, conditions)
        _percent(place)
    _legend(canvas, axes[0])
    write(canvas, path)


def plot_sweep(
    drawn: Sequence[Panel], values: Sequence[Any], own: Any, title: str, path: Path
) -> None:
    """One panel a figure: its line over a setting's values, the arm's own value marked."""
    canvas, axes = panels([panel.title for panel in drawn], size=(6.4, 2.7 * len(drawn) + 0.5))
    ticks = [tables.value(value) for value in values]
    x, logarithmic = _places(values)
    joined = all(is_number(value) for value in values)
    for place, panel in zip(axes, drawn, strict=True):
        for name, line in panel.lines.items():
            _line(place, x, line, 0, name, joined=joined)
        if own in values:
            place.axvline(x[list(values).index(own)], zorder=0, **_DASHED)
        if logarithmic:
            place.set_xscale("log")
            place.xaxis.set_minor_locator(NullLocator())
        place.margins(x=0.07, y=0.12)
        place.set_xticks(x, ticks)
        _percent(place)
    axes[-1].set_xlabel(f"{title}; dashed: the arm's own value", color=INK)
    write(canvas, path)


def plot_differences(
    drawn: Sequence[tuple[str, Mapping[str, Contrast]]], baseline: str, path: Path
) -> None:
    """One panel a figure, a row an arm: its difference to the baseline with both intervals."""
    names = list(dict.fromkeys(name for _, found in drawn for name in found))
    canvas, axes = panels(
        [title for title, _ in drawn],
        columns=len(drawn),
        size=(7.2, 1.5 + 0.42 * len(names)),
        sharey=True,
    )
    for place, (_, found) in zip(axes, drawn, strict=True):
        for row, name in enumerate(names):
            one = found.get(name)
            if one is None:
                continue
            style: dict[str, Any] = {"color": COLOURS[0], "lw": 2.4, "solid_capstyle": "butt"}
            if one.people is not None:
                place.plot(100 * np.array(one.people), [row - 0.12] * 2, **style)
            if one.seeds is not None:
                style |= {"color": COLOURS[1]}
                place.plot(100 * np.array(one.seeds), [row + 0.12] * 2, **style)
            place.plot(100 * one.value, row, "o", color=INK, ms=5, zorder=3)
        place.axvline(0, zorder=0, **_DASHED)
        place.set_yticks(range(len(names)), names)
        place.set_ylim(len(names) - 0.5, -0.5)
        place.xaxis.set_major_locator(MaxNLocator(5))
        place.grid(True, axis="x", color=GRID, linewidth=0.7)
        place.set_xlabel("percentage points", color=INK)
    axes[0].plot([], [], color=COLOURS[0], lw=2.4, label="other test people")
    axes[0].plot([], [], color=COLOURS[1], lw=2.4, label="other seeds")
    axes[0].plot([], [], "o", color=INK, ms=5, label=f"difference to {baseline}")
    _legend(canvas, axes[0])
    write(canvas, path)


def plot_scores(
    tests: Mapping[str, PeopleMeasures], far: float, edges: np.ndarray, path: Path
) -> None:
    """One panel an arm: histograms of genuine and impostor pairs, each summing to one.

    Args:
        tests: by arm.
        far: the threshold that keeps it is marked.
        edges: of the histograms' bins.
        path: PNG to write.
    """
    drawn = {
        arm: [np.array(one.histogram) for one in (test.genuine_scores, test.impostor_scores)]
        for arm, test in tests.items()
    }
    columns = min(3, len(drawn))
    rows = -(-len(drawn) // columns)
    canvas, axes = panels(
        list(drawn), columns=columns, size=(2.7 * columns + 0.6, 1.9 * rows + 0.9), sharex=True
    )
    used = [np.flatnonzero(h) for both in drawn.values() for h in both if h.any()]
    low = edges[min(int(u[0]) for u in used)]
    high = edges[max(int(u[-1]) for u in used) + 1]
    for k, (place, (name, both)) in enumerate(zip(axes, drawn.items(), strict=True)):
        place.set_title(name, loc="left", color=INK, fontsize=9.5)
        for histogram, colour, what in zip(
            both, (GENUINE, IMPOSTOR), ("genuine pairs", "impostor pairs"), strict=True
        ):
            place.stairs(
                histogram / max(histogram.sum(), 1),
                edges,
                fill=True,
                facecolor=colour + "55",
                edgecolor=colour,
                linewidth=1.2,
                label=what,
            )
        if (threshold := tests[name].threshold.get(far)) is not None:
            label = f"threshold at FAR {far_key(far)}"
            place.axvline(threshold, color=INK, lw=1.1, ls=(0, (4, 3)), label=label)
        place.set_xlim(low, high)
        place.xaxis.set_major_locator(MaxNLocator(4))
        _percent(place, 3)
        if k >= len(drawn) - columns:
            place.tick_params(labelbottom=True)
            place.set_xlabel("cosine similarity", color=INK, fontsize=9)
        if k % columns == 0:
            place.set_ylabel("share of pairs a bin", color=INK, fontsize=9)
    _legend(canvas, axes[0])
    write(canvas, path)


def plot_transfer(drawn: Sequence[Panel], asked: Sequence[float], path: Path) -> None:
    """One panel a set, one line an arm: the FAR that is reached by the FAR that was asked for."""
    canvas, axes = panels(
        [panel.title for panel in drawn],
        columns=2,
        size=(7.2, 2.9 * -(-len(drawn) // 2) + 0.7),
        sharex=True,
        sharey=True,
    )
    x = np.log10(asked)
    for place, panel in zip(axes, drawn, strict=False):
        place.axhline(0, zorder=0, **_DASHED)
        for k, (name, line) in enumerate(panel.lines.items()):
            shift = 0.24 * ((k + 0.5) / len(panel.lines) - 0.5)
            _line(place, x + shift, line, k, name)
        place.set_xticks(x, [far_key(far) for far in asked])
        place.grid(True, axis="y", color=GRID, linewidth=0.7)
        place.set_axisbelow(True)
        place.set_ylabel("log10 of reached / asked", color=INK)
    for place in axes[: len(drawn)][-2:]:
        place.set_xlabel("FAR asked for, on the validation people", color=INK)
    _legend(canvas, axes[0])
    write(canvas, path)


def plot_curves(
    lines: Mapping[str, Mapping[str, np.ndarray]], titles: Mapping[str, str], path: Path
) -> None:
    """One panel a measure, one line an arm, over ``step``."""
    rows = -(-len(titles) // 2)
    canvas, axes = panels([*titles.values()], columns=2, size=(9.6, 2.5 * rows + 0.7))
    for place, name in zip(axes, titles, strict=True):
        for k, (arm, values) in enumerate(lines.items()):
            style = _STYLES[k // len(COLOURS) % len(_STYLES)]
            colour = COLOURS[k % len(COLOURS)]
            place.plot(values["step"], values[name], color=colour, ls=style, lw=1.5, label=arm)
        place.grid(True, axis="y", color=GRID, linewidth=0.7)
        place.set_xlabel("step", color=INK)
    _legend(canvas, axes[0])
    write(canvas, path)


def plot_thresholds(drawn: Sequence[tuple[str, Mapping[str, np.ndarray]]], path: Path) -> None:
    """One panel a unit, a row an arm: how people's own thresholds lie about their median."""
    names = list(drawn[0][1])
    canvas, axes = panels(
        [title for title, _ in drawn],
        columns=len(drawn),
        size=(7.2, 1.4 + 0.5 * len(names)),
        sharey=True,
    )
    for place, (title, values) in zip(axes, drawn, strict=True):
        place.set_title(title, loc="left", color=INK, fontsize=9.5)
        centred = [values[name] - np.median(values[name]) for name in names]
        rows = list(range(len(names)))
        shown = place.violinplot(
            centred, rows, orientation="horizontal", widths=0.8, showextrema=False, points=200
        )
        bodies: Any = shown["bodies"]
        for k, body in enumerate(bodies):
            body.set(facecolor=COLOURS[k % len(COLOURS)], edgecolor="none", alpha=0.45)
        for row, own in zip(rows, centred, strict=True):
            p5, p25, p75, p95 = np.percentile(own, (5, 25, 75, 95))
            colour = COLOURS[row % len(COLOURS)]
            place.plot([p5, p95], [row, row], color=colour, lw=1.2)
            place.plot([p25, p75], [row, row], color=colour, lw=4, solid_capstyle="butt")
        bound = max(float(np.abs(np.percentile(own, (0.2, 99.8))).max()) for own in centred)
        place.set_xlim(-1.05 * bound, 1.05 * bound)
        place.set_yticks(rows, names)
        place.set_ylim(len(names) - 0.5, -0.5)
        place.xaxis.set_major_locator(MaxNLocator(5))
        place.grid(True, axis="x", color=GRID, linewidth=0.7)
        place.set_axisbelow(True)
        place.set_xlabel("own threshold less the median", color=INK)
    write(canvas, path)


def _line(
    axes: Axes, x: np.ndarray, line: Sequence[Series], k: int, name: str, *, joined: bool = True
) -> None:
    values = [[figure.value for figure in series.values()] for series in line]
    there = [i for i, row in enumerate(values) if row]
    axes.errorbar(
        x[there],
        [np.mean(values[i]) for i in there],
        yerr=[half_width(values[i]) or 0.0 for i in there],
        color=COLOURS[k % len(COLOURS)],
        linestyle=_STYLES[k // len(COLOURS) % len(_STYLES)] if joined else "none",
        marker=_MARKERS[(k + k // len(COLOURS)) % len(_MARKERS)],
        markersize=4.5,
        linewidth=1.6,
        elinewidth=1,
        capsize=2.5,
        label=name,
    )


def _places(values: Sequence[Any]) -> tuple[np.ndarray, bool]:
    """Where values go on the x axis, and whether it is logarithmic.

    Evenly spaced where the values are no numbers, or lie too close for their labels.
    """
    if len(values) > 1 and all(is_number(value) for value in values):
        numbers = np.array(values, np.float64)
        logarithmic = bool(numbers.min() > 0 and numbers.max() / numbers.min() >= 20)
        steps = np.diff(np.log(numbers) if logarithmic else numbers)
        if steps.min() / steps.sum() > 0.06:
            return numbers, logarithmic
    return np.arange(len(values), dtype=np.float64), False


def _categories(axes: Axes, names: Sequence[str]) -> None:
    axes.set_xticks(range(len(names)), names)
    if sum(len(name) + 2 for name in names) > 70:
        for label in axes.get_xticklabels():
            label.set(rotation=25, ha="right", rotation_mode="anchor")


def _percent(axes: Axes, most: int = 6) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(most, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.6g}%")
    axes.grid(True, axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)


def _legend(canvas: FigureCanvasAgg, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    longest = max(map(len, labels))
    canvas.figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=max(1, min(len(labels), 84 // (longest + 6))),
        frameon=False,
        fontsize=9,
    )
