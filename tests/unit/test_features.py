"""`sphereface2 embed`: rows against a direct computation, parts, refusals, what is left out."""

from __future__ import annotations

import csv
import errno
import json
import os
import socket
import sys
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.data import astronaut

from sphereface2 import backbones
from sphereface2.align import Aligner, Face, NoFaceError
from sphereface2.backbones import bundle
from sphereface2.data import synthetic
from sphereface2.data.opening import open_source
from sphereface2.errors import UserError
from sphereface2.images import read_image
from sphereface2.recognition import feature_parts, features
from sphereface2.recognition.face_embedder import FaceEmbedder
from sphereface2.recognition.feature_parts import Job, open_images
from sphereface2.recognition.features import embed_set


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), 0)


def make_model(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    net = backbones.build("sfnet4", width=0.125, input_size=32, embedding_dim=16, batch_norm=True)
    bundle.save(net, folder)
    return folder


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write(
        tmp_path_factory.mktemp("faces") / "set", people=6, images_per_person=5, pairs_per_fold=2
    )


def pictures(root: Path, names: list[str]) -> Path:
    rng = np.random.default_rng(0)
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), rng.integers(0, 256, (40, 40, 3), np.uint8))
    return root


def matrix(path: Path, column: str = "embedding") -> np.ndarray:
    table = pq.read_table(path)
    return table[column].combine_chunks().flatten().to_numpy().reshape(len(table), -1)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_are_the_embedder_s_in_the_order_of_the_set(
    model: Path, faces: Path, tmp_path: Path, dtype: str
) -> None:
    out = tmp_path / "f.parquet"
    report = embed_set(
        str(model), faces, out=out, aligned=True, dtype=dtype, device="cpu", batch_size=7
    )
    assert (report["images"], report["embedded"], report["skipped"]) == (30, 30, 0)
    source = open_source(faces)
    embedder = FaceEmbedder.from_pretrained(model, device="cpu", batch_size=7)
    expected = embedder.embed([source.read(i) for i in range(30)], aligned=True)
    found = matrix(out)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, expected.astype(dtype))
    table = pq.read_table(out)
    assert table["name"].to_pylist() == [source.name(i) for i in range(30)]
    assert table["label"].to_pylist() == source.labels.tolist()
    told = json.loads(table.schema.metadata[feature_parts.METADATA])
    assert told["model"] == embedder.fingerprint
    assert (told["embedding_dim"], told["flip"], told["dtype"]) == (16, True, dtype)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.parquet"]


