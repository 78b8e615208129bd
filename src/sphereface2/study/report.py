"""A study's finished cells told as a page, with tables and pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sphereface2.errors import UserError
from sphereface2.evaluation.results import far_key
from sphereface2.study import page, plots, results, tables
from sphereface2.study.design import Cell
from sphereface2.study.measure import BINS, FARS, OWN_FARS, PeopleMeasures
from sphereface2.study.results import DPRIME, MAIN_FAR, OWN_GINI, PERCENTILES, RANK1, Results
from sphereface2.study.runner import CELLS, validation_tar
from sphereface2.study.statistics import REPLICATES, Contrast, contrast
from sphereface2.study.stored import CellResult

PAGE = "report"
INDEX = "index"


def report(*studies: Path, out: Path, cells: Path = CELLS) -> None:
    """Write the reports of studies: tables with intervals, and plots.

    Args:
        studies: YAML files of the studies, as in `configs/study/`.
        out: Folder of the report.
        cells: Folder of the finished runs.
    """
    if not studies:
        raise UserError("study report needs at least one study's YAML file")
    for path in write_reports(studies, cells=cells, out=out):
        print(path)


def write_reports(studies: Sequence[Path], *, cells: Path, out: Path) -> list[Path]:
    """Write each study's report as ``report.md``, ``report.html`` and PNGs beside them.

    Only ``cells`` is read, not the data. An unfinished study is told as far as it is done; of
    several studies, the index says which have not begun.

    Args:
        studies: YAML files.
        cells: folder of their cells.
        out: folder of the report; of several studies each has a folder of its name there, beside
            ``index.md`` and ``index.html``.

    Returns:
        The pages to open: the report's or the index's, HTML.

    Raises:
        UserError: as `results.load` does; two studies of one name.
    """
    loaded: list[Results] = []
    undone: list[results.NothingDoneError] = []
    for path in studies:
        try:
            loaded.append(results.load(path, cells))
        except results.NothingDoneError as error:
            undone.append(error)
    if not loaded:
        raise undone[0]
    names = [one.study.name for one in loaded]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two of the studies are named {name}; give one a new name")
    if len(studies) == 1:
        _Report(loaded[0], out).write()
        return [out / f"{PAGE}.html"]
    for one in loaded:
        _Report(one, out / _file_name(one.study.name)).write()
    page.write(out, INDEX, "Studies", _index(loaded, undone))
    return [out / f"{INDEX}.html"]


def _index(loaded: Sequence[Results], undone: Sequence[results.NothingDoneError]) -> str:
    parts = ["# Studies\n"]
    for one in loaded:
        name = one.study.name
        parts.append(f"## [{tables.escape(name)}]({_file_name(name)}/{PAGE}.md)\n")
        parts += [tables.escape(one.study.about) + "\n"] if one.study.about else []
        parts += _summary(one)
    parts += [f"> {tables.escape(str(error))}\n" for error in undone]
    return "\n".join(parts)


def _summary(found: Results) -> list[str]:
    """Who leads, in a sentence, and each arm's main figures under the first condition."""
    condition = found.study.first_condition
    arms = found.arms(condition)
    if not arms:
        return [f"No cell of the condition {tables.escape(condition)} is done.\n"]
    parts = []
    figure, title = found.main[-1]
    ranked = [(arm, found.series(arm, condition, figure)) for arm in arms]
    ranked = [(arm, series) for arm, series in ranked if series]
    ranked.sort(key=lambda pair: -np.mean([one.value for one in pair[1].values()]))
    if len(ranked) > 1:
        (best, first), (second, other) = ranked[:2]
        lead = contrast((1, first), (-1, other))
        told = ""
        if lead is not None:
            told = f", ahead of {tables.escape(second)} by {_points(lead)}"
        parts.append(f"Highest {title}: **{tables.escape(best)}**{told}.\n")
    columns = [
        tables.means([found.series(arm, condition, name) for arm in arms]) for name, _ in found.main
    ]
    header = ["Arm", *(f"{told}, %" for _, told in found.main)]
    rows = [[tables.escape(arm), *row] for arm, *row in zip(arms, *columns, strict=True)]
    parts.append(tables.table(header, rows))
    seeds = {cell.seed for arm in arms for cell in found.cells_of(arm, condition)}
    parts.append(_caption(f"Condition {condition}", len(seeds)))
    if found.missing or found.pending:
        parts.append(_unfinished(found))
    return parts


