"""What is trained on where nothing is named, and what can be fetched."""

import cv2
import numpy as np
import pytest

from sphereface2.data import fetch as module
from sphereface2.data import load_pairs, open_source
from sphereface2.data.fetch import fetch, pack_lfw
from sphereface2.data.locate import ENVIRONMENT, find, locate
from sphereface2.data.opening import names_beside
from sphereface2.data.recordio import RecordIOWriter
from sphereface2.errors import UserError


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """No variable set, no network, few faces drawn."""
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.setattr(module, "_FETCH", "raise SystemExit('no route to host')")
    monkeypatch.setattr(module, "_PEOPLE", 2)
    monkeypatch.setattr(module, "_IMAGES", 1)
    monkeypatch.setattr(module, "_PAIRS", 3)
    return tmp_path


def records(folder, *, bins=()):
    folder.mkdir(parents=True)
    with RecordIOWriter(folder) as writer:
        writer.add(0, b"x")
    for name in bins:
        (folder / name).write_bytes(b"")
    return folder


def test_without_a_variable_the_remedies_are_named(place, monkeypatch):
    (place / "repository").mkdir()
    records(place / "shared" / "data" / "faces")  # nobody named it
    monkeypatch.chdir(place / "repository")
    assert find() is None
    with pytest.raises(UserError, match=r"--data\.train PATH.*SPHEREFACE2_DATA.*fetch lfw"):
        locate()


def test_the_variable_names_a_folder_of_sets(place, monkeypatch):
    shared = place / "data"
    records(shared / "faces")
    (shared / "raw" / "somebody").mkdir(parents=True)
    (shared / "raw" / "somebody" / "1.jpg").write_bytes(b"x")
    for name in ("agedb.bin", "lfw.bin", "lfw_pairs.txt"):
        (shared / name).write_bytes(b"")
    monkeypatch.setenv(ENVIRONMENT, str(shared))
    found = locate()
    assert found == find()
    assert (found.kind, found.train) == ("environment", shared / "faces")
    assert found.pairs == [shared / "lfw.bin", shared / "agedb.bin"]
    assert found.names == shared / "lfw_pairs.txt"
    assert names_beside(shared / "lfw.BIN") == found.names
    assert names_beside(shared / "agedb.bin") is None
    assert not found.is_synthetic
    assert locate(str(shared / "faces")).kind == "given"  # what is named in the settings wins


def test_the_variable_must_hold_something(tmp_path, monkeypatch):
    mine = records(tmp_path / "mine", bins=["cfp.bin"])
    monkeypatch.setenv(ENVIRONMENT, str(mine))
    found = locate()
    assert (found.kind, found.train, found.pairs) == ("environment", mine, [mine / "cfp.bin"])
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "absent"))
    with pytest.raises(UserError, match="does not exist"):
        locate()
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "empty"))
    with pytest.raises(UserError, match="holds no training set"):
        locate()
    both = tmp_path / "both"
    records(both / "one")
    records(both / "two")
    monkeypatch.setenv(ENVIRONMENT, str(both))
    with pytest.raises(UserError, match=r"one, two"):
        locate()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["train.txt", "images/p/1.jpg"], "train.txt"),
        (["p/1.jpg", "q/2.png"], "."),
        (["images/p/1.jpg", "docs/readme.md"], "images"),
        (["list.tar"], "."),
        (["shards/0.tar", "other/p/1.jpg"], "shards"),
    ],
)
def test_layouts_of_a_given_folder(tmp_path, monkeypatch, files, expected):
    root = tmp_path / "given"
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    monkeypatch.setenv(ENVIRONMENT, str(root))
    assert locate().train == root / expected


def test_drawn_faces_say_what_they_are(place, monkeypatch, capfd):
    drawn = fetch("drawn", place / "drawn")
    assert "SYNTHETIC" in capfd.readouterr().out
    monkeypatch.setenv(ENVIRONMENT, str(drawn))
    for named in ("auto", str(drawn), str(drawn / "train.rec")):
        found = locate(named)
        assert found.is_synthetic and found.train in (drawn, drawn / "train.rec")
        assert "SYNTHETIC" in found.note and "nothing about real faces" in found.note
    assert len(open_source(drawn)) == 2
    found = locate()
    assert len(load_pairs(found.pairs[0], names=found.names)) == 60
    with pytest.raises(UserError, match="exists already"):
        fetch("drawn", drawn)
    other = open_source(fetch("drawn", place / "other", seed=1))
    assert other.fingerprint() != open_source(drawn).fingerprint()
    with pytest.raises(UserError, match="--seed is that of drawn faces"):
        fetch("lfw", place / "lfw", seed=1)


def test_what_cannot_be_fetched_is_said(place, monkeypatch):
    before = sorted(place.iterdir())
    for target in ("lfw", "new/folder/lfw"):
        with pytest.raises(UserError, match="LFW could not be fetched: no route to host"):
            fetch("lfw", place / target)
    assert sorted(place.iterdir()) == before
    with pytest.raises(UserError, match="choose lfw or drawn"):
        fetch("webface", place / "lfw")
    monkeypatch.setattr(module, "_FETCH", "import time; time.sleep(60)")
    with pytest.raises(UserError, match="no answer"):
        module._download_lfw(place / "cache", patience=0.5)


FETCH = """
import pathlib, shutil, sys
shutil.copytree({source!r}, pathlib.Path(sys.argv[1]) / "lfw_home")
"""


def test_lfw_trains_on_nobody_it_tests(place, monkeypatch):
    """A small LFW in scikit-learn's layout: 14 people in View 1's test pairs and 6 others."""
    source = place / "lfw_source"
    people = [f"Person_{letter}" for letter in "ABCDEFGHIJKLMNOPQRST"]
    for number, person in enumerate(people):
        folder = source / "lfw_funneled" / person
        folder.mkdir(parents=True)
        for i in range(1, 4):
            image = np.full((250, 250, 3), 12 * number + i, np.uint8)
            cv2.imwrite(str(folder / f"{person}_{i:04d}.jpg"), image)
    tested, others = people[:14], people[14:]
    matched = [f"{tested[i % 10]}\t1\t{2 + i // 10}" for i in range(20)]
    mismatched = [f"{tested[i % 14]}\t1\t{tested[(i + 3) % 14]}\t{1 + i // 14}" for i in range(20)]
    (source / "pairsDevTest.txt").write_text("\n".join(["20", *matched, *mismatched]))
    (source / "pairsDevTrain.txt").write_text("")
    monkeypatch.setattr(module, "_FETCH", FETCH.format(source=str(source)))
    monkeypatch.setenv(ENVIRONMENT, str(fetch("lfw", place / "lfw")))
    found = locate()
    assert "not the usual 6,000" in found.note and not found.is_synthetic
    train = open_source(found.train)
    assert len(train) == 3 * len(others)
    assert train.num_classes == len(others)
    pairs = load_pairs(found.pairs[0], names=found.names)
    assert np.bincount(pairs.folds).tolist() == [4] * 10
    assert all(pairs.same[pairs.folds == fold].sum() == 2 for fold in range(10))
    assert {person_of(image) for image in pairs.images} <= set(range(14))
    assert {person_of(train.read(i)) for i in range(len(train))} == set(range(14, 20))
    (source / "pairsDevTest.txt").write_text("30\nA\t1\t2\n")
    with pytest.raises(UserError, match=r"expected 30 \+ 30"):
        pack_lfw(source / "lfw_funneled", source / "pairsDevTest.txt", place / "x")


def person_of(data):
    """Picture i of person n is a plain 12 n + i."""
    mean = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR).mean()
    return round((mean - 2) / 12)
