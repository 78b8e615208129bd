"""`sphereface2 evaluate` on sets made here: as a subprocess, and through its function."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from command_line import ran

from sphereface2 import backbones
from sphereface2.backbones import bundle
from sphereface2.data.hardening import Hardening
from sphereface2.data.opening import load_pairs, open_source
from sphereface2.embedder import Embedder
from sphereface2.errors import UserError
from sphereface2.evaluation.all_pairs import AllPairsResult
from sphereface2.evaluation.one_threshold import OneThresholdResult
from sphereface2.evaluation.verification import kfold_accuracy, tar_at_far
from sphereface2.images import read_image
from sphereface2.recognition.evaluate import evaluate
from sphereface2.training import report as training_report

PEOPLE, IMAGES = 12, 4


def run(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "sphereface2", "evaluate", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        check=False,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A network, a folder of people, and the same pairs as .bin, pairs.txt and list."""
    root = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(0)
    (root / "net").mkdir()
    bundle.save(
        backbones.build("sfnet4", embedding_dim=32, input_size=32, width=0.25), root / "net"
    )
    rng = np.random.default_rng(0)
    encoded = {}
    for p in range(PEOPLE):
        base = cv2.resize(rng.integers(0, 256, (4, 4, 3), np.uint8), (32, 32))
        (root / "faces" / f"P{p}").mkdir(parents=True)
        for k in range(1, IMAGES + 1):
            noisy = base + rng.normal(0, 60, base.shape)
            data = cv2.imencode(".png", noisy.clip(0, 255).astype(np.uint8))[1].tobytes()
            encoded[p, k] = data
            (root / "faces" / f"P{p}" / f"P{p}_{k:04d}.png").write_bytes(data)
    lines, listed, packed, same = ["10\t3"], [], [], []
    for _ in range(10):
        for k in range(6):
            a, b = rng.choice(PEOPLE, 2, replace=False)
            m, n = rng.choice(IMAGES, 2, replace=False) + 1
            b = a if k < 3 else b
            lines.append(f"P{a}\t{m}\t{n}" if a == b else f"P{a}\t{m}\tP{b}\t{n}")
            listed.append(f"{int(a == b)} P{a}/P{a}_{m:04d}.png P{b}/P{b}_{n:04d}.png")
            packed += [encoded[a, m], encoded[b, n]]
            same.append(bool(a == b))
    (root / "set_pairs.txt").write_text("\n".join(lines))
    (root / "list.txt").write_text("\n".join(listed))
    (root / "set.bin").write_bytes(pickle.dumps((packed, same)))
    return root


