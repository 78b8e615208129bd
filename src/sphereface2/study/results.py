"""The finished cells of a study, and the figures of each with their resamples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from sphereface2.errors import UserError
from sphereface2.evaluation.bootstrap import at_own_threshold, draws, pair_weights, ratios
from sphereface2.evaluation.results import far_key, least_far
from sphereface2.study import design, runner, statistics, stored
from sphereface2.study.design import Cell, Study
from sphereface2.study.measure import FARS, OWN_FARS, PairMeasures, PairSetFacts, bits
from sphereface2.study.statistics import REPLICATES, SEED, Figure, Series
from sphereface2.study.stored import CellResult

MAIN_FAR = 1e-3
"""Of the TAR that plots and summaries show, and of people's own FAR at the common threshold."""
PERCENTILES = (5, 50, 95)
RANK1, DPRIME, OWN_GINI = "rank-1", "d'", "own FAR gini"
UNIFORM, DECADES = "uniform accuracy", "decades off"


def tar_name(far: float) -> str:
    """The name of a TAR among a cell's figures."""
    return f"TAR@{far_key(far)}"


def own_name(far: float, *, scaled: bool) -> str:
    """The name of the spread of people's own thresholds, as it is or divided by the gap."""
    return f"own threshold {far_key(far)}{' / gap' if scaled else ''}"


def transfer_name(images: str, asked: float) -> str:
    """The name of log10 of reached over asked FAR on a set of images."""
    return f"{images} {far_key(asked)}"


def boundary_names(images: str) -> tuple[str, str]:
    """The names of FAR and FRR at the head's own threshold."""
    return f"{images} FAR at -b/r", f"{images} FRR at -b/r"


def percentile_name(percentile: int) -> str:
    """The name of a percentile of people's own FAR."""
    return f"own FAR p{percentile}"


class NothingDoneError(UserError):
    """None of a study's cells is there."""


@dataclass
class Results:
    """A study's cells as far as they are done.

    Attributes:
        chosen: each arm's trial; an arm none of whose trials is done is not in it.
        trials, grid: the cells that the study asks for; ``grid`` has the sweeps too, but not the
            arms that are not chosen for.
        pending: how many cells wait for the choice of a trial.
        found: each finished cell's result, by its key.
        failures: the last line of what a failed cell said, by its key.
        figures: of each finished cell, by its key, then by name.
    """

    study: Study
    chosen: dict[str, dict[str, Any]]
    trials: list[Cell]
    grid: list[Cell]
    pending: int
    found: dict[str, CellResult]
    failures: dict[str, str]
    figures: dict[str, dict[str, Figure]] = field(repr=False)

    @property
    def cells(self) -> list[Cell]:
        """Distinct cells; trials come first."""
        return distinct([*self.trials, *self.grid])

    @property
    def missing(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.key not in self.found]

    @property
    def pair_sets(self) -> list[str]:
        """Names of the verification sets, LFW first."""
        names = {one.name for result in self.found.values() for one in result.pairs}
        return sorted(names, key=lambda name: (name != "lfw", name))

    @property
    def main(self) -> list[tuple[str, str]]:
        """The figures that plots and summaries show: name and title."""
        sets = [(name, accuracy_title(name)) for name in self.pair_sets[:1]]
        return [*sets, (tar_name(MAIN_FAR), f"test {tar_name(MAIN_FAR)}")]

    def arms(self, condition: str) -> list[str]:
        """The arms with a finished cell under a condition."""
        done = {
            cell.arm
            for cell in self.grid
            if cell.role == "grid" and cell.condition == condition and cell.key in self.found
        }
        return [arm for arm in self.study.arms if arm in done]

    def cells_of(self, arm: str, condition: str) -> list[Cell]:
        """The finished cells of an arm under a condition, a seed each."""
        where = ("grid", arm, condition)
        there = [cell for cell in self.grid if (cell.role, cell.arm, cell.condition) == where]
        return [cell for cell in there if cell.key in self.found]

    def series(self, arm: str, condition: str, figure: str) -> Series:
        """A figure by seed, of the seeds that are done."""
        return self._series(self.cells_of(arm, condition), figure)

    def sweep(self, name: str, figure: str) -> tuple[list[tuple[Any, Series]], Any]:
        """A figure by seed for each value of a sweep, and the arm's own value.

        The arm itself, with the sweep's seeds, is one of the points. Numbers come in ascending
        order.
        """
        sweep, first = self.study.sweeps[name], self.study.first_condition
        points: list[tuple[Any, Series]] = []
        for wanted in sweep.values:
            cells = [c for c in self.grid if c.sweep == name and c.changed == {sweep.key: wanted}]
            done = [cell for cell in cells if cell.key in self.found]
            points.append((wanted, self._series(done, figure)))
        own = None
        if sweep.arm in self.chosen:
            own = design.swept_value(self.study, sweep, self.chosen)
            if own not in sweep.values:
                seeds = sweep.seeds or self.study.seeds[:1]
                done = [c for c in self.cells_of(sweep.arm, first) if c.seed in seeds]
                points.append((own, self._series(done, figure)))
        if all(is_number(value) for value, _ in points):
            points.sort(key=lambda point: float(point[0]))
        return points, own

    def _series(self, cells: Iterable[Cell], figure: str) -> Series:
        figures = {cell.seed: self.figures[cell.key].get(figure) for cell in cells}
        return {seed: found for seed, found in figures.items() if found is not None}


