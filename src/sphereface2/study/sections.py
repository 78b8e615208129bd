"""The parts of a study's report that compare: what each shows, as tables and plots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sphereface2 import markdown
from sphereface2.evaluation.results import far_key
from sphereface2.study import plots, results, tables
from sphereface2.study.design import Sweep
from sphereface2.study.measure import BINS, FARS, OWN_FARS, TRANSFERRED, PeopleMeasures
from sphereface2.study.results import (
    DECADES,
    DPRIME,
    MAIN_FAR,
    OWN_GINI,
    PERCENTILES,
    RANK1,
    UNIFORM,
    Results,
)
from sphereface2.study.statistics import Contrast, Series, contrast
from sphereface2.study.tables import Column


@dataclass(frozen=True)
class Comparison:
    """The arms under one condition.

    Attributes:
        name: the condition.
        table: each arm's figures; None if no cell is done.
        differences: each arm's differences to the baseline; None if there is none to compare.
        plot: file with the main differences.
        baseline_missing: the baseline has no finished cell, but others have.
    """

    name: str
    table: str | None = None
    differences: str | None = None
    plot: str | None = None
    baseline_missing: bool = False


@dataclass(frozen=True)
class Across:
    """One figure under all conditions.

    Attributes:
        title: of the figure.
        table: its values.
        changes: how they differ from those under the first condition.
        against_baseline: that change minus the baseline's, or None without a baseline.
    """

    title: str
    table: str
    changes: str
    against_baseline: str | None


@dataclass(frozen=True)
class SweepPlot:
    """A sweep's plot and table, None if no cell is done; ``seeds``: how many its values have."""

    name: str
    label: str
    seeds: list[int]
    plot: str | None = None
    table: str | None = None


@dataclass(frozen=True)
class Scores:
    """Similarities and thresholds under the first condition.

    Attributes:
        table: means and deviations of the similarities.
        thresholds_plot: file with the people's own thresholds, if there are any.
        own_thresholds: their standard deviations.
        own_fars: people's own FAR at the common threshold.
        differences: of the last two tables' figures to the baseline, or None.
    """

    table: str
    thresholds_plot: str | None
    own_thresholds: str
    own_fars: str
    differences: str | None


@dataclass(frozen=True)
class Transfer:
    """Thresholds of the validation people on other images, under one condition.

    Attributes:
        name: the condition.
        plot: file with reached over asked FAR.
        table: log10 of their ratio.
        differences: of the measures over all sets to the baseline, or None.
        boundary: FAR and FRR at the heads' own thresholds, or None where no head has one.
    """

    name: str
    plot: str
    table: str
    differences: str | None
    boundary: str | None


@dataclass(frozen=True)
class Curves:
    """Similarities and gradients during training: a plot and the values at the end."""

    plot: str
    table: str


def comparisons(found: Results, folder: Path) -> list[Comparison]:
    """The arms under each condition; differences are drawn in ``differences-K.png``."""
    return [_compare(found, folder, k, name) for k, name in enumerate(found.study.conditions)]


def _compare(found: Results, folder: Path, k: int, condition: str) -> Comparison:
    baseline, arms = found.study.baseline, found.arms(condition)
    if not arms:
        return Comparison(condition)
    columns = [Column(name, results.accuracy_title(name)) for name in found.pair_sets]
    columns += [Column(results.tar_name(far), results.tar_name(far)) for far in FARS]
    columns.append(Column(RANK1, RANK1))
    table = figures(found, arms, condition, columns, seeds=True)
    others = [arm for arm in arms if arm != baseline]
    if baseline is None or not others:
        return Comparison(condition, table)
    if baseline not in arms:
        return Comparison(condition, table, baseline_missing=True)
    plot = None
    drawn = [(title, _to_baseline(found, others, condition, name)) for name, title in found.main]
    if any(lines for _, lines in drawn):
        plot = f"differences-{k + 1}.png"
        plots.plot_differences(drawn, baseline, folder / plot)
    return Comparison(condition, table, _differences(found, others, condition, columns), plot)


