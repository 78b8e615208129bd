"""The commands of `sphereface2 gallery`, from pictures to an answer and from model to model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from command_line import Ran, call, ran
from PIL import Image

from sphereface2 import backbones
from sphereface2.backbones import bundle
from sphereface2.data.convert import convert
from sphereface2.errors import UserError
from sphereface2.recognition.face_embedder import FaceEmbedder
from sphereface2.recognition.gallery import enrol


def run(*words: object) -> Ran:
    return call("gallery", *words)


def answer(*words: object) -> list[dict]:
    return json.loads(run("search", *words, "--json", "--aligned").stdout)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and three people with two pictures each, in turn alike."""
    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    for name in ("old", "new"):
        (root / name).mkdir()
        network = backbones.build("sfnet4", width=0.25, input_size=64, batch_norm=True)
        bundle.save(network, root / name)
    rng = np.random.default_rng(0)
    for person in ("ann", "bob", "eve"):
        face = rng.integers(0, 256, (112, 112, 3))
        (root / "faces" / person).mkdir(parents=True)
        for i in range(2):
            noisy = np.clip(face + rng.integers(-9, 10, face.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(root / "faces" / person / f"{i}.png")
    return root


def test_the_newest_run_stays_the_gallerys_model_when_there_is_a_newer(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("old", "new"):
        shutil.copytree(world / name, tmp_path / "runs" / name)
        (tmp_path / "runs" / name / "results.json").write_text("{}")
        if name == "old":
            run("add", "g", "ann", world / "faces/ann/0.png", "--aligned", "--model", "latest")
    assert json.loads(run("stats", "g", "--json").stdout)["model"] == f"{tmp_path}/runs/old"
    assert answer("g", world / "faces/ann/0.png")[0]["matches"][0]["person"] == "ann"


def test_from_pictures_to_an_answer_and_to_another_model(world: Path, tmp_path: Path) -> None:
    gallery, faces, old = tmp_path / "g", tmp_path / "faces", ["--model", world / "old"]
    for person in ("ann", "bob"):
        (faces / person).mkdir(parents=True)
        copied = (world / "faces" / person / "0.png").read_bytes()
        (faces / person / "0.png").write_bytes(copied)
    (faces / "ann" / "notes.txt").write_text("no picture")
    (faces / "bob" / "torn.png").write_bytes(b"\x89PNG")
    added = run("add", gallery, "--folder", faces, *old, "--aligned")
    assert "2 images of 2 people" in added.stdout and "torn.png" in added.stderr
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
    assert [(p["name"], p["images"]) for p in people] == [("ann", 2), ("bob", 1)]
    assert json.loads(run("stats", gallery, "--json").stdout)["images"] == 3

    new = ["--model", world / "new"]
    with pytest.raises(UserError, match="gallery reembed"):
        run("search", gallery, probe, *new, "--aligned")
    (faces / "bob" / "0.png").unlink()
    with pytest.raises(UserError, match="1 image cannot be embedded again"):
        run("reembed", gallery, *new)
    assert answer(gallery, probe, *old)[0]["matches"]  # nothing has changed
    moved = run("reembed", gallery, *new, "--drop-missing")
    assert "left out: an image of 'bob'" in moved.stderr and "1 person" in moved.stdout
    assert "1 went: bob" in moved.stdout
    (found,) = answer(gallery, probe, *new, "--threshold", 0.999)
    assert [(m["person"], m["metadata"]) for m in found["matches"]] == [("ann", {"a": 1})]
    assert found["person"] == "ann"

    assert '{"a": 2}' in run("set", gallery, "ann", "--metadata", '{"a": 2}').stdout
    assert json.loads(run("list", gallery, "--json").stdout)[0]["metadata"] == {"a": 2}
    with pytest.raises(UserError, match="--metadata takes a JSON object"):
        run("set", gallery, "ann", "--metadata", "3")
    with pytest.raises(UserError, match="no person named 'nobody'"):
        run("set", gallery, "nobody", "--metadata", "{}")
    assert "2 images" in run("remove", gallery, "ann").stdout
    with pytest.raises(UserError, match="no person named 'ann'"):
        run("remove", gallery, "ann")
    run("compact", gallery)


def test_a_table_of_embeddings(world: Path, tmp_path: Path) -> None:
    table, gallery = tmp_path / "features.parquet", tmp_path / "g"
    embedder = FaceEmbedder.from_pretrained(world / "old", device="cpu")
    files = sorted((world / "faces").rglob("*.png"))
    rows = embedder.embed(files, aligned=True)
    columns = {
        "name": [str(path) for path in files] + ["unknown.png", None],
        "label": [0, 0, 1, 1, 2, 2, None, 2],
        "person": [path.parent.name for path in files] + [None, "eve"],
        "embedding": [*rows.astype(np.float16), *rows[:2].astype(np.float16)],
    }
    told = {b"sphereface2": json.dumps({"model": embedder.fingerprint})}
    pq.write_table(pa.table(columns).replace_schema_metadata(told), table)
    added = run("add", gallery, "--features", table)
    assert "6 images of 3 people" in added.stdout and "unknown.png" in added.stderr
    assert "1 row of eve" in added.stderr and "no image name" in added.stderr
    (found,) = answer(gallery, files[3], "--model", world / "old", "--threshold", 0.9999)
    assert found["person"] == "bob"
    with pytest.raises(UserError, match=r"by a different model, not by .*: give that model"):
        run("add", tmp_path / "other", "--features", table, "--model", world / "new")
    with pytest.raises(UserError, match="not a Parquet file"):
        run("add", gallery, "--features", files[0])
    pq.write_table(pa.table({"x": [1]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="name, label and embedding are needed"):
        run("add", gallery, "--features", tmp_path / "x.parquet")


def test_features_as_embed_writes_them(world: Path, tmp_path: Path) -> None:
    table = tmp_path / "features.parquet"
    words = ["embed", world / "old", world / "faces", "--out", table, "--aligned"]
    call(*words)
    added = run("add", tmp_path / "g", "--features", table)
    assert "6 images of 3 people" in added.stdout
    again = run("add", tmp_path / "g", "--features", table)
    assert "0 images of 0 people" in again.stdout and "6 images there already" in again.stdout
    run("remove", tmp_path / "g", "ann")
    assert "2 images of 1 person" in run("add", tmp_path / "g", "--features", table).stdout


def test_features_of_a_set_without_names(world: Path, tmp_path: Path) -> None:
    """RecordIO as it is handed out knows people by number alone."""
    table, gallery = tmp_path / "features.parquet", tmp_path / "g"
    files = sorted((world / "faces").rglob("*.png"))
    convert(world / "faces", tmp_path / "set", to="recordio")
    (tmp_path / "set" / "names.txt").unlink()
    words = ["embed", world / "old", tmp_path / "set", "--out", table, "--aligned"]
    call(*words)
    assert "6 images of 3 people" in run("add", gallery, "--features", table).stdout
    (found,) = answer(gallery, files[2], "--model", world / "old", "--threshold", 0.9999)
    assert found["person"] == "1"

    words[4] = tmp_path / "other.parquet"
    call(*words, "--no-flip")
    with pytest.raises(UserError, match="embedded with --no-flip"):
        run("add", gallery, "--features", tmp_path / "other.parquet")
    told = pq.read_schema(table).metadata
    nobody = pq.read_table(table).drop_columns(["label", "person"])
    nobody = nobody.append_column("label", pa.nulls(6, pa.int64()))
    pq.write_table(nobody.replace_schema_metadata(told), table)
    with pytest.raises(UserError, match="no person was added"):
        run("add", tmp_path / "empty", "--features", table)
    assert not (tmp_path / "empty").exists()


def test_a_folder_is_enrolled_once_and_past_whom_a_gallery_does_not_take(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sphereface2.recognition.gallery.types.IMAGES_PER_PERSON", 3)
    gallery, old, faces = tmp_path / "g", ["--model", world / "old", "--aligned"], tmp_path / "f"
    picture = (world / "faces/ann/0.png").read_bytes()
    for person, count in (("ann", 1), ("bob", 4), ("x" * 201, 1), ("zoe\u0301", 2)):
        (faces / person).mkdir(parents=True)
        for i in range(count):
            (faces / person / f"{i}.png").write_bytes(picture)
    added = run("add", gallery, "--folder", faces, *old)
    assert "3 images of 2 people" in added.stdout and "already" not in added.stdout
    assert "'bob' would have 4 images" in added.stderr and "1 to 200 characters" in added.stderr
    (faces / "ann" / "new.png").write_bytes(picture)
    added = run("add", gallery, "--folder", faces, *old)
    assert "1 image of 1 person" in added.stdout and "3 images there already" in added.stdout
    people = json.loads(run("list", gallery, "--json").stdout)
    assert [(p["name"], p["images"]) for p in people] == [("ann", 2), ("zo\u00e9", 2)]


def test_a_folder_that_another_enrols_meanwhile_is_enrolled_once(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other enrols it while this one embeds, having looked who is there."""
    gallery, embed = tmp_path / "g", enrol._embed
    words = ["add", gallery, "--folder", world / "faces", "--model", world / "old", "--aligned"]
    other: list[Ran] = []

    def late(*args: Any, **options: Any) -> Any:
        monkeypatch.undo()
        other.append(run(*words))
        return embed(*args, **options)

    monkeypatch.setattr(enrol, "_embed", late)
    added = run(*words)
    assert "added 6 images of 3 people" in other[0].stdout and "already" not in other[0].stdout
    assert "added 0 images of 0 people" in added.stdout and "6 images there already" in added.stdout
    assert [p["images"] for p in json.loads(run("list", gallery, "--json").stdout)] == [2] * 3


def test_one_bad_probe_does_not_silence_the_others(world: Path, tmp_path: Path) -> None:
    gallery, old, face = tmp_path / "g", ["--model", world / "old"], world / "faces/ann/0.png"
    run("add", gallery, "ann", face, *old, "--aligned")
    words = ["search", gallery, face, world / "none.png", face, *old, "--aligned", "--json"]
    done = ran("gallery", *words)
    assert done.returncode == 2 and "1 of 3 images" in done.stderr
    good, bad, again = json.loads(done.stdout)  # in the order given, though one came twice
    assert "none.png" in bad["error"] and good["matches"][0]["person"] == "ann"
    assert again == good


def test_no_name_of_a_file_steers_the_terminal_or_begins_a_line(
    world: Path, tmp_path: Path
) -> None:
    """A name may colour a terminal, set its title, end a line, and be no text at all."""
    odd, people = "\x1b[31mred\x1b]0;title\x07\n\x9b\udcff\u202e.png", tmp_path / "people"
    shutil.copytree(world / "faces", people)
    for place in ("ann", "bob"):
        shutil.copy(people / "ann" / "0.png", people / place / odd)
        (people / place / f"torn{odd}").write_bytes(b"\x89PNG")
    image, torn = people / "ann" / odd, people / "bob" / f"torn{odd}"
    gallery, old, aligned, clusters = tmp_path / "g", world / "old", "--aligned", tmp_path / "c"
    for words, times in (
        (["gallery", "add", gallery, "--folder", people, "--model", old, aligned], 2),
        (["gallery", "add", gallery, "eve", torn, aligned], 1),
        (["gallery", "search", gallery, people / "ann", aligned], 2),
        (["gallery", "verify", gallery, "ann", image, aligned], 1),
        (["verify", image, torn, "--model", old, aligned], 1),
        (["data", "info", people], 3),
        (["align", people, tmp_path / "crops"], 4),
        (["data", "convert", people, tmp_path / "set", "--to", "recordio"], 2),
        (["data", "cluster", people, "--out", clusters, "--model", old, "--threshold", 0.9], 0),
    ):
        done = ran(*words)
        text = "".join((done.stdout + done.stderr).split())
        assert text.isprintable() and text.count(r"\x1b[31mred\x1b]0;title\x07\n") == times, words
    assert "".join((clusters / "people.txt").read_text().split()).isprintable()


def test_a_full_disk_is_one_sentence(world: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    words = ["add", tmp_path / "g", "--folder", world / "faces", "--aligned"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))
    try:
        done = ran("gallery", *words, "--model", world / "old")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "disk I/O error; nothing was changed" in done.stderr.strip().splitlines()[-1]


def test_misuse_is_one_sentence(world: Path, tmp_path: Path) -> None:
    old, face = ["--model", world / "old"], world / "faces/ann/0.png"
    for words, message in (
        ([], "give a person and images"),
        (["ann"], "give a person and images"),
        (["ann", face, "--folder", world], "give a person and images"),
        (["ann", face, *old, "--aligned", "--metadata", "["], "--metadata takes a JSON object"),
        (["--folder", world / "faces", *old, "--replace"], "go with one person"),
        (["ann", tmp_path / "none.png", *old, "--aligned"], "none.png"),
        (["--folder", tmp_path / "none", *old], "none is not a folder"),
        (["--folder", face, *old], "0.png is not a folder"),
    ):
        with pytest.raises(UserError, match=message):
            run("add", tmp_path / "g", *words)
    assert not (tmp_path / "g").exists()
    with pytest.raises(UserError, match="cannot be opened: "):
        run("add", face / "g", "ann", face, *old, "--aligned")
    run("add", tmp_path / "g", "ann", face, *old, "--aligned")
    (tmp_path / "moved.png").write_bytes(face.read_bytes())
    run("add", tmp_path / "h", "ann", tmp_path / "moved.png", *old, "--aligned")
    (tmp_path / "moved.png").unlink()
    with pytest.raises(UserError, match="no person would remain"):
        run("reembed", tmp_path / "h", "--model", world / "new", "--drop-missing")
    assert json.loads(run("stats", tmp_path / "h", "--json").stdout)["people"] == 1
    with pytest.raises(UserError, match="no gallery at"):
        run("search", tmp_path / "nowhere", face, *old)