def load(path: Path, cells: Path) -> Results:
    """What ``cells`` holds of the study in ``path``.

    Raises:
        NothingDoneError: no cell is done.
        UserError: a bad definition; cells were trained on different data or
            judged on different versions of a verification set.
    """
    study = design.load(path)
    chosen, best = runner.best_trials(study, partial(runner.read, cells))
    trials = distinct(design.trials(study))
    # The cells of an arm without a choice are not known yet, only how many they are.
    finals = design.finalists(study, {arm: best.get(arm, -1.0) for arm in study.arms})
    grid = design.grid(study.only(chosen), chosen, finals)
    pending = sum(_count(study, name) for name in study.arms if name not in chosen)
    # A trial is told of before it is judged on verification sets.
    judged = {cell.key for cell in grid} - {cell.key for cell in trials}
    found, failures = {}, {}
    for cell in distinct([*trials, *grid]):
        failure = cells / cell.key / runner.FAILURE
        pairs = study.pairs if cell.key in judged else []
        if (result := runner.read(cells, cell, pairs)) is not None:
            found[cell.key] = result
        elif failure.exists():
            # A report is published: where the cells lie on this machine is not.
            text = failure.read_text("utf-8", "replace").replace(f"{cells.resolve()}/", "")
            lines = text.split("\n")
            failures[cell.key] = next((line for line in reversed(lines) if line.strip()), "")
    if not found:
        raise NothingDoneError(
            f"no cell of {study.name} is done in {cells}; run `sphereface2 study run {path}` first"
        )
    _check_data(found, cells)
    used = {cell.key for cell in grid if cell.key in found}
    # How people differ is reported of the first condition.
    closer = {cell.key for cell in grid if cell.condition == study.first_condition}
    figures = _figures({key: found[key] for key in used}, closer, cells / stored.SETS)
    return Results(study, chosen, trials, grid, pending, found, failures, figures)


def _count(study: Study, arm: str) -> int:
    """How many cells of the grid and of sweeps an arm has."""
    conditions = study.arms[arm].only or study.conditions
    swept = [
        len(sweep.values) * len(sweep.seeds or study.seeds[:1])
        for sweep in study.sweeps.values()
        if sweep.arm == arm
    ]
    return len(conditions) * len(study.seeds) + sum(swept)


def distinct(cells: Iterable[Cell]) -> list[Cell]:
    """One cell a key, in order."""
    return list({cell.key: cell for cell in reversed(list(cells))}.values())[::-1]