def across(found: Results, folder: Path) -> list[Across]:
    """Each main figure under all conditions, if there are several; drawn in ``conditions.png``."""
    names = list(found.study.conditions)
    if len(names) < 2:
        return []
    arms = [arm for arm in found.study.arms if any(arm in found.arms(name) for name in names)]
    panels = [
        plots.Panel(title, {a: [found.series(a, name, figure) for name in names] for a in arms})
        for figure, title in found.main
    ]
    plots.plot_conditions(panels, names, folder / "conditions.png")
    return [_across(panel, names, found.study.baseline) for panel in panels]


def _across(panel: plots.Panel, names: Sequence[str], baseline: str | None) -> Across:
    lines = panel.lines
    columns = [tables.means([line[k] for line in lines.values()]) for k in range(len(names))]
    changes = [[_change(line[0], after) for after in line[1:]] for line in lines.values()]
    against = None
    if baseline is not None and baseline in lines and len(lines) > 1:
        base = lines[baseline]
        rows = {
            arm: [
                contrast((1, after), (-1, line[0]), (-1, other), (1, base[0]))
                for after, other in zip(line[1:], base[1:], strict=True)
            ]
            for arm, line in lines.items()
            if arm != baseline
        }
        against = _difference_table(baseline, rows, [Column(name, name) for name in names[1:]])
    return Across(
        panel.title,
        tables.by_arm(["Arm", *names], lines, columns),
        tables.by_arm(["Arm", *names[1:]], lines, zip(*changes, strict=True)),
        against,
    )


def _change(before: Series, after: Series) -> str:
    found = contrast((1, after), (-1, before))
    if found is None:
        return tables.NONE
    change = tables.number(found.value, scale=100, sign=True)
    start = float(np.mean([before[seed].value for seed in before if seed in after]))
    if not start:
        return change
    return f"{change} ({tables.number(found.value / start, scale=100, digits=1, sign=True)} %)"


ONE_THRESHOLD = (
    Column(results.own_name(MAIN_FAR, scaled=True), "spread of own thresholds", 1.0, 4, "min"),
    Column(OWN_GINI, "Gini of own FARs", 1.0, 3, "min"),
    Column(UNIFORM, "uniform accuracy, %"),
    Column(DECADES, "threshold carried over, mean size of log10", 1.0, 2, "min"),
)
"""How well one threshold serves everybody, as a sweep's table has it."""


def sweeps(found: Results, folder: Path) -> list[SweepPlot]:
    """Each sweep, drawn in ``sweep-K.png``."""
    every = found.study.sweeps.items()
    return [_sweep(found, folder, k, name, sweep) for k, (name, sweep) in enumerate(every)]


def _sweep(found: Results, folder: Path, k: int, name: str, sweep: Sweep) -> SweepPlot:
    panels, values, own = [], [], None
    for figure, title in found.main:
        points, own = found.sweep(name, figure)
        values = [value for value, _ in points]
        panels.append(plots.Panel(title, {sweep.arm: [series for _, series in points]}))
    label, lines = f"{sweep.key} of {sweep.arm}", [panel.lines[sweep.arm] for panel in panels]
    seeds = sorted({len(series) for line in lines for series in line if series})
    if not seeds:
        return SweepPlot(name, label, seeds)
    plot = f"sweep-{k + 1}.png"
    plots.plot_sweep(panels, values, own, label, folder / plot)
    names = [
        tables.value(value)
        + (" (the arm's own)" if sweep.arm in found.chosen and value == own else "")
        for value in values
    ]
    header, columns = [panel.title for panel in panels], [tables.means(line) for line in lines]
    for column in ONE_THRESHOLD:
        line = [series for _, series in found.sweep(name, column.name)[0]]
        if any(line):
            header.append(column.title)
            shown = tables.means(line, scale=column.scale, digits=column.digits, best=column.best)
            columns.append(shown)
    rows = [*zip(names, *columns, strict=True)]
    return SweepPlot(name, label, seeds, plot, markdown.table([label, *header], rows))


