"""`sphereface2 data audit`: planted copies, what a cleaned set holds, the command as a process."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from sphereface2 import backbones
from sphereface2.backbones import bundle
from sphereface2.data import synthetic
from sphereface2.data.opening import open_source
from sphereface2.errors import UserError
from sphereface2.images import decode
from sphereface2.recognition.audit.clean import cleaned, write_set
from sphereface2.recognition.audit.duplicates import find_duplicates
from sphereface2.recognition.audit.findings import Finding, read_findings, write_findings
from sphereface2.recognition.measures import measures


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


def command(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sphereface2", "data", "audit", *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=250,
    )


def test_the_command_reports_and_writes_a_list_without_what_it_found(
    faces: Path, model: Path, tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in faces.rglob("*.*")}
    out, clean = tmp_path / "audit", tmp_path / "clean"
    ran = command(
        faces, "--model", model, "--out", out, "--write", clean, "--device", "cpu", "--json"
    )
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
    chosen = cleaned(source, read_findings(tmp_path / "f.csv"))
    write_set(chosen, tmp_path / "list")
    left = open_source(tmp_path / "list")
    assert left.num_classes == 10 and len(left) == len(source) - 1
    assert left.class_names == [f"person{i:02d}" for i in range(12) if i not in (2, 4)]
    person = {left.name(i): left.class_names[left.labels[i]] for i in range(len(left))}
    assert person[str(faces / source.name(first[4]))] == "person01"
    assert person[str(faces / source.name(first[6]))] == "person09"
    assert str(faces / source.name(first[0])) not in person
    with pytest.raises(UserError, match="another set"):
        cleaned(source, [finding(first[0], image="x.jpg", action="remove")])


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
    pairs = {(one.first, one.second): one.exact for one in found}
    for number, original in enumerate(copies, len(images)):
        assert pairs.pop((original, number)) is (original == 30)
    assert len(pairs) <= 2  # drawn people may be as good as equal