class TopAligner:
    """Crops the upper half; a picture whose first pixel is black shows no face."""

    name = "top"

    def align(self, image: object) -> tuple[np.ndarray, Face]:
        pixels = read_image(image)  # type: ignore[arg-type]
        if not pixels[0, 0].any():
            raise NoFaceError("no face found in the picture")
        box = np.array([0, 0, pixels.shape[1], pixels.shape[0] // 2], np.float32)
        return np.ascontiguousarray(pixels[: pixels.shape[0] // 2]), Face(
            box, 0.5, np.zeros((5, 2), np.float32)
        )


def test_every_face_of_a_photograph(model: Path, tmp_path: Path) -> None:
    face = astronaut()[:300, 50:400, ::-1]
    small = np.zeros_like(face)
    small[:210, :245] = cv2.resize(face, (245, 210))
    pictures = {
        "ann/1": np.concatenate([small, face], axis=1),
        "ann/2": np.full((90, 90, 3), 77, np.uint8),
        "bob/3": face,
    }
    for name, picture in pictures.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / f"{name}.png"), picture)
    out = tmp_path / "out.parquet"
    report = embed_set(str(model), tmp_path, out=out, faces="all", device="cpu")
    assert (report["images"], report["embedded"], report["skipped"]) == (3, 3, 1)
    table = pq.read_table(out)
    assert table["name"].to_pylist() == ["ann/1.png", "ann/1.png", "bob/3.png"]
    # Which of the two faces the set calls ann it does not say.
    assert table["person"].to_pylist() == [None, None, "bob"]
    assert table["label"].to_pylist() == [None, None, 1]
    aligner = Aligner()
    found = [*aligner.align_all(tmp_path / "ann/1.png"), *aligner.align_all(tmp_path / "bob/3.png")]
    assert found[0][1].box[0] > 350 > found[1][1].box[2]  # the larger face comes first
    np.testing.assert_allclose(matrix(out, "box"), [face.box for _, face in found])
    rows = FaceEmbedder.from_pretrained(model, device="cpu").embed(
        [crop for crop, _ in found], aligned=True
    )
    np.testing.assert_allclose(matrix(out), rows, atol=1e-6)
    with pytest.raises(UserError, match=r"holds the features of another run \(other faces\)"):
        embed_set(str(model), tmp_path, out=out, device="cpu")


def test_what_cannot_be_embedded_is_listed_and_the_rest_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{person}/{i}.png" for person in ("Ann", "Bo") for i in range(4)]
    root = pictures(tmp_path / "set", names)
    (root / "Ann/1.png").write_bytes(b"text")
    (root / "Bo/3.png").write_bytes(b"")
    cv2.imwrite(str(root / "Bo/0.png"), np.zeros((40, 40, 3), np.uint8))
    monkeypatch.setattr("sphereface2.recognition.face_embedder.Aligner", TopAligner)
    out = tmp_path / "f.parquet"
    report = embed_set(str(model), root, out=out, device="cpu", batch_size=1)
    assert (report["embedded"], report["skipped"]) == (5, 3)
    rows = list(csv.reader((tmp_path / "f.parquet.skipped.csv").open()))
    assert [row[0] for row in rows] == ["name", "Ann/1.png", "Bo/0.png", "Bo/3.png"]
    assert [bool(row[1]) for row in rows] == [True] * 4 and "no face" in rows[2][1]
    table = pq.read_table(out)
    kept = ["Ann/0.png", "Ann/2.png", "Ann/3.png", "Bo/1.png", "Bo/2.png"]
    assert table["name"].to_pylist() == kept
    assert table["person"].to_pylist() == ["Ann"] * 3 + ["Bo"] * 2
    np.testing.assert_array_equal(matrix(out, "box"), [[0, 0, 40, 20]] * 5)
    embedder = FaceEmbedder.from_pretrained(model, device="cpu", batch_size=1)
    np.testing.assert_array_equal(matrix(out), embedder.embed([root / name for name in kept]))


def test_nothing_embedded_is_an_error_that_says_where_to_look(model: Path, tmp_path: Path) -> None:
    root = tmp_path / "set" / "Ann"
    root.mkdir(parents=True)
    for name in ("a.jpg", "b.jpg"):
        (root / name).write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"none of 2 images .*f\.parquet\.skipped\.csv"):
        embed_set(str(model), root.parent, out=tmp_path / "f.parquet", aligned=True, device="cpu")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.parquet.skipped.csv", "set"]


def test_a_folder_of_pictures_needs_no_people(model: Path, tmp_path: Path) -> None:
    root = pictures(tmp_path / "set", ["b.png", "a.jpg", "below/c.png"])
    (root / "notes.txt").write_text("not a list")
    assert open_images(root).name(0) == "a.jpg"
    embed_set(str(model), root, out=tmp_path / "f.parquet", aligned=True, device="cpu")
    table = pq.read_table(tmp_path / "f.parquet")
    assert table["name"].to_pylist() == ["a.jpg", "b.png", "below/c.png"]
    assert table["label"].null_count == table["person"].null_count == 3


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes there alone")
def test_names_that_are_not_utf_8(model: Path, tmp_path: Path) -> None:
    root = pictures(tmp_path / "set", ["Ann/a.png"])
    image = (root / "Ann/a.png").read_bytes()
    for name, content in ((b"caf\xe9.png", image), (b"caf\xe8.png", b"no picture")):
        Path(os.fsdecode(os.fsencode(root / "Ann") + b"/" + name)).write_bytes(content)
    embed_set(str(model), root, out=tmp_path / "f.parquet", aligned=True, device="cpu")
    table = pq.read_table(tmp_path / "f.parquet")
    assert table["name"].to_pylist() == ["Ann/a.png", r"Ann/caf\udce9.png"]
    assert r"Ann/caf\udce8.png," in (tmp_path / "f.parquet.skipped.csv").read_text("utf-8")


