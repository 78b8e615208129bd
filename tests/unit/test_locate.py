"""Which data set is found first, and that it is said."""

import cv2
import numpy as np
import pytest

from sphereface2.data import locate as module
from sphereface2.data import open_source
from sphereface2.data.locate import TrainingData, locate, pack_lfw
from sphereface2.data.recordio import RecordIOWriter
from sphereface2.data.verification import load_pairs
from sphereface2.errors import UserError


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A repository with nothing beside it, no variable set and no network."""
    repository = tmp_path / "home" / "repository"
    (repository / ".git").mkdir(parents=True)
    (repository / "deep").mkdir()
    monkeypatch.chdir(repository / "deep")
    monkeypatch.delenv(module.ENVIRONMENT, raising=False)
    monkeypatch.setattr(module, "_FETCH", "raise SystemExit('no route to host')")
    monkeypatch.setattr(module, "_SYNTHETIC_PEOPLE", 2)
    monkeypatch.setattr(module, "_SYNTHETIC_IMAGES", 1)
    monkeypatch.setattr(module, "_SYNTHETIC_PAIRS", 3)
    return repository


def records(folder, *, bins=()):
    folder.mkdir(parents=True)
    with RecordIOWriter(folder) as writer:
        writer.add(0, b"x")
    for name in bins:
        (folder / name).write_bytes(b"")
    return folder


def test_shared_data_beside_the_repository(place):
    shared = place.parent / "shared" / "data"
    records(shared / "faces")
    (shared / "raw" / "somebody").mkdir(parents=True)
    (shared / "raw" / "somebody" / "1.jpg").write_bytes(b"x")
    for name in ("agedb.bin", "lfw.bin", "lfw_pairs.txt"):
        (shared / name).write_bytes(b"")
    found = locate()
    assert found.kind == "shared"
    assert found.train == shared / "faces"
    assert found.pairs == [shared / "lfw.bin", shared / "agedb.bin"]
    assert found.names == shared / "lfw_pairs.txt"
    assert TrainingData.names_for(shared / "agedb.bin") is None
    assert not found.is_synthetic


def test_the_variable_wins_and_must_hold_something(place, tmp_path, monkeypatch):
    records(place.parent / "shared" / "data" / "faces")
    mine = records(tmp_path / "mine", bins=["cfp.bin"])
    monkeypatch.setenv(module.ENVIRONMENT, str(mine))
    found = locate()
    assert (found.kind, found.train, found.pairs) == ("environment", mine, [mine / "cfp.bin"])
    monkeypatch.setenv(module.ENVIRONMENT, str(tmp_path / "absent"))
    with pytest.raises(UserError, match="does not exist"):
        locate()
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv(module.ENVIRONMENT, str(tmp_path / "empty"))
    with pytest.raises(UserError, match="holds no training set"):
        locate()
    both = tmp_path / "both"
    records(both / "one")
    records(both / "two")
    monkeypatch.setenv(module.ENVIRONMENT, str(both))
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
    monkeypatch.setenv(module.ENVIRONMENT, str(root))
    assert locate().train == root / expected


def test_synthetic_when_nothing_else_and_loudly(place, capfd):
    found = locate()
    assert found.kind == "synthetic"
    assert found.is_synthetic
    assert found.train.is_relative_to(place / "runs" / "data")
    assert "no route to host" in found.note
    assert "SYNTHETIC" in found.note
    assert "nothing about real faces" in found.note
    assert "SYNTHETIC" in capfd.readouterr().err
    assert len(open_source(found.train)) == 2
    assert len(load_pairs(found.pairs[0], names=found.names)) == 60
    before = found.pairs[0].stat().st_mtime_ns
    assert locate(network=False).pairs[0].stat().st_mtime_ns == before  # kept, not drawn again


def test_a_resolver_that_does_not_answer_is_given_up(place, monkeypatch):
    monkeypatch.setattr(module, "_FETCH", "import time; time.sleep(60)")
    with pytest.raises(module._UnavailableError, match="no answer"):
        module._fetch_lfw(place / "cache", patience=0.5)


FETCH = """
import pathlib, shutil, sys
shutil.copytree({source!r}, pathlib.Path(sys.argv[1]) / "lfw_home")
"""


def test_lfw_trains_on_nobody_it_tests(place, monkeypatch):
    """A small LFW in scikit-learn's layout: 14 people in View 1's test pairs and 6 others."""
    source = place.parent / "lfw_source"
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
    found = locate()
    assert found.kind == "lfw"
    assert "not the usual 6,000" in found.note
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