def _unfinished(found: Results) -> str:
    asked = len(found.cells) + found.pending
    return f"> **Unfinished:** {asked - len(found.found)} of {asked} cells are not done.\n"


def _points(found: Contrast) -> str:
    """A lead and its interval over people, in a sentence."""
    told = f"{tables.number(found.value, scale=100)} points"
    if found.people is not None:
        low, high = (tables.number(bound, scale=100, sign=True) for bound in found.people)
        told += f" (over people {low} … {high})"
    return told


def _caption(what: str, seeds: int) -> str:
    many = "± half the 95 % t-interval of the mean" if seeds > 1 else "without an interval"
    return f"{tables.escape(what)}; {_count(seeds, 'seed')}, {many}. Bold: the best.\n"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "study"


@dataclass
class _Report:
    """One study's page, section by section."""

    found: Results
    folder: Path
    parts: list[str] = field(default_factory=list)

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        study = self.found.study
        self._add(f"# {tables.escape(study.name)}\n")
        if study.about:
            self._add(tables.escape(study.about) + "\n")
        self.parts += _summary(self.found)
        self._run()
        self._tuning()
        self._results()
        if len(study.conditions) > 1:
            self._conditions()
        if study.sweeps:
            self._sweeps()
        self._scores()
        page.write(self.folder, PAGE, study.name, "\n".join(self.parts))

    def _add(self, *parts: str) -> None:
        self.parts += parts

    def _picture(self, name: str, alt: str) -> None:
        self._add(f"![{tables.escape(alt)}]({name})\n")

    # What was run

    def _run(self) -> None:
        found, study = self.found, self.found.study
        first = next(iter(found.found.values()))
        config, test = first.config, first.test
        backbone = dict(config["backbone"])
        training, data = config["training"], config["data"]
        network = f"{backbone.pop('name')}, {tables.settings(backbone)}"
        trials = sum(cell.role == "trial" for cell in found.cells)
        asked = len(found.cells) + found.pending
        most = data.get("held_out_max_images")  # not in cells of before that setting
        left_out = "" if most is None else f", without those with more than {most:,} images"
        hours = sum(result.cpu_seconds for result in found.found.values()) / 3600
        facts = {
            "Network": network,
            "Schedule": f"{training['epochs']:g} epochs, batches of {training['batch_size']}",
            "Data": f"{first.data.kind}, fingerprint {first.data.fingerprint[:12]}",
            "People to choose trials": f"{data['validation_people']:,}{left_out}",
            "People to test": f"{test.people:,}, with {test.images:,} images",
            "Seeds": tables.value(study.seeds),
            "Cells": f"{len(found.found):,} of {asked:,} done; {_count(trials, 'trial')}",
            "CPU time": f"{hours:,.2f} hours, of the processes that finished the cells",
            "Versions": _versions(first),
        }
        self._add("## What was run\n")
        rows = [[name, tables.escape(told)] for name, told in facts.items()]
        self._add(tables.table(["What", "Which"], rows, left=2))
        self._warn_of_versions()
        self._condition_table()
        self._not_done()

    def _warn_of_versions(self) -> None:
        for package in ("sphereface2", "torch"):
            versions = {
                start.get(package)
                for result in self.found.found.values()
                for start in result.versions
            }
            if len(versions) > 1:
                told = ", ".join(sorted(map(str, versions)))
                self._add(
                    f"> **Warning:** the cells were made with different versions of {package}: "
                    f"{told}. Differences may come from there.\n"
                )

    def _condition_table(self) -> None:
        found, rows = self.found, []
        for name, changed in found.study.conditions.items():
            arms = found.arms(name)
            sizes = [tables.NONE] * 3
            if arms:
                result = found.found[found.cells_of(arms[0], name)[0].key]
                data, training = result.data, result.training
                sizes = [f"{n:,}" for n in (data.people, data.images, training.steps)]
            rows.append([tables.escape(name), tables.escape(tables.settings(changed)), *sizes])
        header = ["Condition", "Settings", "People trained on", "Images", "Steps"]
        self._add(tables.table(header, rows, left=2))

    def _not_done(self) -> None:
        found = self.found
        if not found.missing and not found.pending:
            return
        self._add("### Not done\n")
        failed = [cell for cell in found.missing if cell.key in found.failures]
        waiting = [cell for cell in found.missing if cell.key not in found.failures]
        for title, cells in (("Failed", failed), ("Not run yet, or cut short", waiting)):
            if cells:
                self._add(f"{title}:\n", *(f"- {self._one_missing(cell)}" for cell in cells), "")
        if found.pending:
            arms = [arm for arm in found.study.arms if arm not in found.chosen]
            told = f"{_count(found.pending, 'cell')} of {', '.join(arms)}"
            self._add(f"No trial is done that {tables.escape(told)} could be run with.\n")

    def _one_missing(self, cell: Cell) -> str:
        told = tables.escape(cell.label)
        if cell.key in self.found.failures:
            told += f": {tables.escape(self.found.failures[cell.key])} (in {cell.key})"
        return told

    # Tuning

    def _tuning(self) -> None:
        found, study = self.found, self.found.study
        most = max(len(arm.trials) for arm in study.arms.values())
        self._add("## Arms and tuning\n")
        rows = []
        for name, arm in study.arms.items():
            cells = [cell for cell in found.trials if cell.arm == name]
            told = [self._trial(cell) for cell in cells]
            told += [tables.NONE] * (most - len(told))
            rows.append([tables.escape(name), tables.escape(tables.settings(arm.settings)), *told])
        header = ["Arm", "Settings", *(f"Trial {k + 1}" for k in range(most))]
        self._add(tables.table(header, rows, left=2))
        if most:
            people = f"TAR@{far_key(study.selection.far)}, %, on the validation people"
            self._add(
                f"{people}, seed {study.tuning_seed}, condition "
                f"{tables.escape(study.first_condition)}. Bold: the trial that is used.\n"
            )

    def _trial(self, cell: Cell) -> str:
        found = self.found
        changed = tables.escape(tables.settings(cell.changed))
        result = found.found.get(cell.key)
        if result is None:
            return f"{changed}<br>{'failed' if cell.key in found.failures else tables.NONE}"
        told = tables.number(validation_tar(found.study, result), scale=100)
        if found.chosen.get(cell.arm) == cell.changed:
            told = f"**{told}**"
        return f"{changed}<br>{told}"

    # Results

    def _columns(self) -> list[tuple[str, str]]:
        """Figures on the test people and the verification sets: name and title."""
        sets = [(name, results.accuracy_title(name)) for name in self.found.pair_sets]
        tars = [(results.tar_name(far), results.tar_name(far)) for far in FARS]
        return [*sets, *tars, (RANK1, RANK1)]

    def _results(self) -> None:
        study = self.found.study
        self._add("## Results\n")
        self._add(
            "Accuracy is k-fold, on a verification set; TAR is over all pairs of test people, "
            "rank-1 the share of their images whose nearest other image shows the same person. "
            "All in percent, "
            "± half the 95 % t-interval of the mean over seeds. Bold: the best.\n"
        )
        if study.baseline is not None:
            self._add(
                f"Differences are to {tables.escape(study.baseline)}, in percentage points, over "
                "the seeds that both have. Their second line is an interval over people "
                f"({REPLICATES:,} resamples of the test people, or of the set's; both arms get the "
                "same people, networks and thresholds stay as they are): what other test people "
                "might change. The third is a t-interval over seeds: what training again might "
                "change. They answer different questions, and neither holds the other's part. "
                "Bold: the interval over people excludes 0. Each interval stands for itself: "
                "where nothing differs, one in twenty excludes 0 by chance.\n"
            )
        for k, condition in enumerate(study.conditions):
            self._condition(k, condition)

    def _condition(self, k: int, condition: str) -> None:
        found, baseline = self.found, self.found.study.baseline
        self._add(f"### {tables.escape(condition)}\n")
        arms = found.arms(condition)
        if not arms:
            self._add("No cell is done.\n")
            return
        columns = self._columns()
        told = [
            tables.means([found.series(arm, condition, name) for arm in arms])
            for name, _ in columns
        ]
        seeds = [len(found.cells_of(arm, condition)) for arm in arms]
        rows = [
            [tables.escape(arm), str(n), *row]
            for arm, n, *row in zip(arms, seeds, *told, strict=True)
        ]
        self._add(tables.table(["Arm", "Seeds", *(title for _, title in columns)], rows))
        others = [arm for arm in arms if arm != baseline]
        if baseline is None or not others:
            return
        if baseline not in arms:
            self._add(f"No cell of {tables.escape(baseline)} is done: no differences to it.\n")
            return
        differences = {
            arm: {name: self._difference(arm, condition, name) for name, _ in columns}
            for arm in others
        }
        self._difference_table(differences, columns)
        drawn = [
            (title, {arm: one for arm in others if (one := differences[arm][name]) is not None})
            for name, title in found.main
        ]
        if any(lines for _, lines in drawn):
            name = f"differences-{k + 1}.png"
            plots.plot_differences(drawn, baseline, self.folder / name)
            self._picture(name, f"Differences to {baseline}, {condition}")

    def _difference(self, arm: str, condition: str, figure: str) -> Contrast | None:
        baseline = self.found.study.baseline
        assert baseline is not None
        mine, other = (self.found.series(one, condition, figure) for one in (arm, baseline))
        return contrast((1, mine), (-1, other))

    def _difference_table(
        self,
        differences: dict[str, dict[str, Contrast | None]],
        columns: Sequence[tuple[str, str]],
        scales: dict[str, tuple[float, int]] | None = None,
    ) -> None:
        rows = []
        for arm, row in differences.items():
            told = []
            for name, _ in columns:
                scale, digits = (scales or {}).get(name, (100.0, 2))
                told.append(tables.difference(row[name], scale=scale, digits=digits))
            head = f"{tables.escape(arm)}<br>over people<br>over seeds"
            rows.append([head, *told])
        baseline = tables.escape(str(self.found.study.baseline))
        header = [f"Difference to {baseline}", *(title for _, title in columns)]
        self._add(tables.table(header, rows))

    # Conditions against each other

    def _conditions(self) -> None:
        found, study = self.found, self.found.study
        names = list(study.conditions)
        arms = [a for a in study.arms if any(a in found.arms(name) for name in names)]
        self._add("## Across conditions\n")
        drawn = []
        for figure, title in found.main:
            series = {arm: [found.series(arm, c, figure) for c in names] for arm in arms}
            drawn.append(plots.Panel(title, series))
        plots.plot_conditions(drawn, names, self.folder / "conditions.png")
        self._picture("conditions.png", "The main figures under each condition")
        for panel in drawn:
            self._across(panel, names)

    def _across(self, panel: plots.Panel, names: Sequence[str]) -> None:
        """An arm a row, a condition a column: the figure, what it loses, and against baseline."""
        study, lines = self.found.study, panel.lines
        self._add(f"### {panel.title}\n")
        columns = [tables.means([line[k] for line in lines.values()]) for k in range(len(names))]
        escaped = [tables.escape(name) for name in names]
        rows = [[tables.escape(arm), *row] for arm, *row in zip(lines, *columns, strict=True)]
        self._add("In percent:\n", tables.table(["Arm", *escaped], rows))
        rows = [
            [tables.escape(arm), *(_change(line[0], after) for after in line[1:])]
            for arm, line in lines.items()
        ]
        self._add(
            f"Change from {escaped[0]} in percentage points, and as a share of what it was "
            "there:\n",
            tables.table(["Arm", *escaped[1:]], rows),
        )
        base = lines.get(study.baseline or "")
        if base is None or len(lines) < 2:
            return
        against = {}
        for arm, line in lines.items():
            if arm != study.baseline:
                against[arm] = {
                    name: contrast((1, line[k]), (-1, line[0]), (-1, base[k]), (1, base[0]))
                    for k, name in enumerate(names)
                    if k
                }
        self._add(
            f"That change less the change of {tables.escape(str(study.baseline))}: positive where "
            "the arm loses less.\n"
        )
        self._difference_table(against, list(zip(names[1:], escaped[1:], strict=True)))

    # Sweeps

    def _sweeps(self) -> None:
        found, study = self.found, self.found.study
        self._add("## Sweeps\n")
        self._add(
            "One setting of one arm is varied, all else stays as the arm has it; condition "
            f"{tables.escape(study.first_condition)}. Figures in percent.\n"
        )
        for k, (name, sweep) in enumerate(study.sweeps.items()):
            self._add(f"### {tables.escape(name)}\n")
            panels, own = [], None
            values: list[Any] = []
            for figure, title in found.main:
                points, own = found.sweep(name, figure)
                values = [value for value, _ in points]
                panels.append(plots.Panel(title, {sweep.arm: [series for _, series in points]}))
            lines = [next(iter(panel.lines.values())) for panel in panels]
            if not any(series for line in lines for series in line):
                self._add("No cell is done.\n")
                continue
            picture = f"sweep-{k + 1}.png"
            label = f"{sweep.key} of {sweep.arm}"
            plots.plot_sweep(panels, values, own, label, self.folder / picture)
            self._picture(picture, f"Sweep of {label}")
            columns = [tables.means(line) for line in lines]
            rows = [
                [
                    tables.escape(tables.value(value))
                    + (" (the arm's own)" if sweep.arm in found.chosen and value == own else ""),
                    *row,
                ]
                for value, *row in zip(values, *columns, strict=True)
            ]
            header = [tables.escape(label), *(panel.title for panel in panels)]
            self._add(tables.table(header, rows))
            seeds = sweep.seeds or study.seeds[:1]
            self._add(f"{_count(len(seeds), 'seed')}. Bold: the best.\n")

    # Scores

    def _scores(self) -> None:
        found = self.found
        condition = found.study.first_condition
        arms = found.arms(condition)
        if not arms:
            return
        self._add("## Scores\n")
        self._add(
            "Cosine similarities of all pairs of test people, condition "
            f"{tables.escape(condition)}. The picture shows each arm's first seed, the table the "
            "mean over seeds. d' is the distance of the two means in units of the root mean "
            "square of the two standard deviations.\n"
        )
        tests = {arm: found.found[found.cells_of(arm, condition)[0].key].test for arm in arms}
        plots.plot_scores(
            {
                arm: (
                    np.array(test.genuine_scores.histogram),
                    np.array(test.impostor_scores.histogram),
                )
                for arm, test in tests.items()
            },
            {arm: test.threshold.get(MAIN_FAR) for arm, test in tests.items()},
            BINS,
            self.folder / "scores.png",
        )
        self._picture("scores.png", "Similarities of genuine and impostor pairs")
        shown: list[tuple[str, str, float, int, str | None]] = [
            (f"{side} {what}", f"{side} {told}", 1.0, 3, None)
            for side in ("genuine", "impostor")
            for what, told in (("mean", "mean"), ("std", "std"))
        ]
        self._figure_table(arms, [*shown, (DPRIME, "d'", 1.0, 3, "max")])
        self._thresholds(arms, tests)

    def _figure_table(
        self, arms: Sequence[str], shown: Sequence[tuple[str, str, float, int, str | None]]
    ) -> None:
        """A row an arm; ``shown``: each figure's name, title, scale, digits and which is best."""
        condition = self.found.study.first_condition
        columns = [
            tables.means(
                [self.found.series(arm, condition, name) for arm in arms],
                scale=scale,
                digits=digits,
                best=best,
            )
            for name, _, scale, digits, best in shown
        ]
        rows = [[tables.escape(arm), *row] for arm, *row in zip(arms, *columns, strict=True)]
        self._add(tables.table(["Arm", *(title for _, title, *_ in shown)], rows))

    def _thresholds(self, arms: Sequence[str], tests: dict[str, PeopleMeasures]) -> None:
        found, baseline = self.found, self.found.study.baseline
        self._add("## One threshold for everybody\n")
        self._add(
            "A person's own threshold is the lowest that keeps the FAR among the pairs of that "
            "person with all others. The less it differs between people, the better one threshold "
            "serves all. Its standard deviation over people is told as a cosine, and divided by "
            "the distance of the genuine mean from the impostor mean, which makes losses that "
            "spread similarities differently comparable.\n"
        )
        self._threshold_plot(tests)
        own = [
            (results.own_name(far, scaled=scaled), f"std at {far_key(far)}{told}", scale, 4, best)
            for far in OWN_FARS
            for scaled, told, scale, best in (
                (False, ", cosine", 1.0, None),
                (True, ", ÷ distance", 1.0, "min"),
            )
        ]
        self._figure_table(arms, own)
        self._add(
            f"The other way round: at the one threshold whose FAR is {far_key(MAIN_FAR)} over all "
            "pairs, how people's own FAR differ. Percentiles over people, in percent, and the "
            "Gini coefficient: 0 where all have the same FAR, near 1 where few people make all "
            "false accepts.\n"
        )
        percentiles: list[tuple[str, str, float, int, str | None]] = [
            (results.percentile_name(p), f"{p}th percentile", 100.0, 3, None) for p in PERCENTILES
        ]
        self._figure_table(arms, [*percentiles, (OWN_GINI, "Gini", 1.0, 3, "min")])
        others = [arm for arm in arms if arm != baseline]
        if baseline not in arms or not others:
            return
        self._add(
            "Differences, with intervals as above; the distance of the means and the common "
            "threshold are held fixed. Negative: more alike than with the baseline.\n"
        )
        columns = [*((name, title) for name, title, *_ in own), (OWN_GINI, "Gini")]
        condition = found.study.first_condition
        differences = {
            arm: {name: self._difference(arm, condition, name) for name, _ in columns}
            for arm in others
        }
        scales = {name: (1.0, 4) for name, *_ in own} | {OWN_GINI: (1.0, 3)}
        self._difference_table(differences, columns, scales)

    def _threshold_plot(self, tests: dict[str, PeopleMeasures]) -> None:
        cosine, scaled = {}, {}
        for arm, test in tests.items():
            own = np.array(test.own_threshold[MAIN_FAR], np.float64)
            own = own[np.isfinite(own)]
            if len(own) < 2 or own.std() == 0:
                continue
            cosine[arm] = own
            scaled[arm] = own / test.gap
        if cosine:
            plots.plot_thresholds(
                [(f"FAR {far_key(MAIN_FAR)}, cosine", cosine), ("divided by the distance", scaled)],
                self.folder / "thresholds.png",
            )
            self._picture("thresholds.png", "How people's own thresholds differ")
            self._add(
                "Bars: the middle half and the middle 90 % of the people; each arm's first seed.\n"
            )


def _change(before: Any, after: Any) -> str:
    found = contrast((1, after), (-1, before))
    if found is None:
        return tables.NONE
    told = tables.number(found.value, scale=100, sign=True)
    start = np.mean([before[seed].value for seed in before if seed in after])
    if not start:
        return told
    return f"{told} ({tables.number(found.value / start, scale=100, digits=1, sign=True)} %)"


def _versions(result: CellResult) -> str:
    return ", ".join(f"{name} {version}" for name, version in result.versions[-1].items())
