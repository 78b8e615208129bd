"""A study's definition: from a YAML file to cells, each of which is one training run.

about: what is asked, for the report
extends: losses.yaml            # optional: that study's settings, changed by what follows
base: {...}                     # a run's configuration, shared by all cells
seeds: [0, 1, 2]
baseline: cosface               # the arm others are compared with
arms:
  cosface:
    settings: {head: {name: cosface, s: 30}}
    trials: [{head.m: 0.1}, {head.m: 0.2}]    # the best on the validation people is used
conditions:                     # each arm under each; the first is where trials are judged
  clean: {}
  uniform 20 %: {data.label_noise.share: 0.2}
finals:                         # only the best arms of each group run with every seed
- {arms: [cosface, arcface], best: 1}
sweeps:                         # one setting of one arm varied alone, under the first condition
  λ: {arm: sphereface2-c, key: head.lam, values: [0.3, 0.5, 0.9], seeds: [0]}
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict

from sphereface2 import heads
from sphereface2.errors import UserError, did_you_mean
from sphereface2.training import config as configuration
from sphereface2.training import sections
from sphereface2.training.config import RunConfig

_DEFAULTS = json.loads(Path(__file__).with_name("defaults.json").read_text("utf-8"))
"""``version`` and ``settings``: what a cell's configuration has where its study says nothing.

They are the package's defaults as of that version, and stay: with another default, published cells
would get other keys, and a study that goes on would mix two defaults. A setting that is new to the
package is added here, with the value that means what went before. ``version`` rises when equal
settings no longer give equal results.
"""

WITHOUT_EFFECT = {
    "": ("name", "output"),
    "data": ("train", "workers", "cache"),
    "training": ("threads", "checkpoint_every", "log_every", "log_similarities", "cuda_graph"),
}
"""The settings that change neither what is learned nor what is measured, by section."""


@dataclass
class Arm:
    """One of the things compared, most often a loss."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    settings: dict[str, Any] = field(default_factory=dict)
    """Nested settings on top of the study's base."""
    trials: list[dict[str, Any]] = field(default_factory=list)
    """Alternatives ``{section.key: value}`` to choose from on the validation people."""
    only: list[str] | None = None
    """The conditions it takes part in; default: all."""


@dataclass
class Sweep:
    """One setting of one arm, varied alone; the arm's chosen trial is where it starts from."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    arm: str
    key: str
    values: list[Any]
    seeds: list[int] | None = None
    """Default: the study's first."""


@dataclass
class Finals:
    """A group of arms, of which those whose trials did best run with every seed and condition.

    A group of no more than ``best`` arms decides nothing, and may have arms without trials.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    arms: list[str]
    best: int = 1


@dataclass
class Selection:
    """How a trial is chosen."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    far: float = 1e-3
    """TAR at this FAR on the validation people decides."""
    seed: int | None = None
    """The seed that trials are run with; default: the study's first."""


@dataclass
class Study:
    """What to run; see the module for its YAML."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    arms: dict[str, Arm]
    name: str = "study"
    about: str = ""
    base: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    baseline: str | None = None
    pairs: list[str] = field(default_factory=lambda: ["auto"])
    """Verification sets to judge finished cells on; ``auto``: those that lie with the data."""
    conditions: dict[str, dict[str, Any]] = field(default_factory=lambda: {"all data": {}})
    finals: list[Finals] = field(default_factory=list)
    """If there are any, an arm that does not come first in its group ends with its trials."""
    sweeps: dict[str, Sweep] = field(default_factory=dict)
    selection: Selection = field(default_factory=Selection)

    @property
    def tuning_seed(self) -> int:
        return self.seeds[0] if self.selection.seed is None else self.selection.seed

    def only(self, arms: Collection[str]) -> Study:
        """The study of some of its arms."""
        return replace(
            self,
            arms={name: arm for name, arm in self.arms.items() if name in arms},
            sweeps={name: sweep for name, sweep in self.sweeps.items() if sweep.arm in arms},
        )

    @property
    def first_condition(self) -> str:
        return next(iter(self.conditions))


@dataclass(frozen=True)
class Cell:
    """One training run of a study, and its place in it.

    Attributes:
        arm, condition, seed: where in the grid.
        role: a ``trial`` is judged on validation people only; ``grid`` and ``sweep`` cells are
            judged on the test people.
        config: of the run.
        changed: the trial's or the sweep's settings, ``{key: value}``.
        sweep: name of the sweep.
    """

    arm: str
    condition: str
    seed: int
    role: Literal["trial", "grid", "sweep"]
    config: RunConfig = field(repr=False)
    changed: dict[str, Any] = field(default_factory=dict)
    sweep: str | None = None

    @cached_property
    def key(self) -> str:
        """Hex, 16 digits: equal for cells that must give equal results on equal data.

        Of the settings that have an effect on the result and differ from ``defaults.json``, and of
        that file's version. The data's fingerprint is kept with the results, and compared before
        they are used.
        """
        settings = configuration.to_dict(self.config)
        for section, names in WITHOUT_EFFECT.items():
            for name in names:
                del (settings[section] if section else settings)[name]
        special = _unlike(settings, _DEFAULTS["settings"])
        content = json.dumps([special, _DEFAULTS["version"]], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def label(self) -> str:
        """For a line of progress."""
        what = [self.arm, self.condition, f"seed {self.seed}"]
        if self.changed:
            changed = ", ".join(f"{key} {value}" for key, value in self.changed.items())
            what.insert(1, f"{self.role}: {changed}")
        return " · ".join(what)


def load(path: Path) -> Study:
    """Read a study's YAML.

    Raises:
        UserError: unreadable, unknown keys, names that do not exist, arms that would not be tuned
            alike (trials of different number), settings that no run accepts.
    """
    tree = _read(path)
    if "arms" not in tree:
        raise UserError(
            f"{path} has no arms, which are what a study compares: give them, as in "
            "'arms: {cosface: {settings: {head: {name: cosface}}}}'"
        )
    tree.setdefault("name", path.stem)
    study = sections.validated(Study, tree, str(path))
    _check(study, path)
    return study


def trials(study: Study) -> list[Cell]:
    """Every arm's trials."""
    return [
        _cell(study, name, study.first_condition, study.tuning_seed, "trial", trial)
        for name, arm in study.arms.items()
        for trial in arm.trials
    ]


