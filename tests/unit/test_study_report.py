"""Reports of made cells: what is told of them, of what is missing, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import markdown
import numpy as np
import pytest
import yaml
from scipy import stats

from sphereface2.data.pairs import PairSet
from sphereface2.errors import UserError
from sphereface2.evaluation.all_pairs import evaluate_all_pairs
from sphereface2.evaluation.bootstrap import Bootstrap, draws, interval
from sphereface2.evaluation.one_threshold import all_pairs_at
from sphereface2.evaluation.results import to_dict
from sphereface2.study import design, plots, results, runner, stored, tables
from sphereface2.study.measure import (
    describe_pairs,
    measure_pairs,
    measure_people,
    measure_transfer,
)
from sphereface2.study.report import write_reports
from sphereface2.study.statistics import Figure, contrast
from sphereface2.training import config as configuration

TREE = {
    "about": "Which | is *better*?",
    "base": {
        "data": {"validation_people": 4, "test_people": 16},
        "validation": {"pairs": [], "fars": [0.1, 0.001]},
    },
    "seeds": [0, 1, 2],
    "baseline": "cosface",
    "arms": {
        "sphereface2": {
            "settings": {"head": {"name": "sphereface2", "r": 30}},
            "trials": [{"head.m": 0.2}, {"head.m": 0.3}],
        },
        "cosface": {
            "settings": {"head": {"name": "cosface", "s": 30}},
            "trials": [{"head.m": 0.1}, {"head.m": 0.2}],
        },
        "normface": {"settings": {"head": {"name": "normface"}}, "only": ["clean"]},
    },
    "conditions": {"clean": {}, "uniform 20 %": {"data.label_noise.share": 0.2}},
    "sweeps": {
        "λ": {"arm": "sphereface2", "key": "head.lam", "values": [0.9, 0.5]},
        "bias": {"arm": "sphereface2", "key": "head.bias", "values": ["fixed", "learned"]},
    },
}
PEOPLE, IMAGES, DIM = 16, 9, 6


def pairs_of_twelve() -> PairSet:
    """400 pairs, every other one matched, of 12 people with four images each."""
    people = np.repeat(np.arange(12), 4)
    rng = np.random.default_rng(3)
    pairs = np.stack([rng.permutation(48)[:2] for _ in range(400)])
    pairs[::2, 1] = pairs[::2, 0] ^ 1
    same = people[pairs[:, 0]] == people[pairs[:, 1]]
    return PairSet("lfw", [b""] * 48, pairs, same, np.arange(400) // 2 % 10, people=people)


PAIRS = pairs_of_twelve()


def make(cell: design.Cell, quality: float) -> dict:
    """A cell.json whose embeddings are the better the higher ``quality``."""
    rng = np.random.default_rng(int(cell.key, 16) % 2**32)
    labels = np.repeat(np.arange(PEOPLE), IMAGES)
    people = np.random.default_rng(0).normal(size=(PEOPLE, DIM))
    rows = quality * people[labels] + rng.normal(size=(len(labels), DIM))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    scores = quality * PAIRS.same + rng.normal(size=len(PAIRS))
    start = {"python": "3.11.7", "packages": {"sphereface2": "0.1.0", "torch": "2.5.0"}}
    config = configuration.to_dict(cell.config)
    config["validation"]["pairs"] = ["auto"]
    return {
        "config": config,
        "data": {"kind": "made", "fingerprint": "a" * 64, "people": 30, "images": 300},
        "environment": [start],
        "training": {
            "steps": 12,
            "images": 384,
            "seconds": 2.0,
            "images_per_second": 192.0,
            "ranks": 1,
            "unreadable": [],
        },
        "validation": {"1e-1": 0.5, "1e-3": cell.changed.get("head.m", 0.1)},
        "test": to_dict(measure_people(rows, labels)),
        "pairs": [to_dict(measure_pairs(scores, PAIRS, "b" * 64))],
        "cpu_seconds": 900.0,
        "transfer": [
            to_dict(measure_transfer("test", "", rows, labels, [(1e-2, quality / 2), (None, 0.0)]))
        ],
        "curve": [{"step": k, "positive_cosine": k / 9, "pull": 9.0 - k} for k in range(3)],
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``study.yaml`` and all of its cells."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "study.yaml").write_text(yaml.safe_dump(TREE, allow_unicode=True, sort_keys=False))
    study = design.load(folder / "study.yaml")
    cells = folder / "cells"
    cells.mkdir()
    stored.write_facts(cells / stored.SETS, "b" * 64, describe_pairs(PAIRS))

    def put(cell: design.Cell) -> None:
        (cells / cell.key).mkdir(exist_ok=True)
        quality = {"sphereface2": 1.5, "cosface": 1.2, "normface": 1.0}[cell.arm]
        quality -= 0.3 * (cell.condition != "clean")
        (cells / cell.key / "cell.json").write_text(json.dumps(make(cell, quality)))

    for cell in design.trials(study):
        put(cell)
    for cell in design.grid(study, runner.best_trials(study, partial(runner.read, cells))[0]):
        put(cell)
    return folder


@pytest.fixture(scope="module")
def reported(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the whole study's report."""
    out = tmp_path_factory.mktemp("report")
    page = write_reports([whole / "study.yaml"], cells=whole / "cells", out=out)
    assert page == out / "report.md"
    return out


