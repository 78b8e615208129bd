"""What fine-tuning for few people brings: their unseen images, and people in neither training.

    python benchmarks/finetuning.py runs/NAME celeb50k/train.rec --pairs lfw.bin
    python benchmarks/finetuning.py runs/NAME lfw.bin --tune           # rates, on other people

Of the people whom the run was not trained on (its ``people.json``), 300 are set aside with five
images each: three are trained on, two are tested on. The others, with five images each too, and
LFW are in neither. Each way to train is ``sphereface2 fit`` in a process of one thread; the seed
draws people and images and is the training's. TAR at FAR 1e-2 and 1e-3 over all pairs, rank-1 of
the tested images among the means of the three; processor minutes of the whole command.
``--tune`` tries rates on the people of SET, a verification set, who have five images or more; what
is not set aside of them is in neither.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np

from sphereface2.data.opening import load_pairs, open_source
from sphereface2.evaluation.all_pairs import evaluate_all_pairs
from sphereface2.evaluation.identification import search
from sphereface2.recognition.face_embedder import FaceEmbedder

FARS, TRAINED, TESTED = (1e-2, 1e-3), 3, 2
WAYS = {
    "no training": None,
    "rate 0.1, mirror images alone": "START PLAIN",
    "all layers": "START",
    "the last layer alone": "START LAST",
    "from scratch": "CONFIG",
    "from scratch, four times as long": "CONFIG --training.epochs 64",
}
RATES = {
    "no training": None,
    **{f"plain {rate}": f"START PLAIN --training.lr {rate}" for rate in (0.1, 0.01)},
    **{f"all {rate}": f"START --training.lr {rate}" for rate in (0.03, 0.01, 0.003)},
    **{f"norm {rate}": f"START --training.lr {rate} NORM" for rate in (0.03, 0.01)},
    **{f"last {rate}": f"START --training.lr {rate} LAST" for rate in (0.1, 0.01)},
}
Images = tuple[list[bytes], np.ndarray]


def people_outside(path: Path, run: Path) -> Images:
    """Images and labels of the people of a set whom the run was not trained on."""
    if path.suffix == ".bin":
        pairs = load_pairs(path, names=path.with_name(f"{path.stem}_pairs.txt"))
        return list(pairs.images), np.asarray(pairs.people)
    source = open_source(path)
    known = json.loads((run / "people.json").read_text())
    outside = np.isin(source.labels, known["validation"] + known["test"])
    chosen = np.flatnonzero(outside)
    return [source.read(int(i)) for i in chosen], np.asarray(source.labels)[chosen]


def draw(labels: np.ndarray, people: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions of images: trained (people, 3) and tested (people, 2); those of others (N, 5)."""
    rng = np.random.default_rng(seed)
    several = np.flatnonzero(np.bincount(labels) >= TRAINED + TESTED)
    rows = np.stack(
        [
            rng.choice(np.flatnonzero(labels == one), TRAINED + TESTED, replace=False)
            for one in rng.permutation(several)
        ]
    )
    return rows[:people, :TRAINED], rows[:people, TRAINED:], rows[people:]