def finalists(study: Study, figures: Mapping[str, float]) -> list[str]:
    """The arms that run with every seed, as far as that is decided.

    Args:
        study: what to run.
        figures: of arms that are tuned to the end, the figure of the best trial.
    """
    if not study.finals:
        return list(study.arms)
    found = []
    for group in study.finals:
        known = [arm for arm in group.arms if arm in figures]
        if len(known) == len(group.arms) or len(group.arms) <= group.best:
            found += sorted(known, key=lambda arm: -figures[arm])[: group.best]
    return [arm for arm in study.arms if arm in found]


def grid(
    study: Study, chosen: dict[str, dict[str, Any]], finals: Collection[str] | None = None
) -> list[Cell]:
    """Arms × conditions × seeds, then the sweeps.

    Condition by condition and in each seed by seed, so that an unfinished study has something on
    every arm.

    Args:
        study: what to run.
        chosen: each tuned arm's trial.
        finals: the `finalists`; the other arms have one cell, that of their trial. None: all are.
    """
    trial = study.first_condition, study.tuning_seed
    cells = [
        _cell(study, name, condition, seed, "grid", chosen.get(name, {}))
        for condition in study.conditions
        for seed in study.seeds
        for name, arm in study.arms.items()
        if arm.only is None or condition in arm.only
        if finals is None or name in finals or (condition, seed) == trial
    ]
    for sweep_name, sweep in study.sweeps.items():
        for seed in sweep.seeds or study.seeds[:1]:
            for value in sweep.values:
                changed = chosen.get(sweep.arm, {}) | {sweep.key: value}
                cell = _cell(study, sweep.arm, study.first_condition, seed, "sweep", changed)
                cells.append(replace(cell, changed={sweep.key: value}, sweep=sweep_name))
    return cells


def swept_value(study: Study, sweep: Sweep, chosen: dict[str, dict[str, Any]]) -> Any:
    """The value of the swept setting in the arm itself."""
    cell = _cell(study, sweep.arm, study.first_condition, 0, "grid", chosen[sweep.arm])
    value: Any = configuration.to_dict(cell.config)
    value["head"] = heads.defaults(cell.config.head["name"]) | value["head"]
    for part in sweep.key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _cell(
    study: Study,
    arm: str,
    condition: str,
    seed: int,
    role: Literal["trial", "grid", "sweep"],
    changed: dict[str, Any],
) -> Cell:
    tree = copy.deepcopy(_DEFAULTS["settings"])
    del tree["data"]["augmentation"]["size"]  # that follows from the backbone's
    tree = _merge(_merge(tree, study.base), study.arms[arm].settings)
    for key, value in [*study.conditions[condition].items(), *changed.items()]:
        sections.assign(tree, key, value)
    tree |= {"name": arm, "seed": seed}
    config = configuration.from_dict(tree, f"{study.name}: {arm}, {condition}")
    return Cell(arm, condition, seed, role, config, dict(changed))