def test_json_of_three_layouts_of_one_set(place):
    done = run(
        place / "net",
        *("--pairs", place / "set.bin", "--pairs", place / "set_pairs.txt"),
        *("--pairs", place / "list.txt", "--images", place / "faces"),
        "--json",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [s["name"] for s in report["sets"]] == ["set", "set_pairs", "list"]
    first = report["sets"][0]
    pair_set = load_pairs(place / "set.bin")
    e = Embedder(bundle.load(place / "net")).embed(pair_set.images).astype(np.float64)
    scores = (e[pair_set.pairs[:, 0]] * e[pair_set.pairs[:, 1]]).sum(1)
    folds = kfold_accuracy(scores, pair_set.same, np.repeat(np.arange(10), 6))
    assert first["accuracy"] == pytest.approx(folds.accuracy)
    assert first["accuracy_std"] == pytest.approx(folds.accuracy_std)
    assert first["accuracy"] > 0.6  # the people differ in colour: better than a coin
    assert list(first["tar"]) == ["1e-1", "1e-2", "1e-3", "1e-4", "1e-5", "1e-6"]
    assert first["tar"]["1e-1"] == pytest.approx(tar_at_far(scores, pair_set.same, [0.1])[0].value)
    assert first["tar"]["1e-3"] is None
    low, high = first["tar_ci"]["1e-1"]
    assert low <= first["tar"]["1e-1"] <= high
    assert (first["pairs"], first["genuine"], first["people"]) == (60, 30, PEOPLE)
    for other in report["sets"][1:]:
        for key in ("accuracy", "accuracy_std", "eer", "auc", "people", "tar", "tar_ci"):
            assert other[key] == first[key], key
    assert first["intervals"]["over"] == "people"


def test_tables_all_pairs_and_plots(place, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    (place / "faces" / "P3" / "broken.png").write_bytes(b"not an image")
    try:
        done = ran(
            *("evaluate", place / "net"),
            *("--pairs", place / "set.bin", "--all-pairs", place / "faces"),
            *("--plots", tmp_path, "--no-flip"),
        )
        report = evaluate(place / "net", all_pairs=place / "faces", as_json=True).of(
            AllPairsResult
        )[0]
    finally:
        (place / "faces" / "P3" / "broken.png").unlink()
    assert done.returncode == 0, done.stderr
    assert "10-fold accuracy" in done.stdout
    assert "TAR at FAR 1e-1" in done.stdout
    assert "1 unreadable image left out" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "faces_all_pairs_roc.png",
        "set_roc.png",
        "set_scores.png",
    ]
    assert (report.images, report.unreadable) == (PEOPLE * IMAGES, 1)
    assert "broken.png" in report.unreadable_names[0]
    assert report.genuine == PEOPLE * IMAGES * (IMAGES - 1) // 2
    assert report.impostor == IMAGES**2 * PEOPLE * (PEOPLE - 1) // 2

    paths = sorted((place / "faces").glob("*/*.png"))
    e = Embedder(bundle.load(place / "net")).embed([p.read_bytes() for p in paths])
    i, j = np.triu_indices(len(paths), 1)
    same = np.array([paths[a].parent == paths[b].parent for a, b in zip(i, j, strict=True)])
    expected = tar_at_far((e @ e.T)[i, j], same, [0.1, 0.01])
    for found, tar in zip(report.tar, expected, strict=False):
        assert (found.at, found.value) == (tar.at, pytest.approx(tar.value, abs=0.02))


class Attack:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_malicious_bin_ends_in_one_sentence_and_runs_nothing(place, tmp_path):
    (tmp_path / "bad.bin").write_bytes(pickle.dumps(([b"a", b"b"], [Attack()])))
    done = run(place / "net", "--pairs", "bad.bin", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: bad.bin is not a plain verification set")
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to evaluate on"),
        ({"pairs": ["absent.bin"]}, "no verification set absent.bin"),
        ({"pairs": ["list.txt"], "names": "set_pairs.txt"}, "belongs to one .bin"),
        ({"pairs": ["set.bin"], "images": "faces"}, "belongs to a text list"),
        ({"pairs": ["set.bin"], "device": "cuda:99"}, "device 'cuda:99'"),
        ({"pairs": ["set.bin"], "device": "toaster"}, "device 'toaster'"),
        ({"all_pairs": "absent"}, "absent"),
        ({"pairs": ["short.bin"]}, "k-fold accuracy needs two folds or more, and"),
        ({"pairs": ["unreadable.bin"]}, "unreadable: image 1 of pair 0 cannot be read"),
        ({"pairs": ["empty.bin"]}, "empty: image 1 of pair 0 cannot be read"),
        ({"pairs": ["set.bin"], "seed": -1}, "--seed must be an integer ≥ 0, got -1"),
        (
            {"pairs": ["set.bin"], "conditions": "yaw,lihgt"},
            "no condition .lihgt. .did you mean .light.",
        ),
    ],
)
def test_mistakes_are_named(place, monkeypatch, options, message):
    monkeypatch.chdir(place)
    content = pickle.loads((place / "set.bin").read_bytes())
    (place / "short.bin").write_bytes(pickle.dumps((content[0][:8], content[1][:4])))
    content[0][1] = b"not an image"
    (place / "unreadable.bin").write_bytes(pickle.dumps(content))
    content[0][1] = np.zeros((0, 0, 3), np.uint8)
    (place / "empty.bin").write_bytes(pickle.dumps(content))
    if "pairs" in options:
        options = options | {"pairs": [Path(path) for path in options["pairs"]]}
    given = {k: Path(v) if k in ("images", "names", "all_pairs") else v for k, v in options.items()}
    with pytest.raises(UserError, match=message):
        evaluate(Path("net"), **given)
    with pytest.raises(UserError, match="nowhere"):
        evaluate(Path("nowhere"), pairs=[Path("set.bin")])


