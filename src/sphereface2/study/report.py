"""The report of a study's finished cells: dataclasses, plots, and Markdown from a template."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sphereface2 import console, markdown
from sphereface2.errors import UserError, counted
from sphereface2.evaluation.results import far_key
from sphereface2.extras import require
from sphereface2.files import atomic_write
from sphereface2.study import finalists, results, sections, tables
from sphereface2.study.design import Cell, Study
from sphereface2.study.results import MAIN_FAR, Results
from sphereface2.study.runner import CELLS, validation_tar
from sphereface2.study.statistics import REPLICATES, Contrast
from sphereface2.study.stored import CellResult
from sphereface2.study.tables import Column

REPORT, INDEX = "report.md", "index.md"


def report(*studies: Path, out: Path, cells: Path = CELLS) -> None:
    """Write the reports of studies: tables with intervals, and plots.

    Args:
        studies: YAML files of the studies, as in `configs/study/`.
        out: Folder of the report.
        cells: Folder of the finished runs.
    """
    if not studies:
        raise UserError("study report needs at least one study's YAML file")
    console.show(str(write_reports(studies, cells=cells, out=out)))


def write_reports(studies: Sequence[Path], *, cells: Path, out: Path) -> Path:
    """Write each study's report as ``report.md`` with its plots as PNG files beside it.

    Only ``cells`` is read, not the data. An unfinished study is reported as far as it is done; of
    several studies, the index says which have not begun.

    Args:
        studies: YAML files.
        cells: folder of their cells.
        out: folder of the report; of several studies, each has a folder of its name there, beside
            ``index.md``.

    Returns:
        The page to read first: the report's or the index's.

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
        _write(out / REPORT, report=Report(loaded[0], out))
        return out / REPORT
    reports = [Report(one, out / _file_name(one.study.name)) for one in loaded]
    for one in reports:
        _write(one.folder / REPORT, report=one)
    _write(out / INDEX, reports=reports, undone=undone)
    return out / INDEX


def _write(path: Path, **content: Any) -> None:
    """Render the template ``NAME.jinja`` as the file ``NAME``."""
    require("reports of studies", "jinja2")
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "md": markdown.escape,
        "counted": counted,
        "number": tables.number,
        "far": far_key,
    }
    path.parent.mkdir(parents=True, exist_ok=True)  # plots are written while rendering
    text = environment.get_template(f"{path.name}.jinja").render(**content)
    atomic_write(path, text.encode())


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "study"


