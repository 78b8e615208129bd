"""One cell: an ordinary run of ``fit`` in its own folder, then what the study keeps of it.

``python -m sphereface2.study.cell FOLDER [PAIRS ...]`` trains what ``FOLDER/config.yaml`` says,
going on from the folder's last checkpoint if there is one, and writes ``FOLDER/cell.json`` at the
end.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sphereface2.backbones import bundle
from sphereface2.errors import UserError
from sphereface2.evaluation.embedding import embed
from sphereface2.evaluation.verification import pair_scores
from sphereface2.files import atomic_write
from sphereface2.study.measure import describe_pairs, measure_pairs, measure_people
from sphereface2.training import config as configuration
from sphereface2.training.config import RunConfig
from sphereface2.training.distributed import world
from sphereface2.training.fit import fit, open_inputs

RESULT = "cell.json"
SETS = "sets"


def run(folder: Path, pairs: Sequence[str] = ("auto",)) -> None:
    """Train, and measure on the test people and the verification sets ``pairs``.

    A folder that is done already and was judged on all of ``pairs`` is left as it is; one that was
    judged on others is judged on them too.
    """
    before = read_result(folder)
    judged = set() if before is None else judged_on(before)
    if before is not None and set(pairs) <= judged:
        return
    config = folder / "config.yaml"
    fit(config, run=folder)
    settings = configuration.load(config)
    settings.validation.pairs = sorted(judged.union(pairs))
    result = measure(folder, settings)
    atomic_write(folder / RESULT, json.dumps(result).encode())


def read_result(folder: Path) -> dict[str, Any] | None:
    """What `measure` found in ``folder``; None if the cell is not done."""
    path = folder / RESULT
    return json.loads(path.read_text()) if path.exists() else None


def judged_on(result: dict[str, Any]) -> set[str]:
    """The verification sets that a cell was judged on, as they were asked for."""
    return set(result["config"]["validation"]["pairs"])


def measure(folder: Path, settings: RunConfig) -> dict[str, Any]:
    """What a study keeps of the finished run in ``folder``; JSON-able.

    ``validation``: TAR by FAR on the validation people; ``test``: of `measure_people`; ``pairs``:
    of `measure_pairs` for each verification set, with its ``fingerprint``, under which
    ``../sets/FINGERPRINT.json`` describes the set; ``data``, ``environment``, ``training`` as in
    the run's own files; ``cpu_seconds`` of this process.
    """
    with world(settings.training.device, settings.training.threads) as place:
        inputs = open_inputs(settings, place)
        network = bundle.load(folder)
        source, test = inputs.source, inputs.test_indices
        flip = settings.validation.flip
        embeddings = embed(network, (source.read(int(i)) for i in test), flip=flip)
        people = measure_people(embeddings, source.labels[test])
        pairs = []
        for pair_set in inputs.pairs:
            images = (pair_set.images[i] for i in range(len(pair_set.images)))
            scores = pair_scores(embed(network, images, flip=flip), pair_set.pairs)
            fingerprint = pair_set.fingerprint()
            pairs.append({"fingerprint": fingerprint, **measure_pairs(scores, pair_set)})
            described = folder.parent / SETS / f"{fingerprint}.json"
            if not described.exists():
                described.parent.mkdir(exist_ok=True)
                atomic_write(described, json.dumps(describe_pairs(pair_set)).encode())
    results = json.loads((folder / "results.json").read_text())
    environment = json.loads((folder / "environment.json").read_text())
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "config": configuration.to_dict(settings),
        # Without the path: results are passed on, and the fingerprint says what the data was.
        "data": {key: value for key, value in environment["data"].items() if key != "train"},
        "environment": environment["starts"],
        "training": results["training"],
        "validation": results["held_out"]["tar"] if "held_out" in results else {},
        "test": people,
        "pairs": pairs,
        "cpu_seconds": used.ru_utime + used.ru_stime,
    }


def main() -> None:
    try:
        run(Path(sys.argv[1]), sys.argv[2:])
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
