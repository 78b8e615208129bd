"""The finalists of a study, pair by pair: what a report says where any of them may be the best."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

from sphereface2 import markdown
from sphereface2.study import results, sections, tables
from sphereface2.study.measure import FARS
from sphereface2.study.results import Results
from sphereface2.study.tables import Column


@dataclass(frozen=True)
class Pairs:
    """Differences between finalists under one condition, apart from those to the baseline."""

    name: str
    table: str


def pairs(found: Results) -> list[Pairs]:
    """A table for each condition under which two finalists that are no baseline share a seed."""
    study = found.study
    group = {arm for one in study.finals for arm in one.arms} - {study.baseline}
    columns = [Column(name, results.accuracy_title(name)) for name in found.pair_sets]
    columns += [Column(results.tar_name(far), results.tar_name(far)) for far in FARS]
    own = list(sections.ONE_THRESHOLD[:2])  # of people
    tables_found = []
    for condition in study.conditions:
        # How people differ is measured under the first condition.
        shown = columns + (own if condition == study.first_condition else [])
        arms = [arm for arm in found.arms(condition) if arm in group]
        rows = []
        for a, b in combinations(arms, 2):
            both = [sections.difference(found, a, b, condition, column.name) for column in shown]
            seeds = {cell.seed for cell in found.cells_of(a, condition)} & {
                cell.seed for cell in found.cells_of(b, condition)
            }
            if len(seeds) > 1:
                cells = [
                    tables.difference(one, scale=column.scale, digits=column.digits)
                    for one, column in zip(both, shown, strict=True)
                ]
                label = markdown.lines(f"{a} less {b}", "over people", "over seeds")
                rows.append([label, str(len(seeds)), *cells])
        if rows:
            header = ["Difference", "Seeds", *(column.title for column in shown)]
            tables_found.append(Pairs(condition, markdown.table(header, rows)))
    return tables_found