@dataclass
class Report:
    """One study's report: what its template shows. Plots are written to ``folder`` on the way."""

    found: Results
    folder: Path
    resamples: int = field(default=REPLICATES, init=False)
    main_far: str = field(default=far_key(MAIN_FAR), init=False)

    @property
    def study(self) -> Study:
        return self.found.study

    @property
    def link(self) -> str:
        """Of the report from the index."""
        return f"{self.folder.name}/{REPORT}"

    # Summary: who leads, and each arm's main figures under the first condition

    @cached_property
    def first_arms(self) -> list[str]:
        """The arms with a finished cell under the first condition."""
        return self.found.arms(self.study.first_condition)

    @property
    def ranked(self) -> list[str]:
        """The arms by the last of the main figures, the best first."""
        means = {}
        for arm in self.first_arms:
            if series := self.found.series(arm, self.study.first_condition, self.found.main[-1][0]):
                means[arm] = np.mean([one.value for one in series.values()])
        return sorted(means, key=lambda arm: -means[arm])

    @property
    def lead(self) -> Contrast | None:
        """How far the first of `ranked` is ahead of the second, over the seeds that both have.

        None where it is not: the first may lead by seeds that the second lacks.
        """
        first, second = self.ranked[:2]
        figure, _ = self.found.main[-1]
        condition = self.study.first_condition
        found = sections.difference(self.found, first, second, condition, figure)
        return found if found is not None and found.value > 0 else None

    @property
    def summary(self) -> str:
        columns = [Column(name, f"{title}, %") for name, title in self.found.main]
        return sections.figures(self.found, self.first_arms, self.study.first_condition, columns)

    @property
    def seeds(self) -> int:
        """How many seeds are done under the first condition."""
        condition = self.study.first_condition
        cells = (self.found.cells_of(arm, condition) for arm in self.first_arms)
        return len({cell.seed for of_arm in cells for cell in of_arm})

    @property
    def asked(self) -> int:
        """How many cells the study has."""
        return len(self.found.cells) + self.found.pending

    # What was run

    @property
    def facts(self) -> str:
        found = self.found
        first = next(iter(found.found.values()))
        backbone = dict(first.config["backbone"])
        training, data = first.config["training"], first.config["data"]
        trials = sum(cell.role == "trial" for cell in found.cells)
        most = data.get("held_out_max_images")  # not in cells of before that setting
        left_out = "" if most is None else f", without those with more than {most:,} images"
        hours = sum(result.cpu_seconds for result in found.found.values()) / 3600
        facts = {
            "Network": f"{backbone.pop('name')}, {tables.settings(backbone)}",
            "Schedule": f"{counted(training['epochs'], 'epoch')}, "
            f"batches of {training['batch_size']}",
            "Data": f"{first.data.images:,} images of {counted(first.data.people, 'person')}, "
            f"fingerprint {first.data.fingerprint[:12]}",
            "People to choose trials": f"{data['validation_people']:,}{left_out}",
            "People to test": f"{first.test.people:,}, with {first.test.images:,} images",
            "Seeds": tables.value(self.study.seeds),
            "Cells": f"{len(found.found):,} of {self.asked:,} done; {counted(trials, 'trial')}",
            "CPU time": f"{hours:,.2f} hours, of the processes that finished the cells",
            "Versions": _versions(first),
        }
        return markdown.table(["What", "Which"], [*facts.items()], left=2)

    @property
    def mixed_versions(self) -> dict[str, str]:
        """Packages of which the cells were made with several versions."""
        mixed = {}
        for package in ("sphereface2", "torch"):
            starts = [start for result in self.found.found.values() for start in result.versions]
            versions = sorted({str(start.get(package)) for start in starts})
            if len(versions) > 1:
                mixed[package] = ", ".join(versions)
        return mixed

    @property
    def mixed_devices(self) -> dict[str, int]:
        """The devices that cells were trained on and their numbers of cells, where several are.

        A cell's key does not tell: the same settings round otherwise on another device.
        """
        cells = self.found.found.values()
        devices = Counter(
            " and ".join(sorted({str(start.get("gpu") or "CPU") for start in result.environment}))
            for result in cells
        )
        return dict(sorted(devices.items())) if len(devices) > 1 else {}

    @property
    def conditions(self) -> str:
        found, rows = self.found, []
        for name, changed in self.study.conditions.items():
            sizes = [tables.NONE] * 3
            if arms := found.arms(name):
                result = found.found[found.cells_of(arms[0], name)[0].key]
                numbers = (result.data.people, result.data.images, result.training.steps)
                sizes = [f"{number:,}" for number in numbers]
            rows.append([name, tables.settings(changed), *sizes])
        header = ["Condition", "Settings", "People trained on", "Images", "Steps"]
        return markdown.table(header, rows, left=2)

    @property
    def failed(self) -> list[Cell]:
        return [cell for cell in self.found.missing if cell.key in self.found.failures]

    @property
    def waiting(self) -> list[Cell]:
        return [cell for cell in self.found.missing if cell.key not in self.found.failures]

    @property
    def undecided(self) -> list[str]:
        """Arms that wait for the choice of a trial."""
        return [arm for arm in self.study.arms if arm not in self.found.chosen]

    # Tuning

    @property
    def trials(self) -> int:
        """The largest number of trials of an arm."""
        return max(len(arm.trials) for arm in self.study.arms.values())

    @property
    def arms(self) -> str:
        rows = []
        for name, arm in self.study.arms.items():
            shown = [self._trial(cell) for cell in self.found.trials if cell.arm == name]
            shown += [tables.NONE] * (self.trials - len(shown))
            rows.append([name, tables.settings(arm.settings), *shown])
        header = ["Arm", "Settings", *(f"Trial {k + 1}" for k in range(self.trials))]
        return markdown.table(header, rows, left=2)

    def _trial(self, cell: Cell) -> str:
        found = self.found
        result = found.found.get(cell.key)
        if result is None:
            figure = "failed" if cell.key in found.failures else tables.NONE
        else:
            figure = tables.number(validation_tar(self.study, result), scale=100)
        if found.chosen.get(cell.arm) == cell.changed:
            figure = markdown.Markdown(f"**{figure}**")
        return markdown.lines(tables.settings(cell.changed), figure)

    # Results

    @property
    def comparisons(self) -> list[sections.Comparison]:
        return sections.comparisons(self.found, self.folder)

    @property
    def pairs(self) -> list[finalists.Pairs]:
        return finalists.pairs(self.found)

    @property
    def across(self) -> list[sections.Across]:
        return sections.across(self.found, self.folder)

    @property
    def sweeps(self) -> list[sections.SweepPlot]:
        return sections.sweeps(self.found, self.folder)

    @property
    def transfers(self) -> list[sections.Transfer]:
        return sections.transfers(self.found, self.folder)

    @property
    def curves(self) -> sections.Curves | None:
        return sections.curves(self.found, self.folder)

    @property
    def scores(self) -> sections.Scores | None:
        return sections.scores(self.found, self.folder)


def _versions(result: CellResult) -> str:
    return ", ".join(f"{name} {version}" for name, version in result.versions[-1].items())