def test_without_matplotlib_plots_are_refused_and_a_run_does_without(place, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'sphereface2\[plots\]'"):
        evaluate(place / "net", pairs=[place / "set.bin"], plots=tmp_path)
    folder, said = training_report._plots(tmp_path)
    assert folder is None and "sphereface2[plots]" in said


def test_figures_that_say_little_are_noted(place, tmp_path, capsys):
    """A network whose weights are all 0, and folds of one kind of pair."""
    network = bundle.load(place / "net")
    for parameter in network.parameters():
        parameter.data.zero_()
    (tmp_path / "zeros").mkdir()
    bundle.save(network, tmp_path / "zeros")
    images, same = pickle.loads((place / "set.bin").read_bytes())
    order = np.argsort(same, kind="stable")
    images = [images[2 * k + side] for k in order for side in (0, 1)]
    sorted_set = tmp_path / "sorted.bin"
    sorted_set.write_bytes(pickle.dumps((images, sorted(same))))
    found = evaluate(tmp_path / "zeros", pairs=[sorted_set], all_pairs=place / "faces")
    assert "all pairs have the same score" in found.results[0].notes[1]
    assert "10 of 10 folds hold pairs of one kind only" in found.results[0].notes[2]
    assert "all images have the same embedding" in found.results[1].notes[-1]
    shown = capsys.readouterr().out
    assert "all pairs have the same score" in shown and "folds hold pairs of one kind" in shown


def test_a_set_that_was_trained_on_is_noted(place, tmp_path):
    for name, known in (("own", open_source(place / "faces").fingerprint()), ("others", "0")):
        (tmp_path / name).mkdir()
        about = {"data": {"fingerprint": known}}
        bundle.save(bundle.load(place / "net"), tmp_path / name, extra=about)
        (found,) = evaluate(tmp_path / name, all_pairs=place / "faces").of(AllPairsResult)
        assert ("trained on people of this set" in " ".join(found.notes)) == (name == "own")


def test_conditions_score_every_set_again_on_images_made_harder(place):
    """Against images hardened and embedded here; the clean figures stay those without."""
    options = {"pairs": [place / "set.bin"], "all_pairs": place / "faces", "seed": 3}
    found = evaluate(place / "net", **options, conditions="occlusion,yaw").to_dict()
    clean = evaluate(place / "net", **options).to_dict()
    assert [one["name"] for one in found["sets"]] == ["set", "set-occlusion", "set-yaw"]
    assert [one.get("condition") for one in found["sets"]] == [None, "occlusion", "yaw"]
    assert found["sets"][0] == clean["sets"][0] and found["all_pairs"] == clean["all_pairs"]
    assert list(found["hardened"]) == ["occlusion", "yaw"]

    embedder = Embedder(bundle.load(place / "net"))
    pair_set = load_pairs(place / "set.bin")
    harden = Hardening("yaw", 3)
    images = [harden(read_image(image), i) for i, image in enumerate(pair_set.images)]
    e = embedder.embed(images).astype(np.float64)
    scores = (e[pair_set.pairs[:, 0]] * e[pair_set.pairs[:, 1]]).sum(1)
    expected = kfold_accuracy(scores, pair_set.same, np.repeat(np.arange(10), 6)).accuracy
    assert found["sets"][2]["accuracy"] == pytest.approx(expected)

    source = open_source(place / "faces")
    paths = [place / "faces" / source.name(i) for i in range(len(source))]
    e = embedder.embed([harden(read_image(p), i) for i, p in enumerate(paths)])
    i, j = np.triu_indices(len(paths), 1)
    same = np.array([paths[a].parent == paths[b].parent for a, b in zip(i, j, strict=True)])
    tar = tar_at_far((e @ e.T)[i, j], same, [0.1])[0].value
    assert found["hardened"]["yaw"]["tar"]["1e-1"] == pytest.approx(tar, abs=0.02)
    assert found["hardened"]["yaw"]["tar"] != clean["all_pairs"]["tar"]


def test_a_fixed_threshold_is_judged_on_the_set_and_on_its_groups(place, tmp_path, capsys):
    groups = tmp_path / "groups.csv"
    lines = [f"P{p},{'even' if p % 2 == 0 else 'odd'}" for p in range(PEOPLE)]
    groups.write_text("\n".join(["# who, group", *lines]))
    found = evaluate(place / "net", all_pairs=place / "faces", groups=groups)
    (judged,) = found.of(OneThresholdResult)
    (whole,) = found.of(AllPairsResult)
    assert set(judged.groups) == {"even", "odd"}
    at = judged.thresholds[0]
    assert at.far.value <= at.asked == 0.01
    assert at.tar.value == next(p.value for p in whole.tar if p.at == 0.01)
    assert sum(one.genuine for (one, *_) in judged.groups.values()) == whole.genuine
    shown = capsys.readouterr().out
    assert "even" in shown
    assert "one threshold" in shown
    groups.write_text("nobody,a\n")
    with pytest.raises(UserError, match=r"names no person and no image of the set; .*'P0'"):
        evaluate(place / "net", all_pairs=place / "faces", groups=groups)
    groups.write_text("P1\n")
    with pytest.raises(UserError, match=r"groups\.csv:1 must hold a person or an image, a comma"):
        evaluate(place / "net", all_pairs=place / "faces", groups=groups)
    groups.write_text("P1,a\nP1,b\n")
    with pytest.raises(UserError, match=r"groups\.csv:2 puts 'P1' into 'b', an earlier"):
        evaluate(place / "net", all_pairs=place / "faces", groups=groups)
    with pytest.raises(UserError, match="--groups belongs to --all-pairs"):
        evaluate(place / "net", pairs=[place / "set.bin"], groups=groups)
