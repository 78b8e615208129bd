"""What a gallery leaves in files, and what is none of its own."""

from __future__ import annotations

import hashlib
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from galleries import DIM, MODEL, opened, vectors

from postgres import Postgres
from sphereface2.errors import UserError
from sphereface2.recognition.gallery import (
    GalleryUnavailableError,
    NoGalleryError,
    types,
)


def test_what_is_committed_is_on_the_disk_itself(tmp_path: Path) -> None:
    with opened(tmp_path / "g.db") as gallery, gallery._db.engine.connect() as connection:
        pragmas = ("synchronous", "fullfsync", "checkpoint_fullfsync")
        found = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in pragmas]
    assert found == [2, 1, 1]  # FULL, and as macOS wants it


def test_removing_leaves_no_byte_in_any_file(tmp_path: Path) -> None:
    gone, also, stays = vectors(1, 1), vectors(5, 1), vectors(2, 3)

    def files_with(row: np.ndarray) -> list[str]:
        needle = types.unit(row, DIM).astype("<f4").tobytes()
        return [p.name for p in tmp_path.iterdir() if needle in p.read_bytes()]

    with opened(tmp_path / "g.db") as gallery, opened(tmp_path / "g.db") as other:
        gallery.add("gone", gone, metadata={"room": "secretroom"}, crops=[b"secretcrop" * 400])
        gallery.add("replaced", also)
        gallery.add("stays", stays, metadata={"a": [1]}, sources=["x", None, "z"])
        assert other.search(gone, k=1)[0][0].person == "gone"
        assert set(files_with(gone[0])) & {"g.db", "g.db-wal"} and files_with(stays[2])
        gallery.remove("gone")
        gallery.add("replaced", vectors(6, 1), replace=True)
        assert files_with(gone[0]) == files_with(also[0]) == [] and not gallery.unerased
        content = b"".join(p.read_bytes() for p in tmp_path.iterdir())
        assert b"secretroom" not in content and b"secretcrop" not in content
        assert files_with(stays[2])
        ((replaced, _), (person, images)) = gallery.stored()
        assert (person.name, person.images, person.metadata) == ("stays", 3, {"a": [1]})
        assert [image.source for image in images] == ["x", None, "z"] and replaced.images == 1