@pytest.fixture
def copied(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The study to change; pictures, which take most of a report's time, are drawn but not kept."""
    monkeypatch.setattr(plots, "write", lambda canvas, path: None)
    return shutil.copytree(whole, tmp_path / "study")


def report(folder: Path, name: str = "study.yaml") -> str:
    write_reports([folder / name], cells=folder / "cells", out=folder / "out")
    return (folder / "out" / "report.md").read_text()


def cells_of(folder: Path, **place: object) -> list[design.Cell]:
    """Cells of the grid at a place, for instance an arm and a seed."""
    study = design.load(folder / "study.yaml")
    cells = design.grid(study, runner.best_trials(study, partial(runner.read, folder / "cells"))[0])
    return [c for c in cells if all(getattr(c, key) == value for key, value in place.items())]


def result(folder: Path, cell: design.Cell) -> dict:
    return json.loads((folder / "cells" / cell.key / "cell.json").read_text())


def section(text: str, heading: str) -> str:
    """From a heading to the next of its level or above."""
    level = len(heading) - len(heading.lstrip("#"))
    _, after = text.split(f"\n{heading}\n", 1)
    return re.split(rf"\n#{{1,{level}}} ", after)[0]


def rows(text: str) -> list[list[str]]:
    """Cells of all tables' rows."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[part.strip() for part in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_page_and_pictures(reported):
    text = (reported / "report.md").read_text()
    page = markdown.markdown(text, extensions=["tables"])
    shown = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert set(shown) == {path.name for path in reported.glob("*.png")}
    assert set(shown) >= {"conditions.png", "sweep-1.png", "scores.png", "thresholds.png"}
    assert {path.suffix for path in reported.iterdir()} == {".md", ".png"}
    assert re.findall(r'<img .*?src="(.*?)"', page) == shown
    # Every table is one to GitHub: as many cells in each of its rows.
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(row) for row in rows(table)}) == 1, table
    assert page.count("<table>") == len(re.findall(r"^\| -", text, re.MULTILINE))
    assert "Which | is *better*?" in page
    assert "nan" not in text


def test_figures_are_those_of_the_cells(whole, reported):
    text = (reported / "report.md").read_text()
    clean = section(text, "### clean")
    accuracy = {
        arm: [
            json.loads((whole / "cells" / cell.key / "cell.json").read_text())["pairs"][0][
                "accuracy"
            ]
            for cell in cells_of(whole, arm=arm, condition="clean", role="grid")
        ]
        for arm in TREE["arms"]
    }
    told = {row[0]: row for row in rows(clean)}
    best = max(accuracy, key=lambda arm: np.mean(accuracy[arm]))
    for arm, values in accuracy.items():
        interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        mean = f"{100 * np.mean(values):.2f}"
        mean = f"**{mean}**" if arm == best else mean
        half = 100 * (interval.high - interval.low) / 2
        assert told[arm][2] == f"{mean} ± {half:.2f}"
    difference = told["sphereface2<br>over people<br>over seeds"][1].split("<br>")
    paired = stats.ttest_rel(accuracy["sphereface2"], accuracy["cosface"])
    interval = paired.confidence_interval(0.95)
    value = 100 * np.mean(np.subtract(accuracy["sphereface2"], accuracy["cosface"]))
    assert difference[0].strip("*") == f"{value:+.2f}".replace("-", "−")
    bounds = [f"{100 * b:+.2f}".replace("-", "−") for b in (interval.low, interval.high)]
    assert difference[2] == " … ".join(bounds)
    # The second trial was the better one, and the first of an arm's is not bold.
    assert "head.m 0.3<br>**30.00**" in text and "head.m 0.2<br>20.00 |" in text
    hours = 0.25 * len(list((whole / "cells").glob("*/cell.json")))
    assert f"{hours:.2f} hours" in text


def test_accuracy_is_resampled_over_the_people_of_the_set(whole):
    found = results.load(whole / "study.yaml", whole / "cells")
    figure = found.series("cosface", "clean", "lfw")[1]
    (cell,) = cells_of(whole, arm="cosface", condition="clean", role="grid", seed=1)
    packed = result(whole, cell)["pairs"][0]["right"]
    right = np.unpackbits(np.frombuffer(bytes.fromhex(packed), np.uint8))[:400]
    assert figure.value == pytest.approx(right.mean())
    drawn = np.random.default_rng(0).integers(12, size=(2000, 12))[7]
    times = [list(drawn).count(p) for p in range(12)]
    hits = total = 0
    for k, (a, b) in enumerate(PAIRS.people[PAIRS.pairs].tolist()):
        weight = times[a] if a == b else times[a] * times[b]
        hits, total = hits + weight * int(right[k]), total + weight
    assert figure.replicates[7] == pytest.approx(hits / total)


def test_sweep_holds_the_arm_itself(whole):
    found = results.load(whole / "study.yaml", whole / "cells")
    points, own = found.sweep("λ", "lfw")
    assert [value for value, _ in points] == [0.5, 0.7, 0.9] and own == 0.7  # the head's default
    assert points[1][1] == {0: found.series("sphereface2", "clean", "lfw")[0]}
    points, own = found.sweep("bias", "lfw")
    assert [value for value, _ in points] == ["fixed", "learned"] and own == "learned"


def test_what_is_missing_is_told(copied):
    cells = copied / "cells"
    (lost,) = cells_of(copied, arm="cosface", condition="clean", role="grid", seed=1)
    (failed,) = cells_of(copied, arm="normface", seed=2)
    for cell in (lost, failed):
        (cells / cell.key / "cell.json").unlink()
    said = f"error: loss | is not finite in {cells / failed.key}"
    (cells / failed.key / "failed.txt").write_text(f"exit status 1\n{said}\n")
    text = report(copied)
    assert "**Unfinished:** 2 of " in text
    told = section(text, "### Not done")
    assert "- cosface · head.m 0.2 · clean · seed 1" in told.replace("grid: ", "")
    line = f"error: loss \\| is not finite in {failed.key} (in {failed.key})"
    assert f"normface · clean · seed 2: {line}" in told  # and not where the cells lie
    clean = {row[0]: row for row in rows(section(text, "### clean"))}
    assert [clean[arm][1] for arm in TREE["arms"]] == ["3", "2", "2"]


def test_an_arm_without_trials_waits(copied):
    study = design.load(copied / "study.yaml")
    for cell in design.trials(study):
        if cell.arm == "cosface":
            (copied / "cells" / cell.key / "cell.json").unlink()
    text = report(copied)
    # 3 seeds under 2 conditions.
    assert "6 cells of cosface wait for a trial: none is done." in text
    assert "No cell of cosface is done, so there are no differences to it." in text
    assert "sphereface2" in section(text, "### clean")


def test_one_seed_has_no_interval_over_seeds(copied):
    tree = TREE | {"seeds": [0], "conditions": {"clean": {}}, "sweeps": {}}
    tree["arms"] = TREE["arms"] | {"normface": {"settings": {"head": {"name": "normface"}}}}
    (copied / "study.yaml").write_text(yaml.safe_dump(tree))
    clean = rows(section(report(copied), "### clean"))
    assert all("±" not in cell for row in clean for cell in row)
    difference = clean[-1][1].split("<br>")
    assert "…" in difference[1] and difference[2] == "–"
    assert "## Across conditions" not in (copied / "out" / "report.md").read_text()


def test_cells_of_different_data_are_refused(copied):
    (cell,) = cells_of(copied, arm="cosface", condition="clean", role="grid", seed=1)
    path = copied / "cells" / cell.key / "cell.json"
    edit(path, lambda result: result["data"].update(fingerprint="c" * 64))
    with pytest.raises(UserError, match=f"{cell.key}.* different training data"):
        report(copied)
    edit(path, lambda result: result["data"].update(fingerprint="a" * 64))
    edit(path, lambda result: result["pairs"][0].update(fingerprint="c" * 64))
    with pytest.raises(UserError, match="different version of lfw"):
        report(copied)


def test_a_damaged_cell_is_named(copied):
    (cell,) = cells_of(copied, arm="cosface", condition="clean", role="grid", seed=1)
    path = copied / "cells" / cell.key / "cell.json"
    edit(path, lambda result: result["test"].update(rank1="high"))
    with pytest.raises(UserError, match=rf"{cell.key}/cell.json is damaged \(test.rank1: .*remove"):
        report(copied)
    path.write_text("{")
    with pytest.raises(UserError, match=r"cell.json is damaged \(the file: .*run the study again"):
        report(copied)


def test_cells_of_different_versions_are_told(copied):
    (cell,) = cells_of(copied, arm="cosface", condition="clean", role="grid", seed=1)
    path = copied / "cells" / cell.key / "cell.json"
    edit(path, lambda result: result["environment"][0]["packages"].update(torch="2.6.0"))
    assert "different versions of torch: 2.5.0, 2.6.0" in report(copied)


def test_cells_of_different_devices_are_told(copied):
    assert "different devices" not in report(copied)
    (cell,) = cells_of(copied, arm="cosface", condition="clean", role="grid", seed=1)
    path = copied / "cells" / cell.key / "cell.json"
    edit(path, lambda result: result["environment"][0].update(gpu="Accelerator 5"))
    cells = len([*(copied / "cells").glob("*/cell.json")])
    assert f"different devices: Accelerator 5 1, CPU {cells - 1}." in report(copied)


def test_who_leads_by_a_seed_of_its_own_is_not_ahead(copied):
    """Of the seeds that both have, the arm with the higher mean is behind here."""
    arms = {"sphereface2": [0.2, 0.9, 0.2], "cosface": [0.3, None, 0.3], "normface": [0.0] * 3}
    for arm, values in arms.items():
        for seed, value in enumerate(values):
            (cell,) = cells_of(copied, arm=arm, condition="clean", role="grid", seed=seed)
            path = copied / "cells" / cell.key / "cell.json"
            if value is None:
                path.unlink()
            else:
                content = json.loads(path.read_text())
                content["test"]["tar"]["1e-3"] = value
                path.write_text(json.dumps(content))
    assert "Highest test TAR@1e-3: **sphereface2**.\n" in report(copied)


def test_a_seed_without_a_figure_is_not_left_out_of_a_mean():
    series = {seed: Figure(value) for seed, value in enumerate((0.1, 0.2, float("nan")))}
    assert tables.means([series, {0: Figure(0.1)}, {}], best="min") == ["–", "10.00", "–"]


def test_nothing_done_is_a_mistake(whole, tmp_path):
    with pytest.raises(UserError, match="no cell of study is done"):
        write_reports([whole / "study.yaml"], cells=tmp_path, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_several_studies_have_an_index(copied):
    tree = TREE | {"name": "noise only", "sweeps": {}}
    (copied / "noise.yaml").write_text(yaml.safe_dump(tree))
    paths = [copied / "study.yaml", copied / "noise.yaml"]
    page = write_reports(paths, cells=copied / "cells", out=copied / "out")
    assert page == copied / "out" / "index.md"
    links = re.findall(r"\]\((.*?)\)", page.read_text())
    assert links == ["study/report.md", "noise-only/report.md"]
    assert all((page.parent / link).exists() for link in links)
    # One that has not begun is told, and the others are there.
    (copied / "later.yaml").write_text(yaml.safe_dump(TREE | {"seeds": [7]}))
    write_reports([*paths, copied / "later.yaml"], cells=copied / "cells", out=copied / "out")
    assert "no cell of later is done" in (copied / "out" / "index.md").read_text()
    with pytest.raises(UserError, match="two of the studies are named study"):
        write_reports([paths[0], paths[0]], cells=copied / "cells", out=copied / "out")


def test_finalists_are_told_pair_by_pair(copied):
    """Apart from the baseline, and with how people differ in the first condition."""
    finals = [{"arms": ["sphereface2"]}, {"arms": ["cosface"]}]
    tree = TREE | {"baseline": "normface", "finals": finals}
    (copied / "study.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    text = section(report(copied), "## Finalists, pair by pair")
    found = results.load(copied / "study.yaml", copied / "cells")
    for condition in TREE["conditions"]:
        head, _, row = rows(section(text, f"### {condition}, pair by pair"))
        told = dict(zip(head, row, strict=True))
        assert row[0] == "sphereface2 less cosface<br>over people<br>over seeds" and row[1] == "3"
        arms = (found.series(arm, condition, "TAR@1e-3") for arm in ("sphereface2", "cosface"))
        ours, theirs = ([figure.value for figure in one.values()] for one in arms)
        low, high = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
        bounds = [f"{100 * bound:+.2f}".replace("-", "−") for bound in (low, high)]
        assert told["TAR@1e-3"].split("<br>")[2] == " … ".join(bounds)
        assert ("Gini of own FARs" in told) == (condition == "clean")


def test_a_transferred_threshold_has_the_interval_of_all_pairs():
    rng = np.random.default_rng(5)
    labels = np.repeat(np.arange(120), 4)
    # People who look alike come in groups, so that false accepts are shared unevenly.
    centres = rng.normal(size=(120, DIM)) + 2 * rng.normal(size=(12, DIM))[np.arange(120) % 12]
    rows = centres[labels] + rng.normal(size=(len(labels), DIM))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    (expected,) = all_pairs_at(rows, labels, {1e-2: 0.9}, bootstrap=Bootstrap(2000))
    transfer = [measure_transfer("lfw", "f", rows, labels, [(1e-2, 0.9), (None, 0.5)])]
    cell = SimpleNamespace(transfer=transfer, test=SimpleNamespace(uniform=0.25))
    found = results._transfer_figures(cell, lambda n: np.concatenate([*draws(n, 2000, 1)]))
    one = found[results.transfer_name("lfw", 1e-2)]
    assert expected.transfer is not None and expected.transfer.ci is not None
    assert one.value == pytest.approx(expected.transfer.value)
    assert np.percentile(one.replicates, [2.5, 97.5]) == pytest.approx(
        expected.transfer.ci, abs=0.12 * np.ptp(expected.transfer.ci)
    )
    assert found[results.DECADES].value == pytest.approx(abs(one.value))
    far, frr = (found[name].value for name in results.boundary_names("lfw"))
    (own,) = all_pairs_at(rows, labels, [0.5])
    assert (far, frr) == pytest.approx((own.far.value, 1 - own.tar.value))


def test_resamples_of_a_cell_have_the_thresholds_of_all_pairs():
    rng = np.random.default_rng(5)
    labels = np.repeat(np.arange(60), 4)
    rows = rng.normal(size=(60, DIM))[labels] + rng.normal(size=(len(labels), DIM))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    cell = SimpleNamespace(test=measure_people(rows, labels), config={"data": {}})
    found = results._people_figures(cell, next(draws(60, 500)))
    expected = evaluate_all_pairs(rows, labels, [1e-2, 1e-3, 1e-4], bootstrap=Bootstrap(500)).tar
    for point in expected[:2]:  # the lowest has no other below it in a cell
        figure = found[results.tar_name(point.at)]
        assert figure.value == pytest.approx(point.value)
        assert interval(figure.replicates) == pytest.approx(point.ci)
        itself = contrast((1, {0: figure}), (-1, {0: figure}))
        assert (itself.value, itself.people) == (0, (0, 0))
