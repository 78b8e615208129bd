"""The results of cells as they are stored: typed, and JSON on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from sphereface2.errors import UserError
from sphereface2.evaluation.results import to_dict
from sphereface2.files import atomic_write
from sphereface2.study.measure import (
    PairMeasures,
    PairSetFacts,
    PeopleMeasures,
    TransferMeasures,
)
from sphereface2.training.report import TrainingFacts

T = TypeVar("T")
RESULT = "cell.json"
SETS = "sets"
EMBEDDINGS = "test.npy"
"""Beside a result: the test people's embeddings, float16 (N, d), in the order of the split."""


@dataclass(frozen=True)
class CellData:
    """What a cell was trained on.

    Without the path: results are passed on, and the fingerprint says what the data was.
    """

    fingerprint: str
    images: int
    people: int


@dataclass(frozen=True)
class CellResult:
    """What a study keeps of a finished run.

    Attributes:
        config: the run's settings.
        data, training: as in the run's own files.
        environment: an entry for each start.
        validation: TAR by FAR on the validation people.
        test: on the test people.
        pairs: for each verification set.
        cpu_seconds: of the processes that finished and judged the cell.
        transfer: thresholds of the validation people on other sets; empty in old cells.
        curve: what the log says of similarities and gradients during training, with ``step``;
            empty where ``training.log_similarities`` was false.
    """

    config: dict[str, Any]
    data: CellData
    environment: list[dict[str, Any]]
    training: TrainingFacts
    validation: dict[float, float | None]
    test: PeopleMeasures
    pairs: list[PairMeasures]
    cpu_seconds: float
    transfer: list[TransferMeasures] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)

    @property
    def judged_on(self) -> set[str]:
        """The verification sets that the cell was judged on, as they were asked for."""
        return set(self.config["validation"]["pairs"])

    @property
    def versions(self) -> list[dict[str, str | None]]:
        """Versions of Python and of packages at each start of the training, by name."""
        return [{"Python": start["python"], **start["packages"]} for start in self.environment]


_RESULT, _FACTS = TypeAdapter(CellResult), TypeAdapter(PairSetFacts)


def read_result(folder: Path) -> CellResult | None:
    """The result of the cell in ``folder``; None if the cell is not done."""
    return _read(_RESULT, folder / RESULT)


def write_result(folder: Path, result: CellResult) -> None:
    """Write a cell's result where `read_result` finds it."""
    atomic_write(folder / RESULT, json.dumps(to_dict(result)).encode())


def read_facts(sets: Path, fingerprint: str) -> PairSetFacts | None:
    """The description of a verification set in the folder ``sets``; None where there is none."""
    return _read(_FACTS, sets / f"{fingerprint}.json")


def write_facts(sets: Path, fingerprint: str, facts: PairSetFacts) -> None:
    """Write a verification set's description where `read_facts` finds it, unless it is there."""
    path = sets / f"{fingerprint}.json"
    if not path.exists():
        sets.mkdir(exist_ok=True)
        atomic_write(path, json.dumps(to_dict(facts)).encode())


def _read(adapter: TypeAdapter[T], path: Path) -> T | None:
    if not path.exists():
        return None
    try:
        return adapter.validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(
            f"{path} is damaged ({where}: {first['msg']}): remove it and run the study again"
        ) from error