def is_number(value: Any) -> bool:
    """Whether a setting's value has a place on an axis."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def accuracy_title(name: str) -> str:
    """What the accuracy on a verification set is called."""
    return f"{name.upper() if name == 'lfw' else name} accuracy"


def _check_data(found: dict[str, CellResult], cells: Path) -> None:
    first: dict[str, tuple[str, str]] = {}
    for key, result in found.items():
        fingerprints = {"training data": result.data.fingerprint}
        fingerprints |= {f"version of {one.name}": one.fingerprint for one in result.pairs}
        for what, fingerprint in fingerprints.items():
            other, before = first.setdefault(what, (key, fingerprint))
            if before != fingerprint:
                raise UserError(
                    f"{cells / other} and {cells / key} were made with different {what}, so they "
                    "cannot be compared; remove those of the wrong one and run the study again"
                )


def _figures(
    found: dict[str, CellResult], closer: set[str], sets: Path
) -> dict[str, dict[str, Figure]]:
    """The figures of each cell, also of its scores for those in ``closer``.

    Every cell is resampled with the same people.
    """
    figures: dict[str, dict[str, Figure]] = {key: {} for key in found}

    @cache
    def resamples(count: int) -> np.ndarray:
        return np.concatenate([*draws(count, REPLICATES, SEED)])

    for key, result in found.items():
        counts = resamples(result.test.people)
        figures[key] |= _people_figures(result, counts) | _transfer_figures(result, resamples)
        if key in closer:
            figures[key] |= _score_figures(result, counts)
    resamples.cache_clear()
    judged: dict[str, dict[str, PairMeasures]] = {}
    for key, result in found.items():
        for one in result.pairs:
            judged.setdefault(one.fingerprint, {})[key] = one
    for fingerprint, measures in sorted(judged.items()):
        replicates = _pair_replicates(measures, stored.read_facts(sets, fingerprint))
        for key, one in measures.items():
            figures[key][one.name] = Figure(one.accuracy, replicates.get(key), fingerprint)
    return figures


def _people_figures(result: CellResult, counts: np.ndarray) -> dict[str, Figure]:
    test, units = result.test, _units(result)
    hits, accepted = (
        np.reshape([*kept.values()], (len(test.hits), test.people)).T
        for kept in (test.hits, test.false_accepts)
    )
    genuine, impostors = np.array(test.genuine), np.array(test.impostors)
    again = at_own_threshold(counts, hits, genuine, accepted, impostors)
    replicates = dict(zip(test.hits, again.T, strict=True))
    figures = {
        tar_name(far): Figure(value, replicates.get(far), units)
        for far in FARS
        if (value := test.tar.get(far)) is not None
    }
    again = ratios(counts, np.array(test.found), np.array(test.probes))
    return figures | {RANK1: Figure(test.rank1, again, units)}


def _score_figures(result: CellResult, counts: np.ndarray) -> dict[str, Figure]:
    test, units = result.test, _units(result)
    figures: dict[str, Figure] = {}
    for side, scores in (("genuine", test.genuine_scores), ("impostor", test.impostor_scores)):
        figures[f"{side} mean"], figures[f"{side} std"] = Figure(scores.mean), Figure(scores.std)
    noise = np.sqrt((test.genuine_scores.std**2 + test.impostor_scores.std**2) / 2)
    figures[DPRIME] = Figure(float(test.gap / noise) if noise else float("nan"))
    for far in OWN_FARS:
        own = np.array(test.own_threshold[far], np.float64)  # None becomes nan
        value, again = statistics.spread(own), statistics.spreads(counts, own)
        figures[own_name(far, scaled=False)] = Figure(value, again, units)
        figures[own_name(far, scaled=True)] = Figure(value / test.gap, again / test.gap, units)
    accepts = test.false_accepts.get(MAIN_FAR)
    if accepts is not None:
        rates = np.array(accepts) / np.array(test.impostors)
        for percentile in PERCENTILES:
            value = float(np.percentile(rates, percentile))
            figures[percentile_name(percentile)] = Figure(value)
        figures[OWN_GINI] = Figure(statistics.gini(rates), statistics.ginis(counts, rates), units)
    return figures


def _transfer_figures(
    result: CellResult, resamples: Callable[[int], np.ndarray]
) -> dict[str, Figure]:
    """How thresholds of the validation people carry over; nothing for old cells."""
    figures: dict[str, Figure] = {}
    if result.test.uniform is not None:
        figures[UNIFORM] = Figure(result.test.uniform)
    decades = []
    for one in result.transfer:
        images = np.array(one.images, np.float64)
        impostors = images * (images.sum() - images)
        for at in one.thresholds:
            if at.asked is None:
                values = at.far, 1 - at.tar
                figures |= zip(boundary_names(one.name), map(Figure, values), strict=True)
                continue
            least = least_far(impostors.sum() / 2, at.asked)  # each is met from two sides
            accepts, far = np.array(at.accepts, np.float64), max(at.far, least)
            value = float(np.log10(far / at.asked))
            # A pair is there as often as the product of its two people, so that to first order the
            # logarithm moves twice as far as that of the sums by person.
            again = np.maximum(ratios(resamples(len(images)), accepts, impostors), least)
            figures[transfer_name(one.name, at.asked)] = Figure(
                value, value + 2 * np.log10(again / far), one.units or _units(result)
            )
            decades.append(abs(value))
    return figures | ({DECADES: Figure(float(np.mean(decades)))} if decades else {})


def _units(result: CellResult) -> str:
    """Equal for cells with the same test people: they are set aside by these settings alone."""
    data = result.config["data"]
    settings = ("split_seed", "validation_people", "test_people", "held_out_max_images")
    aside = [data.get(name) for name in settings]
    return f"{aside} {result.test.people}"


def _pair_replicates(
    judged: dict[str, PairMeasures], facts: PairSetFacts | None
) -> dict[str, np.ndarray]:
    """Accuracy in each resample of a set's people; of its pairs where it names no people."""
    if facts is None:
        return {}
    right = np.stack([bits(one.right, facts.pairs) for one in judged.values()], axis=1)
    same = bits(facts.same, facts.pairs)
    people = None if facts.people is None else np.array(facts.people)
    units = facts.pairs if people is None else int(people.max()) + 1
    parts = []
    for counts in draws(units, REPLICATES, SEED, numbers=facts.pairs):
        weights = pair_weights(counts, same, people)
        parts.append((weights @ right.astype(np.float64)).T / weights.sum(axis=1))
    return dict(zip(judged, np.concatenate(parts, axis=1), strict=True))
