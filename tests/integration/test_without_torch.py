"""An exported model from photograph to answer: torch is not imported, nothing is reported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageEnhance
from serving import encoded, make_model, photograph, serving

from required import needs
from sphereface2.embedder import Embedder
from sphereface2.images import decode
from sphereface2.recognition.export import export
from sphereface2.recognition.face_embedder import FaceEmbedder

FORBID = """
import sys

class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision"):
            raise AssertionError(f"{name} was imported")

sys.meta_path.insert(0, Forbid())
"""
COMMAND = FORBID + "from sphereface2.cli import main; sys.exit(main())"


def run(*words: object, program: str = COMMAND, home: Path | None = None) -> str:
    """Standard output of the command in a process that cannot import torch."""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"} | ({} if home is None else {"HOME": str(home)}),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as trained and as exported, and two photographs of one face in a folder a person."""
    root = tmp_path_factory.mktemp("without-torch")
    model = make_model(root / "model")
    export(model, to="onnx", out=root / "model.onnx")
    shutil.copy(model / "calibration.json", root / "model.calibration.json")
    photo = Image.fromarray(decode(photograph()))
    for name, image in (("a", photo), ("b", ImageEnhance.Brightness(photo).enhance(0.6))):
        path = root / "photos" / name / f"{name}.jpg"
        path.parent.mkdir(parents=True)
        path.write_bytes(encoded(image))
    return root


def test_the_hook_forbids_torch() -> None:
    program = f"{FORBID}\ntry:\n    import torch\nexcept AssertionError as e:\n    print(e)"
    assert run(program=program) == "torch was imported\n"


def test_without_a_model_that_of_the_package_is_used(place: Path, tmp_path: Path) -> None:
    images = (place / "photos/a/a.jpg", place / "photos/b/b.jpg")
    found = json.loads(run("verify", *images, "--json"))
    assert found["decision"] == "same" and found["probability"] > 0.9
    run("embed", place / "photos", "--out", tmp_path / "f.parquet", "--device", "cpu")
    assert pq.read_table(tmp_path / "f.parquet").num_rows == 2
    run("gallery", "add", tmp_path / "g.db", "--folder", place / "photos")
    assert "a" in run("gallery", "search", tmp_path / "g.db", images[0])


def test_verify(place: Path) -> None:
    images = (place / "photos/a/a.jpg", place / "photos/b/b.jpg")
    found = json.loads(run("verify", *images, "--model", place / "model.onnx", "--json"))
    expected = FaceEmbedder.from_pretrained(place / "model").verify(*images)
    assert found["similarity"] == pytest.approx(expected.similarity, abs=1e-5)
    assert found["threshold"] == expected.threshold
    assert found["llr"] == pytest.approx(expected.llr, abs=1e-3)
    assert [face["box"] for face in found["faces"]] == [
        face.box.tolist() for face in expected.faces if face is not None
    ]
    assert "threshold for FAR" in run("verify", *images, "--model", place / "model.onnx")


def test_embed(place: Path, tmp_path: Path) -> None:
    run("embed", place / "model.onnx", place / "photos", "--out", tmp_path / "f.parquet")
    table = pq.read_table(tmp_path / "f.parquet")
    assert table["person"].to_pylist() == ["a", "b"]
    embedder = FaceEmbedder.from_pretrained(place / "model")
    expected = embedder.embed([place / "photos/a/a.jpg", place / "photos/b/b.jpg"])
    np.testing.assert_allclose(np.stack(table["embedding"].to_numpy()), expected, atol=1e-5)
    assert Embedder.load(place / "model.onnx").fingerprint == embedder.fingerprint


def test_gallery(place: Path, tmp_path: Path) -> None:
    model, photos = place / "model.onnx", place / "photos"
    run("gallery", "add", tmp_path / "g.db", "Eve", photos / "a/a.jpg", "--model", model)
    found = run("gallery", "search", tmp_path / "g.db", photos / "b/b.jpg", "--model", model)
    assert "Eve" in found
    program = (
        "import json; import sphereface2 as s; m, g, photo = sys.argv[1:]\n"
        "embedder = s.FaceEmbedder.from_pretrained(m)\n"
        "with s.Gallery.open(g, embedder=embedder) as gallery:\n"
        "    (found,) = gallery.search(embedder.embed([photo]), k=1)\n"
        "    print(found[0].person, found[0].score)\n"
    )
    words = run(model, tmp_path / "g.db", photos / "b/b.jpg", program=FORBID + program).split()
    same = FaceEmbedder.from_pretrained(model).verify(photos / "a/a.jpg", photos / "b/b.jpg")
    assert words[0] == "Eve" and float(words[1]) == pytest.approx(same.similarity, abs=1e-5)


def test_service(place: Path, tmp_path: Path) -> None:
    model = place / "model.onnx"
    paths = [place / "photos/a/a.jpg", place / "photos/b/b.jpg"]
    with serving(model, tmp_path / "g.db", program=("-c", COMMAND)) as server:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            files = [("images", path.read_bytes()) for path in paths]
            answer = client.post("/v1/embed", files=files)
            assert answer.status_code == 200, answer.text
            found = np.array([one["embedding"] for one in answer.json()["embeddings"]])
            person = client.post("/v1/people", data={"name": "Eve"}, files=files[:1])
            assert person.status_code == 201, person.text
        assert server.stop() == 0, server.log
    expected = FaceEmbedder.from_pretrained(place / "model").embed(paths)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def traced(log: Path, home: Path, words: list[str]) -> str:
    """The system calls of a command that create files below ``home`` or connect to a host."""
    home.mkdir()
    off = ("ORT_DISABLE_TELEMETRY", "CI")  # either of them keeps ONNX Runtime silent
    env = {key: value for key, value in os.environ.items() if key not in off}
    subprocess.run(
        ["strace", "-f", "-qq", "-e", "trace=connect,sendto,openat,mkdir,mkdirat", "-o", log]
        + [sys.executable, *words],
        env=env | {"HOME": str(home), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=True,
    )
    return "".join(
        line + "\n"
        for line in log.read_text().splitlines()
        if "AF_INET" in line or ("mkdir" in line and str(home) in line) or "onnxruntime.db" in line
    )


@needs(shutil.which("strace"), "strace is missing: apt install strace")
def test_onnx_runtime_writes_no_identifier_and_asks_no_host(place: Path, tmp_path: Path) -> None:
    images = [str(place / "photos" / name / f"{name}.jpg") for name in "ab"]
    words = ["-m", "sphereface2", "verify", *images, "--model", str(place / "model.onnx")]
    assert traced(tmp_path / "log", tmp_path / "home", words) == ""
    assert not list((tmp_path / "home").rglob("*"))
    if tuple(map(int, version("onnxruntime").split(".")[:2])) >= (1, 32):  # what it is that is off
        plain = f"import onnxruntime as o; o.InferenceSession({str(place / 'model.onnx')!r})"
        assert "onnxruntime.db" in traced(tmp_path / "plain", tmp_path / "other", ["-c", plain])
