"""`sphereface2 data audit`: planted copies, what a cleaned set holds, the command as a process."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from sphereface2 import backbones
from sphereface2.backbones import bundle
from sphereface2.data import synthetic
from sphereface2.data.locate import ABOUT, DRAWN, locate
from sphereface2.data.opening import open_source
from sphereface2.data.source import Source
from sphereface2.errors import UserError
from sphereface2.evaluation.label_errors import AlikeLabels
from sphereface2.images import decode
from sphereface2.recognition.audit.cluster import PEOPLE, cluster, read_people
from sphereface2.recognition.audit.commands import audit
from sphereface2.recognition.audit.duplicates import Duplicate, find_duplicates
from sphereface2.recognition.audit.findings import (
    Finding,
    cleaned,
    read_findings,
    write_findings,
    write_set,
)
from sphereface2.recognition.audit.judge import _duplicates, _same_people
from sphereface2.recognition.face_embedder import FaceEmbedder
from sphereface2.recognition.feature_parts import Job, measures, open_images
from sphereface2.signals import STOPPED


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve people of four images in folders; one image a second time, and one damaged."""
    root = tmp_path_factory.mktemp("faces") / "set"
    for number in range(12):
        folder = root / f"person{number:02d}"
        folder.mkdir(parents=True)
        for i, image in enumerate(synthetic.person(0, number, 4)):
            (folder / f"{i}.jpg").write_bytes(image)
    pixels = cv2.imread(str(root / "person03" / "1.jpg"))
    cv2.imwrite(str(root / "person03" / "again.png"), pixels)
    cv2.imwrite(str(root / "person05" / "mirrored.jpg"), pixels[:, ::-1], [1, 60])
    (root / "person07" / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    net = backbones.build("sfnet4", width=0.25, input_size=64, embedding_dim=32, batch_norm=True)
    bundle.save(net, folder)
    return folder


@pytest.fixture(scope="module")
def crops(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images in one folder, which knows no people."""
    root = tmp_path_factory.mktemp("crops")
    (root / ABOUT).write_text(f"{DRAWN} faces\n")
    for path in sorted(faces.rglob("*.*")):
        (root / f"{path.parent.name}-{path.name}").write_bytes(path.read_bytes())
    return root


def words(*given: object) -> dict[str, Any]:
    return {
        "args": [sys.executable, "-m", "sphereface2", "data", *map(str, given), "--device", "cpu"],
        "env": {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        "text": True,
    }


def command(*given: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(**words(*given), capture_output=True, timeout=250)


def test_the_command_reports_and_writes_a_list_without_what_it_found(
    faces: Path, model: Path, tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in faces.rglob("*.*")}
    out, clean = tmp_path / "audit", tmp_path / "clean"
    ran = command("audit", faces, "--model", model, "--out", out, "--write", clean, "--json")
    assert ran.returncode == 0, ran.stderr
    summary = json.loads(ran.stdout)
    assert summary["images"] == 51 and summary["people"] == 12
    assert summary == json.loads((out / "summary.json").read_text()) | {
        "written": summary["written"]
    }
    with (out / "findings.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    by_kind = {row["kind"]: row for row in rows}
    assert by_kind["unreadable"]["image"] == "person07/broken.jpg"
    assert by_kind["duplicate"]["image"] == "person03/again.png"
    assert float(by_kind["duplicate"]["score"]) == 1
    across = {
        f"{row['image']} {row['about']}" for row in rows if row["kind"] == "duplicate across labels"
    }
    assert any("person05/mirrored.jpg" in text and "person03/" in text for text in across)
    html = (out / "report.html").read_text()
    assert html.count("data:image/jpeg;base64,") == len(rows)
    assert "person07/broken.jpg" in html and (out / "sheets" / "duplicate.jpg").exists()
    left = open_source(clean)
    assert (
        len(left)
        == summary["written"]["images"]
        == 51 - len({row["index"] for row in rows if row["action"] == "remove"})
    )
    names = {left.name(i) for i in range(len(left))}
    assert str(faces / "person00" / "0.jpg") in names and left.class_names is not None
    assert not any(name.endswith(("again.png", "broken.jpg")) for name in names)
    assert {path: path.read_bytes() for path in faces.rglob("*.*")} == before


def finding(index: int, other: int = -1, *, image: str = "", action: str) -> Finding:
    kind = "same person" if action == "merge" else "wrong label"
    return Finding(kind, index, image, "", other, "", 0.5, action)


def test_a_cleaned_set_merges_moves_and_removes(faces: Path, tmp_path: Path) -> None:
    source = open_source(faces)
    first = [int(np.flatnonzero(source.labels == label)[0]) for label in range(12)]
    found = [
        finding(1, 2, action="merge"),
        finding(2, 4, action="merge"),
        finding(first[0], image=source.name(first[0]), action="remove"),
        finding(first[6], 9, image=source.name(first[6]), action="move"),
        finding(first[8], image=source.name(first[8]), action="keep"),
    ]
    write_findings(tmp_path / "f.csv", found)
    chosen = cleaned(source, read_findings(tmp_path / "f.csv", source))
    write_set(chosen, tmp_path / "list")
    left = open_source(tmp_path / "list")
    assert left.num_classes == 10 and len(left) == len(source) - 1
    assert left.class_names == [f"person{i:02d}" for i in range(12) if i not in (2, 4)]
    person = {left.name(i): left.class_names[left.labels[i]] for i in range(len(left))}
    assert person[str(faces / source.name(first[4]))] == "person01"
    assert person[str(faces / source.name(first[6]))] == "person09"
    assert str(faces / source.name(first[0])) not in person


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([{"image": "x.jpg"}], "line 2: the finding about 'x.jpg' is of another set"),
        ([{"action": "move"}], "line 2: move needs a label in the column other"),
        ([{"action": "move", "other": ""}], "move needs a label in the column other"),
        ([{"action": "move", "other": "12"}], "from 0 to below 12, got 12"),
        ([{"other": "person3"}], r"or a person's name, got 'person3' \(did you mean 'person03'"),
        ([{"action": "move", "other": "007"}], "or a person's name, got '007'"),
        (
            [{"kind": "same person", "image": "", "action": "keep", "label": "x"}],
            "the finding about 'x' is of another set",
        ),
        ([{"index": "x"}], "line 2: index must be a number, got 'x'"),
        ([{"action": "merge", "other": 1}], "must be one of keep, remove, move, got 'merge'"),
        ([{"kind": "duplicate", "action": "move", "other": 1}], "must be one of keep, remove, got"),
        ([{}, {"action": "keep"}], "line 3 says keep of 'person00/0.jpg' and an earlier line says"),
        (
            [{"action": "move", "other": 1}, {"kind": "quality", "action": "move", "other": 2}],
            "line 3 says move to 2 .* earlier line says move to 1",
        ),
    ],
)
def test_edited_findings_that_cannot_be_applied(
    faces: Path, tmp_path: Path, edits: list[dict[str, Any]], message: str
) -> None:
    source = open_source(faces)
    line = vars(finding(0, image=source.name(0), action="remove"))
    write_findings(tmp_path / "f.csv", [Finding(**line | edit) for edit in edits])
    with pytest.raises(UserError, match=message):
        read_findings(tmp_path / "f.csv", source)


def test_a_finding_names_a_person_as_it_names_a_label(faces: Path, tmp_path: Path) -> None:
    source = open_source(faces)
    line = vars(finding(0, image=source.name(0), action="move"))
    edits: list[Any] = ["person03", " person11 ", 4]
    for other, label in zip(edits, (3, 11, 4), strict=True):
        write_findings(tmp_path / "f.csv", [Finding(**line | {"other": other})])
        assert [one.other for one in read_findings(tmp_path / "f.csv", source)] == [label]


def test_copies_are_found_cropped_mirrored_and_encoded_anew() -> None:
    images = [decode(data) for number in range(17) for data in synthetic.person(1, number, 2)]
    copies = {
        3: cv2.imdecode(cv2.imencode(".jpg", images[3], [1, 40])[1], 1),
        10: np.ascontiguousarray(images[10][:, ::-1]),
        21: cv2.resize(images[21][4:108, 6:110], (112, 112)),
        30: images[30].copy(),
    }
    everything = [*images, *copies.values()]
    rows = np.ones((len(everything), 4), np.float32) / 2  # of a network that knows nothing
    found = find_duplicates(
        rows,
        np.stack([np.frombuffer(measures(0, i, None)["thumbnail"], np.uint8) for i in everything]),
        np.array([measures(0, i, None)["pixels"] for i in everything]),
    )
    pairs = {(one.first, one.second): one.score == 1 for one in found}
    for number, original in enumerate(copies, len(images)):
        assert pairs.pop((original, number)) is (original == 30)
    assert len(pairs) <= 2  # drawn people may be as good as equal


def test_of_the_copies_of_a_photograph_one_stays_where_it_fits_best() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2, 3])
    faces = SimpleNamespace(
        source=SimpleNamespace(labels=labels, name=str),
        index=np.arange(7),
        labels=labels,
        whose=lambda row: str(labels[row]),
    )
    wrong = np.array([0, 0, 0, 0, 0.9, 0.9, 0], np.float32)
    scores = SimpleNamespace(
        wrong=wrong, own=np.array([0.3, 0.9, 0.6, 0.2, 0.8, 0.8, np.nan], np.float32)
    )
    chain = [Duplicate(0, 1, 0.99), Duplicate(1, 2, 0.98)]
    alone = [Duplicate(4, 5, 1.0), Duplicate(5, 6, 0.99)]

    def gone(found: list[Duplicate], merged: set[tuple[int, int]]) -> dict[int, int]:
        return {f.index: f.other for f in _duplicates(faces, found, scores, merged)}  # type: ignore[arg-type]

    # Image 1 fits label 0 well because its copy, image 0, is there too.
    assert gone(chain, set()) == {0: 2, 1: 2}
    assert gone(chain, {(0, 1)}) == {1: 0, 2: 0}
    assert gone(alone, set()) == {4: 6, 5: 6}


def test_an_audit_that_was_stopped_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faces = synthetic.write(tmp_path / "set", people=20, images_per_person=16, pairs_per_fold=2)
    out = tmp_path / "audit"
    parts = out / ".embeddings.parquet.parts"
    given = words("audit", faces, "--model", model, "--out", out, "--batch-size", 1)
    with subprocess.Popen(**given, stderr=subprocess.PIPE) as process:
        while process.poll() is None and len(list(parts.glob("0*.parquet"))) < 2:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        told = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGINT and STOPPED in told
    kept = {int(path.stem) for path in parts.glob("0*.parquet")}
    assert 2 <= len(kept) < 10 and not (out / "findings.csv").exists()
    done: list[int] = []
    compute = Job.compute

    def counted(
        job: Job, embedder: FaceEmbedder, source: Source, number: int, **more: Any
    ) -> bytes:
        done.append(number)
        return compute(job, embedder, source, number, **more)

    monkeypatch.setattr(Job, "compute", counted)
    given_again: Any = {"model": str(model), "batch_size": 1, "device": "cpu"}
    assert audit(faces, out=out, write=tmp_path / "clean", **given_again)["images"] == 320
    assert locate(str(tmp_path / "clean" / "train.rec")).is_synthetic  # as the set it was made of
    assert done == sorted(set(range(10)) - kept) and (out / "findings.csv").exists()


def test_a_set_without_labels_is_audited(crops: Path, model: Path, tmp_path: Path) -> None:
    clean = tmp_path / "clean"
    summary = audit(crops, out=tmp_path / "out", model=str(model), write=clean, device="cpu")
    assert summary["findings"]["unreadable"] == 1 and summary["findings"]["duplicate"] >= 2
    assert summary["findings"]["wrong label"] == summary["findings"]["same person"] == 0
    assert len(open_source(clean)) <= 51 - 3 and locate(str(clean)).is_synthetic


def test_clusters_are_edited_and_written(crops: Path, model: Path, tmp_path: Path) -> None:
    out, given = tmp_path / "out", ("--model", model, "--threshold", 0.97)
    ran = command("cluster", crops, *given, "--out", out, "--json")
    assert ran.returncode == 0, ran.stderr
    summary = json.loads(ran.stdout)
    assert (summary["images"], summary["left_out"]) == (51, 1)
    lines = [line for line in (out / PEOPLE).read_text().splitlines() if line[:1] not in ("", "#")]
    heads = [line for line in lines if line.startswith("==")]
    numbers = [int(line.split("\t")[0]) for line in lines if not line.startswith("==")]
    source = open_images(crops)
    assert sorted(numbers) == [i for i in range(51) if "broken" not in source.name(i)]
    assert len(heads) == summary["people"] + ("== -" in heads) and summary["people"] > 1
    sheets = {path.stem for path in (out / "people").iterdir()}
    assert sheets == {head[3:] for head in heads} - {"-"}
    assert (out / "people.html").read_text().count("<img") == len(sheets)
    # The same person's copies are one person for any network.
    chosen = read_people(out / PEOPLE, source)
    person = {source.name(i): label for i, label in zip(chosen.index, chosen.labels, strict=True)}
    assert person["person03-1.jpg"] == person["person03-again.png"]

    kept = [line for line in lines if line[:1].isdigit()]
    again = "Zoe\u0308"  # the same name in two letters
    text = ["== Zoë", *kept[:3], "== A b", *kept[3:5], f"== {again}", kept[7], "== -", *kept[8:]]
    (out / PEOPLE).write_text("\n".join(text), encoding="utf-8")
    with pytest.raises(UserError, match="was edited"):
        cluster(crops, out=out, model=str(model), threshold=0.97, device="cpu")
    assert (out / PEOPLE).read_text(encoding="utf-8") == "\n".join(text)
    for to in ("folder", "recordio"):
        cluster(crops, apply=out / PEOPLE, write=tmp_path / to, to=to, device="cpu")
        left = open_source(tmp_path / to)
        assert locate(str(tmp_path / to)).is_synthetic
        assert left.class_names == ["A b", "Zoë"]
        assert np.bincount(left.labels).tolist() == [2, 4]
        first = (crops / kept[3].split("\t")[1]).read_bytes()
        assert left.read(int(np.flatnonzero(left.labels == 0)[0])) == first


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("== a\n0\tx.jpg", "line 2: the set has no image 0 'x.jpg'"),
        ("== a\n0\tperson00-0.jpg\n== b\n0\tperson00-0.jpg", "line 4: image 0 stands"),
        ("0\tperson00-0.jpg", "line 1: neither"),
        (f"== {'n' * 300}\n0\tperson00-0.jpg", "can name no folder, as it has 300 bytes"),
        ("== ../b\n0\tperson00-0.jpg", "can name no folder"),
        ("== -\n0\tperson00-0.jpg", "no image to a person"),
    ],
)
def test_a_file_of_people_that_says_something_else(
    text: str, message: str, crops: Path, tmp_path: Path
) -> None:
    (tmp_path / PEOPLE).write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        read_people(tmp_path / PEOPLE, open_images(crops))


def test_a_folder_without_images_is_told_where_they_may_lie(tmp_path: Path) -> None:
    (tmp_path / "set" / "empty").mkdir(parents=True)
    for place in (tmp_path / "set", tmp_path / "set" / "empty"):
        with pytest.raises(UserError, match=r"holds no images .* in it or in folders below it"):
            open_images(place)


def test_labels_are_merged_where_they_are_alike_and_share_a_photograph() -> None:
    labels = np.repeat(np.arange(4), 2)
    faces = SimpleNamespace(person=str)
    scores = SimpleNamespace(wrong=np.zeros(8, np.float32))
    alike = AlikeLabels(
        np.array([[0, 1], [2, 3], [0, 2]]),
        np.array([0.9, 0.8, 0.6], np.float32),
        np.array([0.01, 0.05, 0.6]),
    )
    copies = [Duplicate(0, 2, 1.0), Duplicate(1, 4, 1.0)]
    found = list(_same_people(faces, np.arange(4), labels, scores, alike, copies, 0.1))  # type: ignore[arg-type]
    assert [(f.index, f.other, f.action) for f in found] == [(0, 1, "merge"), (2, 3, "keep")]
    assert "about 5 are not" in found[1].about