def test_a_file_that_cannot_be_written_is_named(
    model: Path, faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(feature_parts, "atomic_write", full)
    with pytest.raises(UserError, match=r"f\.parquet cannot be written: No space left"):
        embed_set(str(model), faces, out=tmp_path / "f.parquet", aligned=True, device="cpu")


def test_a_cluster_that_does_not_answer_is_told_of_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = "{}:{}".format(*server.getsockname())
        features._check_answers(address)
        features._check_answers(f"ray://{address}")
        features._check_answers("auto")
    for nobody in (address, f"ray://{address}", "127.0.0.1:99999"):
        with pytest.raises(UserError, match=f"no Ray cluster answers at {nobody}"):
            features._check_answers(nobody)


def test_a_run_goes_on_with_the_parts_it_has(
    model: Path, faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"aligned": True, "device": "cpu", "batch_size": 2}
    monkeypatch.setattr(feature_parts, "_BATCHES", {True: 3, False: 3})  # 30 pictures, 5 parts
    embed_set(str(model), faces, out=tmp_path / "whole.parquet", **options)  # type: ignore[arg-type]

    computed: list[int] = []
    compute = Job.compute

    def stop_in_the_third(self: Job, *args: object, **kwargs: object) -> bytes:
        number = args[2]
        assert isinstance(number, int)
        computed.append(number)
        if computed.count(2) == 1 and number == 2:
            raise KeyboardInterrupt
        return compute(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Job, "compute", stop_in_the_third)
    out = tmp_path / "f.parquet"
    with pytest.raises(KeyboardInterrupt):
        embed_set(str(model), faces, out=out, **options)  # type: ignore[arg-type]
    assert not out.exists()
    # Another model, other settings or another input must not be mixed in.
    (tmp_path / "other").mkdir()
    other = make_model(tmp_path / "other", 1)
    with pytest.raises(UserError, match=r"\(other model\):"):
        embed_set(str(other), faces, out=out, **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"\(other flip\):"):
        embed_set(str(model), faces, out=out, flip=False, **options)  # type: ignore[arg-type]
    more = synthetic.write(tmp_path / "more", people=5, images_per_person=6, pairs_per_fold=2)
    with pytest.raises(UserError, match=r"\(other input\):"):
        embed_set(str(model), more, out=out, **options)  # type: ignore[arg-type]
    computed[:] = [2]
    embed_set(str(model), faces, out=out, **options)  # type: ignore[arg-type]
    assert computed == [2, 2, 3, 4]
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    # Once more: it is there, and nothing is computed; but not with another setting.
    embed_set(str(model), faces, out=out, **options)  # type: ignore[arg-type]
    assert computed == [2, 2, 3, 4]
    with pytest.raises(UserError, match=r"\(other dtype\):"):
        embed_set(str(model), faces, out=out, dtype="float16", **options)  # type: ignore[arg-type]


@given(images=st.integers(1, 500), batch_size=st.integers(1, 64), aligned=st.booleans())
@settings(max_examples=100, deadline=None)
def test_parts_cover_every_picture_once(images: int, batch_size: int, aligned: bool) -> None:
    aligner = None if aligned else "x"
    job = Job(Path(), images, "", "", 1, aligner, True, "float32", batch_size)
    rows = [index for number in job.parts for index in job.rows(number)]
    assert rows == list(range(images))
    assert all(len(job.rows(number)) % batch_size == 0 for number in job.parts[:-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "--dtype must be one of 'float32', 'float16'"),
        ({"engine": "spark"}, "--engine must be one of 'local', 'ray'"),
        ({"batch_size": 0}, "--batch-size"),
        ({"ray_address": "auto"}, "--engine ray"),
        ({"out": Path("x.csv")}, r"writes Parquet: name it x\.parquet"),
    ],
)
def test_wrong_options(
    model: Path, faces: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        embed_set(str(model), faces, **{"out": tmp_path / "f.parquet", **options})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--out"):
        embed_set(str(model), faces, out=tmp_path / "no" / "f.parquet")
