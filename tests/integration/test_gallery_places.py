"""Where a gallery lies: read-only media and users, full disks, backups; what its commands say."""

from __future__ import annotations

import json
import os
import pwd
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import call
from galleries import opened, vectors
from serving import make_model
from skimage.data import astronaut

from postgres import Postgres
from sphereface2.errors import UserError
from sphereface2.recognition.gallery import Gallery, GalleryUnavailableError
from sphereface2.recognition.quality import Quality, check, measure, problems

GUIDE = Path(__file__).parents[2] / "docs" / "gallery.md"


def filled(address: str | Path, count: int = 5) -> None:
    with opened(address) as gallery:
        for i in range(count):
            gallery.add(f"p{i}", vectors(i, 2), crops=[b"crop", None])


def as_nobody(work: Callable[[], list[str]]) -> list[str]:
    """What work says in a process of a user who may only read."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            if os.geteuid() == 0:
                entry = pwd.getpwnam("nobody")
                os.setgroups([])
                os.setgid(entry.pw_gid)
                os.setuid(entry.pw_uid)
            answer = work()
        except BaseException as error:
            answer = [repr(error)]
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = json.load(pipe)
    os.waitpid(child, 0)
    return answer


def read_and_try_to_write(path: Path) -> list[str]:
    with Gallery.open(path, create=False) as gallery:
        found = gallery.search(vectors(3, 2), k=1)[0][0].person
        try:
            gallery.add("x", vectors(1, 1))
        except UserError as error:
            return [found, str(gallery.crop("p1")), str(gallery.count()), str(error)]
    return ["it could be written"]


def test_read_only_media_can_be_searched(tmp_path: Path) -> None:
    folder = tmp_path / "media"
    folder.mkdir()
    filled(folder / "g.db")
    folder.chmod(0o555)
    for place in folder.parents:  # pytest's are closed to others; /tmp and / stay as they are
        if place.stat().st_mode & 0o005 != 0o005:
            place.chmod(place.stat().st_mode | 0o005)
    (folder / "g.db").chmod(0o444)
    for writer_there in (False, True):
        writer = Gallery.open(folder / "g.db", create=False) if writer_there else None
        if writer is not None:
            writer.add("p3", vectors(3, 2))  # what is in the log only is seen too
            for file in folder.iterdir():
                file.chmod(0o444)
        told = as_nobody(lambda: read_and_try_to_write(folder / "g.db"))
        assert told[:3] == ["p3", "b'crop'", "5"], told
        assert "is read-only; nothing was changed" in told[3]
        if writer is not None:
            writer.close()


def test_a_lost_or_silent_server_is_told_in_one_sentence(server: Postgres) -> None:
    others = "pid <> pg_backend_pid() AND backend_type = 'client backend'"
    cut = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}"

    def cut_off(gallery: Gallery, work: Callable[[Any], object]) -> None:
        with gallery._change() as connection:
            server.sql(cut)
            work(connection)

    with Gallery.open(server.database(), fingerprint="0" * 64, dim=32) as gallery:
        gallery.add("Ada", np.random.default_rng(0).standard_normal((2, 32)))
        rows = gallery._rows
        for work in (
            lambda connection: rows.remove(connection, 1),
            lambda connection: rows.stored(connection, None),
            lambda connection: rows._copy(connection, []),
        ):
            with pytest.raises(GalleryUnavailableError) as told:
                cut_off(gallery, work)
            assert "does not answer" in str(told.value) and "\n" not in str(told.value)
            assert [person.name for person in gallery.people()] == ["Ada"]  # and it recovers
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port, begun = silent.getsockname()[1], time.monotonic()
        address = f"postgresql+psycopg://u:secret@127.0.0.1:{port}/d?connect_timeout=2"
        with pytest.raises(GalleryUnavailableError, match="timeout") as told:
            Gallery.open(address, create=False)
        assert time.monotonic() - begun < 8 and "secret" not in str(told.value)


def test_a_user_of_the_server_who_only_reads_can_search(server: Postgres) -> None:
    address = server.database()
    database = address.rpartition("/")[2]
    filled(address)
    server.sql("DO $$ BEGIN CREATE ROLE reader LOGIN; EXCEPTION WHEN OTHERS THEN NULL; END $$")
    server.sql("GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader", database)
    with Gallery.open(server.address(database, "reader"), create=False) as gallery:
        assert gallery.search(vectors(3, 2), k=1)[0][0].person == "p3"
        assert gallery.stats()["images"] == 10
        with pytest.raises(UserError, match=r"permission denied .*; nothing was changed"):
            gallery.add("x", vectors(1, 1))


FILLER = """
import resource, signal, sys, numpy as np
from sphereface2.errors import UserError
from sphereface2.recognition.gallery import Gallery
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
rows = np.random.default_rng(9).standard_normal((900, 16))
with Gallery.open(sys.argv[1], create=False) as gallery:
    limit = 16384 * 12
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    for i in range(1000):
        try:
            gallery.add(f"more {i}", rows)
        except UserError as error:
            print(i, error)
            break
    print(gallery.search(np.random.default_rng(3).standard_normal((2, 16)), k=1)[0][0].person)