def _merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """``low`` changed by ``high``, section by section; a head of another name replaces the head."""
    merged = copy.deepcopy(low)
    for key, value in high.items():
        before: Any = merged.get(key)
        both = isinstance(value, dict) and isinstance(before, dict)
        if both and value.get("name", before.get("name")) == before.get("name"):
            merged[key] = _merge(before, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def _unlike(settings: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The settings without those that are as in ``defaults``, read from JSON."""
    left = {}
    for key, value in settings.items():
        default = defaults.get(key)
        if isinstance(value, dict) and isinstance(default, dict):
            value = _unlike(value, default)
            if value:
                left[key] = value
        elif key not in defaults or (list(value) if isinstance(value, tuple) else value) != default:
            left[key] = value
    return left


def _read(path: Path, within: tuple[Path, ...] = ()) -> dict[str, Any]:
    tree: dict[str, Any] = sections.read(path, "study")
    if (parent := tree.pop("extends", None)) is not None:
        wanted = path.parent / str(parent)
        if wanted in within:
            raise UserError(f"{path} extends {parent}, which extends it in turn")
        inherited = _read(wanted, (*within, path))
        inherited.pop("name", None)
        arms = tree.pop("arms", None)
        if isinstance(arms, list):  # names: those of the parent's arms to keep
            there = inherited.get("arms", {})
            for name in arms:
                if name not in there:
                    raise UserError(
                        f"{path}: {parent} has no arm {name}{did_you_mean(name, there)}"
                    )
            inherited["arms"] = {name: there[name] for name in arms}
        elif arms is not None:
            tree["arms"] = arms
        # Conditions and sweeps are asked anew; an arm of the same name is changed.
        for section in ("conditions", "sweeps"):
            if section in tree:
                inherited.pop(section, None)
        tree = _merge(inherited, tree)
    return tree


def _check(study: Study, path: Path) -> None:
    if not study.arms or not study.seeds or not study.conditions:
        raise UserError(f"{path} needs at least one arm, one seed and one condition")
    swept = [sweep.arm for sweep in study.sweeps.values()]
    for name in [study.baseline, *swept, *(arm for group in study.finals for arm in group.arms)]:
        if name is not None and name not in study.arms:
            raise UserError(
                f"{path} names the arm {name}{did_you_mean(name, study.arms)}, "
                f"but its arms are {', '.join(study.arms)}"
            )
    _check_once(study, path)
    counts = {name: len(arm.trials) for name, arm in study.arms.items() if arm.trials}
    if len(set(counts.values())) > 1:
        numbers = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise UserError(
            f"{path}: arms must be tuned alike, but their numbers of trials differ ({numbers})"
        )
    for group in study.finals:
        for name in group.arms:
            if len(group.arms) > group.best and not study.arms[name].trials:
                raise UserError(f"{path}: finals are decided by trials, and {name} has none")
    for name, arm in study.arms.items():
        for condition in arm.only or []:
            if condition not in study.conditions:
                raise UserError(
                    f"{path}: the arm {name} takes part only in {condition}"
                    f"{did_you_mean(condition, study.conditions)}, but the conditions are "
                    f"{', '.join(study.conditions)}"
                )
    _check_settings(study, path)
    for cell in _all_possible(study):
        if not cell.config.data.validation_people and study.arms[cell.arm].trials:
            raise UserError(f"{path}: trials need base.data.validation_people to be judged on")
        if cell.config.validation.pairs:
            raise UserError(
                f"{path}: runs must not choose by what they are judged on; set "
                "base.validation.pairs to [] and name the sets under pairs"
            )
        fars = cell.config.validation.fars
        if cell.role == "trial" and study.selection.far not in fars:
            raise UserError(
                f"{path}: selection.far = {study.selection.far:g}, by which trials are chosen, is "
                f"not among base.validation.fars ({', '.join(f'{far:g}' for far in fars)})"
            )
        if not cell.config.data.test_people:
            raise UserError(f"{path} needs base.data.test_people, to judge the cells on")


def _check_once(study: Study, path: Path) -> None:
    """What stands twice would count as two results where there is one."""
    given: dict[str, list[Any]] = {"seeds": study.seeds, "pairs": study.pairs}
    for name, arm in study.arms.items():
        given |= {f"arms.{name}.trials": arm.trials, f"arms.{name}.only": arm.only or []}
    for name, sweep in study.sweeps.items():
        given |= {f"sweeps.{name}.values": sweep.values, f"sweeps.{name}.seeds": sweep.seeds or []}
    given["finals"] = [arm for group in study.finals for arm in group.arms]
    for what, values in given.items():
        if twice := [one for place, one in enumerate(values) if one in values[:place]]:
            shown = sections.shown(twice[0])
            raise UserError(f"{path}: {what} must name each once, and {shown} stands twice")


def _check_settings(study: Study, path: Path) -> None:
    """Conditions, trials and sweeps name single settings, and none of them the data set."""
    single = [*study.conditions.values(), *(t for arm in study.arms.values() for t in arm.trials)]
    single += [{sweep.key: value} for sweep in study.sweeps.values() for value in sweep.values]
    for key, value in (item for settings in single for item in settings.items()):
        if isinstance(value, dict):
            raise UserError(
                f"{path}: {key}: {value} would replace all of {key}; name single settings, "
                f"as in {key}.{next(iter(value), 'name')}: …"
            )
    named = [key for settings in single for key in settings]
    if "data.train" in named or any(
        "train" in arm.settings.get("data", {}) for arm in study.arms.values()
    ):
        raise UserError(
            f"{path}: cells are distinguished by their settings, not by their data; give "
            "data.train under base alone, and other data a study with --cells of its own"
        )


def _all_possible(study: Study) -> Iterator[Cell]:
    """Cells that use every setting between them: mistakes are found before the first run."""
    yield from trials(study)
    firsts = {name: arm.trials[0] for name, arm in study.arms.items() if arm.trials}
    yield from grid(study, firsts)