def train(words: str, given: argparse.Namespace, seed: int, faces: Path, out: Path) -> Path:
    """The folder of a run that ``sphereface2 fit`` makes of a way's words."""
    plain = given.work / "plain.yaml"
    plain.write_text("name: plain\n")
    meant = {
        "START": ["--start-from", str(given.run)],
        "CONFIG": ["--config", given.config],
        "PLAIN": ["--config", str(plain)],
        "NORM": ["--training.freeze_batch_norm", "true"],
        "LAST": ["--training.freeze", "[stages]"],
    }
    given_words = [part for word in words.split() for part in meant.get(word, [word])]
    command = [sys.executable, "-m", "sphereface2", "fit", "--run-folder", str(out), *given_words]
    command += ["--data.train", str(faces), "--seed", str(seed), "--data.validation_people", "0"]
    command += ["--validation.pairs", "[]", "--training.threads", "1", "--training.device", "cpu"]
    with out.with_suffix(".log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)
    return out


def processor_time() -> float:
    """Seconds that the ended child processes took."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def tar(rows: np.ndarray, people: np.ndarray) -> list[float | None]:
    return [point.value for point in evaluate_all_pairs(rows, people, FARS, workers=1).tar]


def measure(model: Path, images: list[bytes], parts: tuple[np.ndarray, ...]) -> dict[str, object]:
    trained, tested, others = parts
    embed = FaceEmbedder.from_pretrained(str(model), device="cpu").embed
    rows = embed(
        [images[i] for i in np.concatenate([part.ravel() for part in parts])], aligned=True
    )
    kept, probes, rest = np.split(rows, np.cumsum([trained.size, tested.size]))
    means = kept.reshape(*trained.shape, -1).mean(axis=1)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    who = np.repeat(np.arange(len(tested)), TESTED)
    found = search(probes, who, means, np.arange(len(means)))
    figures: dict[str, object] = {"unseen": tar(probes, who), "rank1": (found.rank == 1).mean()}
    if len(others) > 1:
        figures["others"] = tar(rest, np.repeat(np.arange(len(others)), others.shape[1]))
    return figures


def trial(way: str, words: str | None, seed: int, given: argparse.Namespace) -> dict[str, object]:
    """The figures of one way and seed, kept in the work folder."""
    folder = given.work / f"{'tune' if given.tune else 'test'}-{seed}"
    place = folder / re.sub("[^a-z0-9]+", "-", way)
    if (result := place.with_suffix(".json")).exists():
        return json.loads(result.read_text())
    images, labels = people_outside(given.set, given.run)
    parts = draw(labels, given.people, seed)
    for number, row in enumerate(parts[0]):
        person = folder / "faces" / f"{number:05}"
        person.mkdir(parents=True, exist_ok=True)
        for i in row:
            (person / f"{i}.jpg").write_bytes(images[i])
    start = processor_time()
    model = given.run if words is None else train(words, given, seed, folder / "faces", place)
    minutes = (processor_time() - start) / 60
    figures = {"way": way, "seed": seed, "people": len(parts[0]), "others": None}
    figures |= measure(model, images, parts) | {"minutes": minutes}
    if given.pairs is not None:
        lfw, people = people_outside(given.pairs, given.run)
        count = np.bincount(people)[people]
        some = np.flatnonzero((count >= 3) & (count < TRAINED + TESTED))  # --tune takes the others
        embedder = FaceEmbedder.from_pretrained(str(model), device="cpu")
        figures["lfw"] = tar(embedder.embed([lfw[i] for i in some], aligned=True), people[some])
    result.write_text(json.dumps(figures))
    return figures


def line(results: list[dict[str, object]]) -> str:
    """A row of the table: mean ± standard deviation over seeds, TARs and rank-1 in %."""
    cells = [str(results[0]["way"])]
    for name in ("unseen", "rank1", "others", "lfw", "minutes"):
        values = np.array([np.atleast_1d(one[name]) for one in results if one.get(name)], float)
        if len(values):
            values = values * (1 if name == "minutes" else 100)
            spread = (
                values.std(axis=0, ddof=1) if len(values) > 1 else np.full(values.shape[1], np.nan)
            )
            pairs = zip(values.mean(axis=0), spread, strict=True)
            cells.append(" / ".join(f"{mean:.1f} ± {one:.1f}" for mean, one in pairs))
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("set", type=Path, nargs="?")
    parser.add_argument("--pairs", type=Path, help="LFW, for people in neither")
    parser.add_argument("--config", default="small", help="of the training from scratch")
    parser.add_argument("--people", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", help="beginnings of their names; default: all")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("/tmp/finetuning"))
    given = parser.parse_args()
    if given.run is None or given.set is None:
        print("nothing measured: give RUN and SET")
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    for way, words in (RATES if given.tune else WAYS).items():
        if given.ways is None or way.startswith(tuple(given.ways)):
            print(line([trial(way, words, seed, given) for seed in given.seeds]), flush=True)


if __name__ == "__main__":
    main()