def scores(found: Results, folder: Path) -> Scores | None:
    """Of the first condition, drawn in ``scores.png``; None if no cell is done."""
    baseline, condition = found.study.baseline, found.study.first_condition
    arms = found.arms(condition)
    if not arms:
        return None
    tests = {arm: found.found[found.cells_of(arm, condition)[0].key].test for arm in arms}
    plots.plot_scores(tests, MAIN_FAR, BINS, folder / "scores.png")
    shown = [
        Column(f"{side} {what}", f"{side} {what}", scale=1.0, digits=3, best=None)
        for side in ("genuine", "impostor")
        for what in ("mean", "std")
    ]
    shown.append(Column(DPRIME, "d'", scale=1.0, digits=3))
    own = []
    for far in OWN_FARS:
        title = f"std at {far_key(far)}"
        name, scaled = (results.own_name(far, scaled=scaled) for scaled in (False, True))
        own.append(Column(name, f"{title}, cosine", scale=1.0, digits=4, best=None))
        own.append(Column(scaled, f"{title}, ÷ distance", scale=1.0, digits=4, best="min"))
    gini = Column(OWN_GINI, "Gini", scale=1.0, digits=3, best="min")
    percentiles = [
        Column(results.percentile_name(p), f"{p}th percentile", digits=3, best=None)
        for p in PERCENTILES
    ]
    others = [arm for arm in arms if arm != baseline]
    compared = baseline in arms and others
    return Scores(
        figures(found, arms, condition, shown),
        _threshold_plot(tests, folder),
        figures(found, arms, condition, own),
        figures(found, arms, condition, [*percentiles, gini]),
        _differences(found, others, condition, [*own, gini]) if compared else None,
    )


def _threshold_plot(tests: Mapping[str, PeopleMeasures], folder: Path) -> str | None:
    cosine, scaled = {}, {}
    for arm, test in tests.items():
        own = np.array(test.own_threshold[MAIN_FAR], np.float64)
        own = own[np.isfinite(own)]
        if len(own) >= 2 and own.std() > 0:
            cosine[arm], scaled[arm] = own, own / test.gap
    if not cosine:
        return None
    drawn = [(f"FAR {far_key(MAIN_FAR)}, cosine", cosine), ("divided by the distance", scaled)]
    plots.plot_thresholds(drawn, folder / "thresholds.png")
    return "thresholds.png"


def transfers(found: Results, folder: Path) -> list[Transfer]:
    """Of each condition with cells that measured it, drawn in ``transfer-K.png``."""
    drawn = []
    for k, condition in enumerate(found.study.conditions):
        arms = [arm for arm in found.arms(condition) if found.series(arm, condition, DECADES)]
        if arms:
            drawn.append(_transfer(found, arms, condition, folder, f"transfer-{k + 1}.png"))
    return drawn


def _transfer(
    found: Results, arms: Sequence[str], condition: str, folder: Path, plot: str
) -> Transfer:
    cells = [cell for arm in arms for cell in found.cells_of(arm, condition)]
    measured = [one for cell in cells for one in found.found[cell.key].transfer]
    sets = list(dict.fromkeys(one.name for one in measured))
    panels = [
        plots.Panel(
            name,
            {
                arm: [
                    found.series(arm, condition, results.transfer_name(name, far))
                    for far in TRANSFERRED
                ]
                for arm in arms
            },
        )
        for name in sets
    ]
    plots.plot_transfer(panels, TRANSFERRED, folder / plot)
    whole = [
        Column(DECADES, "mean size of all", scale=1.0, best="min"),
        Column(UNIFORM, "uniform accuracy, %"),
    ]
    columns = [
        Column(results.transfer_name(name, far), f"{name}, {far_key(far)}", scale=1.0, best=None)
        for name in sets
        for far in TRANSFERRED
    ]
    names = [name for one in sets for name in results.boundary_names(one)]
    undecided = [arm for arm in arms if found.series(arm, condition, names[0])]
    own = [Column(name, f"{name}, %", best=None) for name in names]
    baseline = found.study.baseline
    others = [arm for arm in arms if arm != baseline]
    return Transfer(
        condition,
        plot,
        figures(found, arms, condition, [*columns, *whole]),
        _differences(found, others, condition, whole) if baseline in arms and others else None,
        figures(found, undecided, condition, own) if undecided else None,
    )


