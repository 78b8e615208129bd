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

from sphereface2.embedder import Embedder
from sphereface2.errors import Stopped, UserError
from sphereface2.evaluation.verification import pair_scores
from sphereface2.study.measure import (
    PairMeasures,
    PeopleMeasures,
    describe_pairs,
    measure_pairs,
    measure_people,
)
from sphereface2.study.stored import (
    SETS,
    CellData,
    CellResult,
    read_result,
    write_facts,
    write_result,
)
from sphereface2.training import config as configuration
from sphereface2.training.config import RunConfig
from sphereface2.training.distributed import world
from sphereface2.training.fit import fit
from sphereface2.training.inputs import Inputs, open_inputs
from sphereface2.training.report import FILE, TrainingFacts


def run(folder: Path, pairs: Sequence[str] = ("auto",)) -> None:
    """Train, and measure on the test people and the verification sets ``pairs``.

    A folder that is done already and was judged on all of ``pairs`` is left as it is; one that was
    judged on others is judged on them too.
    """
    before = read_result(folder)
    judged = set() if before is None else before.judged_on
    if before is not None and set(pairs) <= judged:
        return
    config = folder / "config.yaml"
    fit(config, run=folder)
    settings = configuration.load(config)
    settings.validation.pairs = sorted(judged.union(pairs))
    write_result(folder, measure(folder, settings))


def measure(folder: Path, settings: RunConfig) -> CellResult:
    """What a study keeps of the finished run in ``folder``."""
    with world(settings.training.device, settings.training.threads) as place:
        inputs = open_inputs(settings, place)
        with Embedder.load(folder, flip=settings.validation.flip) as embedder:
            people, pairs = _measure(embedder, inputs, folder.parent / SETS)
    results = json.loads((folder / FILE).read_text())
    environment = json.loads((folder / "environment.json").read_text())
    used = resource.getrusage(resource.RUSAGE_SELF)
    held_out = results.get("held_out", {"tar": {}})
    data = environment["data"]
    return CellResult(
        config=configuration.to_dict(settings),
        data=CellData(data["kind"], data["fingerprint"], data["images"], data["people"]),
        environment=environment["starts"],
        training=TrainingFacts(**results["training"]),
        validation={float(far): tar for far, tar in held_out["tar"].items()},
        test=people,
        pairs=pairs,
        cpu_seconds=used.ru_utime + used.ru_stime,
    )


def _measure(
    embedder: Embedder, inputs: Inputs, sets: Path
) -> tuple[PeopleMeasures, list[PairMeasures]]:
    test = inputs.test_indices
    embeddings = embedder.embed_source(inputs.source, test)
    people, pairs = measure_people(embeddings, inputs.source.labels[test]), []
    for pair_set in inputs.pairs:
        scores = pair_scores(embedder.embed_pairs(pair_set), pair_set.pairs)
        fingerprint = pair_set.fingerprint()
        pairs.append(measure_pairs(scores, pair_set, fingerprint))
        write_facts(sets, fingerprint, describe_pairs(pair_set))
    return people, pairs


def main() -> None:
    """Run the cell that the command line names."""
    try:
        run(Path(sys.argv[1]), sys.argv[2:])
    except Stopped as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.status)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
