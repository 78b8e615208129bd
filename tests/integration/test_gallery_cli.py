"""The commands of `sphereface2 gallery`, from pictures to an answer and from model to model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from sphereface2 import backbones
from sphereface2.backbones import bundle
from sphereface2.cli import app
from sphereface2.errors import UserError
from sphereface2.recognition.embedder import FaceEmbedder

pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")


def run(*words: object) -> Result:
    result = CliRunner().invoke(app, ["gallery", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def answer(*words: object) -> list[dict]:
    return json.loads(run("search", *words, "--json", "--aligned").stdout)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and three people with two pictures each, in turn alike."""
    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    for name in ("old", "new"):
        (root / name).mkdir()
        network = backbones.create("sfnet4", width=0.25, input_size=64, batch_norm=True)
        bundle.save(network, root / name)
    rng = np.random.default_rng(0)
    for person in ("ann", "bob", "eve"):
        face = rng.integers(0, 256, (112, 112, 3))
        (root / "faces" / person).mkdir(parents=True)
        for i in range(2):
            noisy = np.clip(face + rng.integers(-9, 10, face.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(root / "faces" / person / f"{i}.png")
    return root


def test_from_pictures_to_an_answer_and_to_another_model(world: Path, tmp_path: Path) -> None:
    gallery, faces, old = tmp_path / "g", tmp_path / "faces", ["--model", world / "old"]
    for person in ("ann", "bob"):
        (faces / person).mkdir(parents=True)
        copied = (world / "faces" / person / "0.png").read_bytes()
        (faces / person / "0.png").write_bytes(copied)
    (faces / "ann" / "notes.txt").write_text("no picture")
    (faces / "bob" / "torn.png").write_bytes(b"\x89PNG")
    added = run("add", gallery, "--folder", faces, *old, "--aligned")
    assert "2 pictures of 2 people" in added.stdout and "torn.png" in added.stderr
    run(
        "add", gallery, "ann", world / "faces/ann/1.png", *old, "--aligned", "--metadata", '{"a":1}'
    )

    probe = world / "faces/ann/0.png"
    (found,) = answer(gallery, probe, *old, "--threshold", 0.999, "-k", 2)
    assert found["person"] == "ann" and found["matches"][0]["metadata"] == {"a": 1}
    assert [m["person"] for m in found["matches"]] == ["ann", "bob"]
    (found,) = answer(gallery, world / "faces/eve/0.png", *old, "--threshold", 0.999)
    assert found["person"] is None  # a stranger
    (found,) = answer(gallery, probe, *old)
    assert found["person"] is found["threshold"] is None  # no calibration, no verdict
    with pytest.raises(UserError, match="run sphereface2 calibrate"):
        run("search", gallery, probe, *old, "--far", 0.01)
    assert "ann" in run("search", gallery, probe, *old, "--aligned", "--threshold", 0.5).stdout

    people = json.loads(run("list", gallery, "--json").stdout)
    assert [(p["name"], p["pictures"]) for p in people] == [("ann", 2), ("bob", 1)]
    assert json.loads(run("stats", gallery, "--json").stdout)["pictures"] == 3

    new = ["--model", world / "new"]
    with pytest.raises(UserError, match="gallery reembed"):
        run("search", gallery, probe, *new, "--aligned")
    (faces / "bob" / "0.png").unlink()
    with pytest.raises(UserError, match="1 pictures have no file"):
        run("reembed", gallery, *new)
    assert answer(gallery, probe, *old)[0]["matches"]  # nothing has changed
    run("reembed", gallery, *new, "--drop-missing")
    (found,) = answer(gallery, probe, *new, "--threshold", 0.999)
    assert [(m["person"], m["metadata"]) for m in found["matches"]] == [("ann", {"a": 1})]
    assert found["person"] == "ann"

    assert '{"a": 2}' in run("set", gallery, "ann", "--metadata", '{"a": 2}').stdout
    assert json.loads(run("list", gallery, "--json").stdout)[0]["metadata"] == {"a": 2}
    with pytest.raises(UserError, match="--metadata takes a JSON object"):
        run("set", gallery, "ann", "--metadata", "3")
    with pytest.raises(UserError, match="there is no 'nobody'"):
        run("set", gallery, "nobody", "--metadata", "{}")
    assert "2 pictures" in run("remove", gallery, "ann").stdout
    with pytest.raises(UserError, match="there is no 'ann'"):
        run("remove", gallery, "ann")
    run("compact", gallery)


def test_a_table_of_embeddings(world: Path, tmp_path: Path) -> None:
    table, gallery = tmp_path / "features.parquet", tmp_path / "g"
    embedder = FaceEmbedder.from_pretrained(world / "old", device="cpu")
    files = sorted((world / "faces").rglob("*.png"))
    rows = embedder.embed(files, aligned=True)
    columns = {
        "name": [str(path) for path in files] + ["unknown.png"],
        "label": [0, 0, 1, 1, 2, 2, None],
        "person": [path.parent.name for path in files] + [None],
        "embedding": [*rows.astype(np.float16), rows[0].astype(np.float16)],
    }
    told = {b"sphereface2": json.dumps({"model": embedder.fingerprint})}
    pq.write_table(pa.table(columns).replace_schema_metadata(told), table)
    added = run("add", gallery, "--features", table)
    assert "6 pictures of 3 people" in added.stdout and "unknown.png" in added.stderr
    (found,) = answer(gallery, files[3], "--model", world / "old", "--threshold", 0.9999)
    assert found["person"] == "bob"
    with pytest.raises(UserError, match="by another model"):
        run("add", gallery, "--features", table, "--model", world / "new")
    with pytest.raises(UserError, match="no Parquet file"):
        run("add", gallery, "--features", files[0])
    pq.write_table(pa.table({"x": [1]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="name, label and embedding are needed"):
        run("add", gallery, "--features", tmp_path / "x.parquet")


def test_features_as_embed_writes_them(world: Path, tmp_path: Path) -> None:
    table = tmp_path / "features.parquet"
    words = ["embed", world / "old", world / "faces", "--out", table, "--aligned"]
    assert CliRunner().invoke(app, list(map(str, words))).exit_code == 0
    added = run("add", tmp_path / "g", "--features", table)
    assert "6 pictures of 3 people" in added.stdout


def test_misuse_is_one_sentence(world: Path, tmp_path: Path) -> None:
    old, face = ["--model", world / "old"], world / "faces/ann/0.png"
    for words, message in (
        ([], "give a person and pictures"),
        (["ann"], "give a person and pictures"),
        (["ann", face, "--folder", world], "give a person and pictures"),
        (["ann", face], "say by which model"),
        (["ann", face, *old, "--aligned", "--metadata", "["], "--metadata takes a JSON object"),
        (["--folder", world / "faces", *old, "--replace"], "go with one person"),
        (["ann", tmp_path / "none.png", *old, "--aligned"], "none.png"),
    ):
        with pytest.raises(UserError, match=message):
            run("add", tmp_path / "g", *words)
    with pytest.raises(UserError, match="no gallery at"):
        run("search", tmp_path / "nowhere", face, *old)