def test_bytes_that_a_reader_still_needs_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sphereface2.recognition.gallery.sql.ERASE_SECONDS", 0.3)
    with opened(tmp_path / "g.db") as gallery:
        gallery.add("gone", vectors(1, 1))
        reader = sqlite3.connect(tmp_path / "g.db", isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM people").fetchall()
        assert gallery.remove("gone") == 1 and gallery.unerased and gallery.stats()["unerased"]
        assert gallery.get("gone") is None
        assert len(reader.execute("SELECT * FROM people").fetchall()) == 1
        reader.close()
        gallery.compact()
        assert not gallery.unerased
        needle = types.unit(vectors(1, 1), DIM).astype("<f4").tobytes()
        assert not any(needle in p.read_bytes() for p in tmp_path.iterdir())


def test_changes_without_end_take_no_space_without_end(tmp_path: Path) -> None:
    sizes = []
    with opened(tmp_path / "g.db") as gallery:
        gallery.add("stays", vectors(0, 3))
        for i in range(60):
            gallery.add(f"passer-by {i}", vectors(i + 1, 2))
            gallery.remove(f"passer-by {i}")
            sizes.append(sum(p.stat().st_size for p in tmp_path.iterdir()))
        assert max(sizes[30:]) <= 1.1 * max(sizes[:30])
        assert [m[0].person for m in gallery.search(vectors(0, 3))] == ["stays"] * 3


def test_another_model_is_refused_by_name(address: str, tmp_path: Path) -> None:
    opened(address, model="runs/a").close()
    with opened(address, create=False, fingerprint=None, dim=None) as gallery:
        assert (gallery.fingerprint, gallery.dim, gallery.model) == (MODEL, DIM, "runs/a")
    with pytest.raises(UserError, match="model aaaaaaaaaaaa and the model given is bbbbbbbbbbbb"):
        opened(address, fingerprint="b" * 64)
    with pytest.raises(UserError, match="16 numbers and the model gives 32"):
        opened(address, dim=32)
    with pytest.raises(UserError, match="must be one of 'float32', 'float16'"):
        opened(address, storage="flot16")
    with opened(address) as gallery, gallery._db.write() as connection:
        connection.exec_driver_sql("UPDATE stamp SET format_version = 2")
    with pytest.raises(UserError, match="has format version 2 and this package reads 1"):
        opened(address)


def test_rows_that_another_client_holds_are_told(server: Postgres) -> None:
    """The server has answered: neither is it silent nor is the change in doubt."""
    address = server.database()
    with opened(address) as gallery, opened(f"{address}?options=-clock_timeout%3D50") as other:
        gallery.add("x", vectors(0, 1))
        with gallery._db.write() as connection:
            connection.exec_driver_sql("LOCK TABLE people")
            held = pytest.raises(GalleryUnavailableError, match=r"another client .* holds rows")
            with held as told:
                other.add("y", vectors(1, 1))
        assert "nothing was changed" in str(told.value) and "answer" not in str(told.value)
        other.add("y", vectors(1, 1))
        slow = pytest.raises(GalleryUnavailableError, match="cannot be changed: canceling")
        with slow, other._db.write() as connection:
            connection.exec_driver_sql("SET LOCAL statement_timeout = 20")
            connection.exec_driver_sql("SELECT pg_sleep(1)")


def test_what_is_no_gallery_is_told(tmp_path: Path, server: Postgres) -> None:
    with pytest.raises(NoGalleryError, match="no gallery at"):
        opened(tmp_path / "none.db", create=False)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"not http://…"):
        opened("http://milvus:19530")
    with pytest.raises(UserError, match="address cannot be read"):
        opened("postgresql://u@/d?host=one&host=two&port=1")
    with pytest.raises(UserError, match="is a folder"):
        opened(tmp_path)
    (tmp_path / "thesis.txt").write_text("mine" * 1000)
    with pytest.raises(UserError, match="damaged or no gallery"):
        opened(tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "mine" * 1000
    with pytest.raises(NoGalleryError):
        opened(server.database(), create=False)
    with pytest.raises(UserError, match="does not answer") as told:
        opened("postgresql+psycopg://somebody:secret@127.0.0.1:1/x")
    assert "secret" not in str(told.value)
    with opened(tmp_path / "g.db") as gallery:
        gallery.add("x", vectors(0, 40))
    content = bytearray((tmp_path / "g.db").read_bytes())
    content[16_384:] = b"\xff" * len(content[16_384:])
    (tmp_path / "g.db").write_bytes(content)
    with pytest.raises(UserError, match="restore a backup"), opened(tmp_path / "g.db") as gallery:
        gallery.search(vectors(0))


@pytest.mark.parametrize("table", ["accounts (id)", "stamp (id)", "people (id, name)"])
@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_another_programs_database_keeps_its_bytes(tmp_path: Path, table: str, mode: str) -> None:
    other, here = sqlite3.connect(tmp_path / "other.db"), tmp_path / "here"
    other.execute(f"PRAGMA journal_mode = {mode}")
    other.execute(f"CREATE TABLE {table}")
    other.commit()
    here.mkdir()
    for path in tmp_path.glob("other.db*"):  # as after a crash: what is in the log only, stays so
        (here / path.name).write_bytes(path.read_bytes())
    other.close()

    def files() -> dict[str, bytes]:
        # The -shm file is memory that SQLite's processes share, and is made anew.
        found = (path for path in here.iterdir() if not path.name.endswith("-shm"))
        return {path.name: hashlib.sha256(path.read_bytes()).digest() for path in found}

    before = files()
    for create in (True, False):
        with pytest.raises(UserError, match=f"another program, with a table '{table.split()[0]}'"):
            opened(here / "other.db", create=create)
        assert files() == before