"""


def test_a_full_disk_keeps_everything(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk; the log meets it first."""
    filled(tmp_path / "g.db")
    done = subprocess.run(
        [sys.executable, "-c", FILLER, str(tmp_path / "g.db")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told, found = done.stdout.splitlines()
    stored, sentence = told.split(" ", 1)
    assert "cannot be changed" in sentence and sentence.endswith("nothing was changed")
    with Gallery.open(tmp_path / "g.db", create=False) as gallery:
        assert gallery.count() == 5 + int(stored) and found == "p3"
        gallery.add("after", vectors(77, 1))
        assert gallery.search(vectors(77, 1), k=1)[0][0].person == "after"


def test_nothing_here_imports_torch(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import sphereface2.recognition.gallery.commands, sphereface2.recognition.gallery.enrol\n"
        "from sphereface2.recognition.gallery import Gallery\n"
        "with Gallery.open(sys.argv[1], fingerprint='a', dim=2) as g:\n"
        "    g.add('x', [1.0, 0.0]); print(g.search([1.0, 0.0])[0][0].person)\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "g.db")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.stdout == "x\n", done.stderr


def commands(language: str, heading: str) -> list[str]:
    """The lines of a block of the guide, below a heading."""
    text = GUIDE.read_text().partition(f"## {heading}")[2]
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)[0].splitlines()


def shell(lines: list[str], folder: Path, **environment: str) -> None:
    done = subprocess.run(
        ["bash", "-euc", "\n".join(lines)],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_guides_backup_of_a_file_while_it_is_written(tmp_path: Path) -> None:
    filled(tmp_path / "lobby.db")
    with Gallery.open(tmp_path / "lobby.db", create=False) as gallery:
        gallery.add("in the log only", vectors(50, 1))
        lines = [line for line in commands("bash", "Backup and restore") if "lobby" in line]
        assert any(".backup" in line for line in lines)
        (tmp_path / "sqlite3").write_text(
            f"#!{sys.executable}\n"
            "import sqlite3, sys\n"
            "source, command = sqlite3.connect(sys.argv[1]), sys.argv[2].split()\n"
            "assert command[0] == '.backup'\n"
            'source.backup(sqlite3.connect(command[1].strip("\'")))\n'
        )
        (tmp_path / "sqlite3").chmod(0o755)
        shell(lines[:1], tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "lobby.db").unlink()
    shell(lines[1:], tmp_path)
    with Gallery.open(tmp_path / "lobby.db", create=False) as gallery:
        assert gallery.count() == 6
        assert gallery.search(vectors(50, 1), k=1)[0][0].person == "in the log only"


def test_the_guides_backup_of_a_server(server: Postgres, tmp_path: Path) -> None:
    address = server.database()
    filled(address)
    host, database = f"127.0.0.1 -p {server.port} -U postgres", address.rpartition("/")[2]
    lines = [
        line.replace("-h database", f"-h {host}").replace(" faces", f" {database}")
        for line in commands("bash", "Backup and restore")
        if "lobby" not in line
    ]
    assert len(lines) == 3, lines
    path = f"{server.programs}:{os.environ['PATH']}"
    shell(lines[:1], tmp_path, PATH=path)
    server.sql(f"DROP DATABASE {database} WITH (FORCE)")
    shell(lines[1:], tmp_path, PATH=path)
    with Gallery.open(address, create=False) as gallery:
        assert gallery.count() == 5 and gallery.crop("p4") == b"crop"
        for exact in (True, False):
            assert gallery.search(vectors(3, 2), k=1, exact=exact)[0][0].person == "p3"


# -- commands --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated model, a photograph with one face, one with two, a blurred one."""
    import cv2

    root = tmp_path_factory.mktemp("faces")
    make_model(root / "model")
    one = np.ascontiguousarray(astronaut()[:300, 50:400])
    blurred = cv2.GaussianBlur(one, (0, 0), 5)
    two = np.concatenate([one, one[:, ::-1]], axis=1)
    for name, pixels in (("one", one), ("two", two), ("blurred", blurred)):
        cv2.imwrite(str(root / f"{name}.png"), pixels[:, :, ::-1])
    return root


def test_commands_about_faces(faces: Path, tmp_path: Path) -> None:
    gallery = tmp_path / "lobby.db"

    def run(*words: object) -> tuple[str, str]:
        done = call("gallery", *words)
        return done.stdout, done.stderr

    model = ["--model", faces / "model"]
    with pytest.raises(UserError, match=r"two\.png shows 2 faces"):
        run("add", gallery, "Eileen", faces / "two.png", *model)
    assert not gallery.exists()
    out, _ = run("add", gallery, "Eileen ", faces / "two.png", *model, "--faces", "all")
    assert "2 images of 1 person" in out
    # From here on the gallery knows its model.
    out, _ = run("add", gallery, "Eileen", faces / "two.png", "--faces", "largest", "--replace")
    assert "1 image of" in out
    _, err = run("add", gallery, "Blurred", faces / "blurred.png", "--keep-crops")
    assert re.search(r"warning: .*blurred\.png: the face is blurred", err)
    with pytest.raises(UserError, match=r"face is blurred .* give a better image"):
        run("add", gallery, "Blurred", faces / "blurred.png", "--quality", "refuse")
    probes = tmp_path / "probes"
    probes.mkdir()
    for name in ("one", "two"):
        (probes / f"{name}.png").write_bytes((faces / f"{name}.png").read_bytes())
    out, err = run("search", gallery, probes, "--fpir", 0.2)
    lines = out.splitlines()
    assert len(lines) == 2 and all("Eileen" in line or "Blurred" in line for line in lines)
    # Two images enrolled: a FAR of 1 - 0.8 ** (1 / 2), of which the calibration has 0.1.
    assert "FAR 1e-1, 2 comparisons a search: about one stranger in 5 would be named by" in err
    out, _ = run("search", gallery, faces / "two.png", "--faces", "all", "--json", "--exact")
    found = json.loads(out)
    assert len(found) == 2 and all(len(one["box"]) == 4 for one in found)
    assert found[0]["box"] != found[1]["box"]
    assert found[0]["fpir"] == pytest.approx(0.0199)  # twice a FAR of 0.01
    with pytest.raises(UserError, match=r"needs a threshold for a FAR of 5e-4"):
        run("search", gallery, probes, "--fpir", 0.001)
    out, _ = run("verify", gallery, "Eileen", faces / "one.png", "--far", 0.1, "--json")
    (verified,) = json.loads(out)
    assert verified["same"] == (verified["similarity"] >= verified["threshold"])
    with pytest.raises(UserError, match="no person named 'Nobody'"):
        run("verify", gallery, "Nobody", faces / "one.png")
    assert "is now Eileen Collins" in run("rename", gallery, "Eileen", "Eileen Collins")[0]
    with pytest.raises(UserError, match="is enrolled already"):
        run("rename", gallery, "Blurred", "Eileen Collins")
    assert "approximate from 1 image on" in run("index", gallery, "--index-from", 1)[0]
    assert "exact" in run("index", gallery, "--exact")[0]
    # A crop that was kept is embedded again; a file that is gone is not.
    (faces / "blurred.png").rename(faces / "gone.png")
    try:
        run("reembed", gallery, *model)
    finally:
        (faces / "gone.png").rename(faces / "blurred.png")
    assert json.loads(run("stats", gallery, "--json")[0])["people"] == 2
    assert "removed Blurred and 1 image" in run("remove", gallery, "Blurred")[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, []),
        ({"size": 12.0}, ["small"]),
        ({"sharpness": 0.002}, ["blurred"]),
        ({"yaw": -0.8}, ["turned to the side"]),
        ({"pitch": 0.5}, ["looks up or down"]),
        ({"roll": 70.0, "size": 5.0}, ["small", "inclined"]),
    ],
)
def test_what_is_said_of_a_poor_face(change: dict[str, float], words: list[str]) -> None:
    good = {"sharpness": 0.06, "size": 42.0, "yaw": 0.1, "pitch": 0.0, "roll": 2.0}
    quality = Quality(**{**good, **change})
    found = problems(quality)
    assert len(found) == len(words)
    assert all(word in problem for word, problem in zip(words, found, strict=True))
    assert len(check(quality, "warn", "x")) == bool(words) and not check(quality, "off", "")
    if words:
        with pytest.raises(UserError, match=words[0]):
            check(quality, "refuse", "x.jpg")


def test_measures_follow_the_face() -> None:
    from sphereface2.align import TEMPLATE, Face

    rng = np.random.default_rng(0)
    crop = rng.integers(0, 256, (112, 112, 3)).astype(np.uint8)
    smooth = np.repeat(np.repeat(crop[::16, ::16], 16, 0), 16, 1)
    assert measure(smooth).sharpness < measure(crop).sharpness and measure(crop).size is None
    frontal = Face(np.array([0, 0, 112, 112]), 1.0, TEMPLATE.astype(np.float32))
    assert abs(measure(crop, frontal).yaw or 1) < 0.1 and abs(measure(crop, frontal).roll or 9) < 2
    turned = frontal.landmarks.copy()
    turned[2, 0] += 25
    assert (measure(crop, Face(frontal.box, 1.0, turned)).yaw or 0) > 0.5
    angle = np.radians(30)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    inclined = measure(crop, Face(frontal.box, 1.0, frontal.landmarks @ turn))
    assert inclined.roll == pytest.approx(30, abs=2)
    assert inclined.yaw == pytest.approx(measure(crop, frontal).yaw, abs=1e-4)