CURVES = {
    "positive_cosine": "cosine with the own prototype",
    "hardest_negative": "cosine with the nearest other",
    "pull": "pull to the own prototype, of its largest",
    "hard_push": "share of the push that goes to ten",
    "embedding_norm": "norm of the embedding",
}


def curves(found: Results, folder: Path) -> Curves | None:
    """Of the first condition, means over seeds, drawn in ``curves.png``; None where not logged."""
    lines: dict[str, dict[str, np.ndarray]] = {}
    for arm in found.arms(condition := found.study.first_condition):
        cells = [found.found[cell.key] for cell in found.cells_of(arm, condition)]
        logged = [one.curve for one in cells if one.curve]
        steps = [[point["step"] for point in curve] for curve in logged]
        if not logged or any(one != steps[0] for one in steps):
            continue
        mean = {
            name: np.mean([[point.get(name, np.nan) for point in one] for one in logged], axis=0)
            for name in ("step", "bias", "push", *CURVES)
        }
        lines[arm] = mean | {"pull": mean["pull"] / mean["pull"].max()}
    if not lines:
        return None
    plots.plot_curves(lines, CURVES, folder / "curves.png")
    rows = [
        [tables.number(line[name][-1], digits=3) for name in (*CURVES, "bias")]
        for line in lines.values()
    ]
    header = ["Arm, at the end", *CURVES.values(), "bias"]
    table = tables.by_arm(header, lines, zip(*rows, strict=True))
    return Curves("curves.png", table)


def figures(
    found: Results,
    arms: Sequence[str],
    condition: str,
    columns: Sequence[Column],
    *,
    seeds: bool = False,
) -> str:
    """A table with a row for each arm and a column for each figure, a mean over seeds.

    Args:
        found: the study's cells.
        arms: those to show.
        condition: under which.
        columns: the figures.
        seeds: with a column of the numbers of seeds.
    """
    cells = [
        tables.means(
            [found.series(arm, condition, column.name) for arm in arms],
            scale=column.scale,
            digits=column.digits,
            best=column.best,
        )
        for column in columns
    ]
    header = ["Arm", *(column.title for column in columns)]
    if seeds:
        header.insert(1, "Seeds")
        cells.insert(0, [str(len(found.cells_of(arm, condition))) for arm in arms])
    return tables.by_arm(header, arms, cells)


def difference(
    found: Results, arm: str, other: str, condition: str, figure: str
) -> Contrast | None:
    """A figure of ``arm`` minus that of ``other``, over the seeds that both have."""
    mine, theirs = (found.series(one, condition, figure) for one in (arm, other))
    return contrast((1, mine), (-1, theirs))


def _to_baseline(
    found: Results, arms: Iterable[str], condition: str, figure: str
) -> dict[str, Contrast]:
    """Each arm's difference to the baseline, where both have a seed."""
    baseline = str(found.study.baseline)
    differences = {arm: difference(found, arm, baseline, condition, figure) for arm in arms}
    return {arm: one for arm, one in differences.items() if one is not None}


def _differences(
    found: Results, arms: Sequence[str], condition: str, columns: Sequence[Column]
) -> str:
    """A table with a row for each arm and a column for each figure's difference to the baseline."""
    by_figure = [_to_baseline(found, arms, condition, column.name) for column in columns]
    rows = {arm: [of_figure.get(arm) for of_figure in by_figure] for arm in arms}
    return _difference_table(str(found.study.baseline), rows, columns)


def _difference_table(
    baseline: str, rows: Mapping[str, Sequence[Contrast | None]], columns: Sequence[Column]
) -> str:
    cells = []
    for arm, row in rows.items():
        shown = [
            tables.difference(one, scale=column.scale, digits=column.digits)
            for one, column in zip(row, columns, strict=True)
        ]
        cells.append([markdown.lines(arm, "over people", "over seeds"), *shown])
    header = [f"Difference to {baseline}", *(column.title for column in columns)]
    return markdown.table(header, cells)
