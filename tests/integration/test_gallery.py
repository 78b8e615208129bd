"""The gallery on both engines: exact, whole or not at all, safe with any name."""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from postgres import Postgres
from sphereface2.errors import UserError
from sphereface2.recognition.gallery import (
    Enrolment,
    Gallery,
    GalleryUnavailableError,
    Match,
    NoGalleryError,
    Person,
    PersonExistsError,
    UnknownPersonError,
    decide,
    types,
)
from sphereface2.recognition.gallery import rows as module
from sphereface2.recognition.gallery.engines import Resident, exact
from sphereface2.recognition.gallery.ivf import Ivf, View

MODEL, DIM = "a" * 64, 16
ENGINES = ("sqlite", "postgresql")


@pytest.fixture(params=ENGINES)
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a new gallery may be, on each engine."""
    if request.param == "sqlite":
        return str(tmp_path / "g.db")
    server: Postgres = request.getfixturevalue("server")
    return server.database()


def opened(address: str | Path, **options) -> Gallery:
    return Gallery.open(address, **{"fingerprint": MODEL, "dim": DIM, **options})


def vectors(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((*shape, DIM)).astype(np.float32)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def brute_force(people: dict[str, np.ndarray], probes: np.ndarray, fusion: str, k: int) -> list:
    """The k best names for each probe and their scores, one person after the other."""
    answers = []
    for probe in unit(probes.astype(np.float64)):
        scores = {
            name: float(
                (unit(rows.astype(np.float64)) @ probe).max()
                if fusion == "max"
                else unit(unit(rows.astype(np.float64)).sum(0)) @ probe
            )
            for name, rows in people.items()
        }
        answers.append(sorted(scores.items(), key=lambda item: -item[1])[:k])
    return answers


def agrees(found: list[list[Match]], wanted: list) -> None:
    assert [[m.person for m in ms] for ms in found] == [[n for n, _ in ns] for ns in wanted]
    np.testing.assert_allclose(
        [m.score for ms in found for m in ms], [s for ns in wanted for _, s in ns], atol=1e-5
    )


def filled(gallery: Gallery, seed: int = 0, count: int = 120) -> dict[str, np.ndarray]:
    """Enrol people of one to five images; their embeddings."""
    counts = np.random.default_rng(seed).integers(1, 6, count)
    people = {f"p{i}": vectors(1000 * seed + i, int(n)) for i, n in enumerate(counts)}
    stored = list(gallery.add_many(Enrolment(n, rows) for n, rows in people.items()))
    assert sorted(p.name for some in stored for p in some) == sorted(people)
    return people


@pytest.mark.parametrize("exact", [True, False])
def test_search_equals_brute_force(address: str, exact: bool) -> None:
    probes = vectors(99_000, 12)
    with opened(address) as gallery:
        people = filled(gallery)
    with opened(address) as gallery:
        for fusion in ("max", "mean"):
            found = gallery.search(probes, k=7, fusion=fusion, exact=exact)
            agrees(found, brute_force(people, probes, fusion, 7))
            agrees(
                gallery.search(probes, k=1, fusion=fusion), brute_force(people, probes, fusion, 1)
            )
            scores = dict(brute_force(people, probes[:1], fusion, 120)[0])
            (score,) = gallery.verify("p7", probes[:1], fusion=fusion)
            assert score == pytest.approx(scores["p7"], abs=1e-5)


def test_a_partitioned_table_gives_equal_answers(server: Postgres) -> None:
    """As on a distributed database: 16 parts by the person's key, made before the gallery is."""
    probes, address = vectors(99_000, 12), server.database()
    database = address.rpartition("/")[2]
    parts = "".join(
        f"CREATE TABLE {table}_{i} PARTITION OF {table} "
        f"FOR VALUES WITH (MODULUS 16, REMAINDER {i});"
        for table in ("people", "images")
        for i in range(16)
    )
    server.sql(
        "CREATE EXTENSION vector;"
        'CREATE TABLE people (id bigint PRIMARY KEY, name text COLLATE "C" NOT NULL, '
        "metadata text NOT NULL, template vector NOT NULL) PARTITION BY HASH (id);"
        "CREATE TABLE images (person bigint REFERENCES people (id) ON DELETE CASCADE, id bigint, "
        "embedding vector NOT NULL, source text, crop bytea, PRIMARY KEY (person, id)) "
        f"PARTITION BY HASH (person); {parts}",
        database,
    )
    with opened(address) as gallery:
        people = filled(gallery)
        assert int(server.sql("SELECT count(*) FROM images_3", database)) > 0
        gallery.add("p3", vectors(5, 2), replace=True)
        people["p3"] = vectors(5, 2)
        gallery.remove("p4")
        del people["p4"]
        gallery.rename("p5", "q5")
        people["q5"] = people.pop("p5")
        for fusion in ("max", "mean"):
            for exact in (True, False):
                found = gallery.search(probes, k=7, fusion=fusion, exact=exact)
                agrees(found, brute_force(people, probes, fusion, 7))
        new = {name: vectors(7_000 + i, 3)[:, :8] for i, name in enumerate(people)}
        gallery.reembed(
            lambda stored: [
                (image.id, row)
                for person, images in stored
                for image, row in zip(images, new[person.name], strict=False)
            ],
            fingerprint="b" * 64,
            dim=8,
        )
        assert gallery.search(new["p7"][0], k=1)[0][0].person == "p7"


def test_k_people_are_found_though_one_has_the_nearest_hundreds(address: str) -> None:
    probe = vectors(0)
    with opened(address) as gallery:
        gallery.add("many", unit(probe) + 0.01 * vectors(1, 600))
        for i in range(3):
            gallery.add(f"other {i}", vectors(10 + i))
        found = gallery.search(probe, k=3)[0]
        assert found[0].person == "many" and len({m.person for m in found}) == 3
        assert len(gallery.search(probe, k=9)[0]) == 4  # as many as there are


def test_a_person_grows_is_replaced_renamed_and_goes(address: str) -> None:
    a, b = vectors(1, 2), vectors(2, 1)
    with opened(address) as gallery:
        assert gallery.search(a) == [[], []] and gallery.people() == [] and gallery.count() == 0
        first = gallery.add("Zoé", a, metadata={"since": 2024}, crops=[None, b"jpeg"])
        gallery.add(" Zoe\u0301 ", b, known=True)  # the same name, written otherwise
        assert gallery.get("Zoé") == Person("Zoé", 3, {"since": 2024}, True)
        assert gallery.crop("Zoé") == b"jpeg" == gallery.crop("Zoé", first[1])
        template = unit(unit(np.concatenate([a, b])).sum(0))
        assert gallery.search(template, fusion="mean")[0][0].score == pytest.approx(1, abs=1e-6)
        second = gallery.add("Zoé", b, replace=True, metadata={})
        assert len(set(first + second)) == 3 and gallery.stats()["images"] == 1
        assert gallery.get("Zoé") == Person("Zoé", 1, {}) and gallery.crop("Zoé") is None
        assert gallery.set_metadata("Zoe\u0301", {"room": 7}) == gallery.get("Zoé")
        assert gallery.search(b, fusion="mean")[0][0].metadata == {"room": 7}
        assert gallery.search(b, fusion="mean")[0][0].score == pytest.approx(1, abs=1e-6)
        assert gallery.set_metadata("nobody", {}) is None
        gallery.add("Bob", a)
        with pytest.raises(PersonExistsError):
            gallery.add("Bob", a, known=False)
        with pytest.raises(UnknownPersonError):
            gallery.add("nobody", a, known=True)
        with pytest.raises(UnknownPersonError):
            gallery.verify("nobody", a)
        assert gallery.get("nobody") is None  # nothing was stored
        with pytest.raises(PersonExistsError, match="is enrolled already"):
            gallery.rename("Zoé", "Bob")
        assert gallery.rename("Zoé", "Zoe\u0301") == gallery.get("Zoé")
        assert gallery.rename("Zoé", " Eve ") == Person("Eve", 1, {"room": 7})
        assert gallery.rename("Zoé", "Ann") is None
        assert gallery.search(b, k=1)[0][0].person == "Eve"
        assert [p.name for p in gallery.people()] == ["Bob", "Eve"]
        assert [p.name for p in gallery.people(1, 5)] == ["Eve"] and gallery.people(0, 0) == []
        gallery.add("ÉMILE 50%_a", a)
        for part in ("émi", "E\u0301MILE", "0%_A"):
            assert [p.name for p in gallery.people(query=part)] == ["ÉMILE 50%_a"], part
            assert gallery.count(query=part) == 1
        assert [p.name for p in gallery.people(0, 1, query="E")] == ["Eve"]
        assert gallery.people(query="_%") == [] and gallery.count(query="_%") == 0
        assert gallery.remove("ÉMILE 50%_a") == 2
        assert gallery.remove("Eve") == 1 and gallery.remove("Eve") == 0
        assert [m.person for m in gallery.search(b)[0]] == ["Bob"]
        assert [m.person for m in gallery.search(b, fusion="mean")[0]] == ["Bob"]
    with opened(address) as gallery:
        assert [p.name for p in gallery.people()] == ["Bob"]
    with pytest.raises(UserError, match="was closed"):
        gallery.people()


def test_one_image_of_a_person_goes(address: str) -> None:
    rows = vectors(1, 3)
    with opened(address) as gallery:
        first, second, third = gallery.add("Ann", rows)
        assert gallery.search(rows[1], k=1)[0][0].score > 0.999
        assert gallery.remove_image("Ann", second) and not gallery.remove_image("Ann", second)
        assert not gallery.remove_image("nobody", second)
        left = {"Ann": rows[[0, 2]]}
        for fusion in ("max", "mean"):
            agrees(gallery.search(rows, fusion=fusion), brute_force(left, rows, fusion, 1))
        assert gallery.remove_image("Ann", first)
        with pytest.raises(UserError, match="no other image"):
            gallery.remove_image("Ann", third)
        assert gallery.stats()["images"] == 1


def test_images_that_cancel_out_have_a_template(address: str) -> None:
    row = vectors(3)
    with opened(address) as gallery:
        gallery.add("x", np.stack([row, -row]))
        assert gallery.search(row, fusion="mean")[0][0].score == pytest.approx(1, abs=1e-6)


def test_half_the_space_costs_little(address: str) -> None:
    probes = vectors(99_000, 5)
    with opened(address, storage="float16") as gallery:
        people = filled(gallery)
        for exact in (True, False):
            found = gallery.search(probes, k=1, exact=exact)
            for (match,), ((name, score),) in zip(
                found, brute_force(people, probes, "max", 1), strict=True
            ):
                assert match.person == name and match.score == pytest.approx(score, abs=2e-3)
    with pytest.raises(UserError, match="storage float16, not float32"):
        opened(address, storage="float32")


def test_a_change_cut_short_leaves_nothing(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(address) as gallery:
        gallery.add("old", vectors(1, 2))

        def cut(*_: object) -> int:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(module, "image_ids", cut)
            for person in ("new", "old"):
                with pytest.raises(KeyboardInterrupt):
                    gallery.add(person, vectors(2, 3), replace=person == "old")
        assert [m.person for m in gallery.search(vectors(2, 3), k=5)[0]] == ["old"]
        assert gallery.stats()["images"] == 2 and gallery.get("new") is None
        # Of many people those before stay, and of the batch that fails nobody does.
        good = [Enrolment(f"p{i}", vectors(i, 1000)) for i in range(3)]
        with pytest.raises(UserError, match="'bad' has no image; give at least one"):
            list(gallery.add_many([*good, Enrolment("bad", np.zeros((0, DIM)))]))
        assert [p.name for p in gallery.people()] == ["old", "p0", "p1"]


def test_every_process_sees_a_change_at_once(address: str) -> None:
    """Two galleries of one address, as two processes have them, each up to date all the time."""
    probes, people = vectors(50_000, 6), {}
    rng = np.random.default_rng(1)
    with opened(address) as one, opened(address) as other:
        for step in range(40):
            name, rows = f"p{rng.integers(12)}", vectors(step, int(rng.integers(1, 4)))
            writer, reader = (one, other) if rng.integers(2) else (other, one)
            match rng.integers(4):
                case 0:
                    assert (writer.remove(name) > 0) == (people.pop(name, None) is not None)
                case 1:
                    writer.add(name, rows, replace=True)
                    people[name] = rows
                case 2:
                    if name in people:
                        people[f"q{step}"] = people.pop(name)
                    writer.rename(name, f"q{step}")
                case _:
                    writer.add(name, rows, metadata={"step": step})
                    people[name] = np.concatenate([people.get(name, rows[:0]), rows])
            for fusion in ("max", "mean"):
                agrees(
                    reader.search(probes, k=4, fusion=fusion),
                    brute_force(people, probes, fusion, 4),
                )


def test_a_matrix_is_brought_up_to_date_and_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sphereface2.recognition.gallery.ivf._GONE", 16)
    probes = vectors(50_000, 6)
    with opened(tmp_path / "g.db") as gallery, opened(tmp_path / "g.db") as other:
        people = filled(gallery)
        agrees(gallery.search(probes, k=4), brute_force(people, probes, "max", 4))
        read: list[str] = []
        monkeypatch.setattr(
            Resident,
            "_load",
            lambda *_: pytest.fail("everything was read again"),
        )
        append = Resident._append
        monkeypatch.setattr(
            Resident,
            "_append",
            lambda self, c, query, values: (read.append(query), append(self, c, query, values)),
        )
        other.set_metadata("p0", {"a": 1})
        assert gallery.search(probes, k=1) and read == []  # images did not change
        for i in range(60):  # so that the matrix is written anew several times
            other.add(f"p{i % 40}", vectors(800 + i, 2), replace=True)
            people[f"p{i % 40}"] = vectors(800 + i, 2)
            agrees(gallery.search(probes, k=4), brute_force(people, probes, "max", 4))
        resident = gallery._search._residents[0]
        assert len(resident._view.rows) < 2 * resident._view.images
        assert len(read) == 60


def test_a_record_of_changes_too_short_is_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path / "g.db") as gallery, opened(tmp_path / "g.db") as other:
        people = filled(gallery, count=10)
        gallery.search(vectors(0), k=1)
        other.remove("p1")
        other.remove("p2")
        with sqlite3.connect(tmp_path / "g.db") as direct:
            direct.execute("DELETE FROM changes WHERE seq < (SELECT max(seq) FROM changes)")
        direct.close()
        left = {name: rows for name, rows in people.items() if name not in ("p1", "p2")}
        agrees(gallery.search(vectors(7, 3), k=8), brute_force(left, vectors(7, 3), "max", 8))


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


def test_reembedding_takes_in_who_came_meanwhile(address: str) -> None:
    calls: list[list[str]] = []
    with opened(address) as one, opened(address) as other:
        one.add("p1", vectors(1, 2), metadata={"a": 1}, crops=[b"crop", None])
        one.add("p2", vectors(2, 1))

        def embed(stored: list) -> list[tuple[int, np.ndarray]]:
            calls.append([person.name for person, _ in stored])
            if len(calls) == 1:
                other.add("p3", vectors(3, 2))
                other.add("p1", vectors(4, 1))
                other.set_metadata("p1", {"a": 2})
            return [
                (image.id, vectors(100 + int(person.name[1:]), len(images))[i][:8])
                for person, images in stored
                if person.name != "p2"
                for i, image in enumerate(images)
            ]

        one.reembed(embed, fingerprint="b" * 64, dim=8, model="runs/new")
        assert calls == [["p1", "p2"], ["p1", "p3"]]
        assert one.people() == [Person("p1", 3, {"a": 2}, True), Person("p3", 2, {})]
        assert one.search(vectors(103, 2)[0][:8], k=1)[0][0].person == "p3"
        assert one.crop("p1") == b"crop" and (one.model, one.dim) == ("runs/new", 8)
        for look in (
            lambda: other.search(vectors(1, 1)),
            other.people,
            lambda: other.remove("p1"),
            lambda: other.add("p1", vectors(1, 1)),
        ):
            with pytest.raises(UserError, match="was moved to another model"):
                look()
    with opened(address, fingerprint="b" * 64, dim=8) as gallery:
        assert gallery.stats()["images"] == 5


def test_an_index_is_forgotten_before_a_removal_is_seen_and_a_full_disk_is_no_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    address, old = tmp_path / "g.db", tmp_path / "g.db-hnsw-aaaaaaaa"  # as it was once called
    with opened(address) as gallery, opened(address) as other:
        filled(gallery, count=300)
        gallery.set_index(1)
        kept, forget = address.with_name("g.db-ivf-aaaaaaaa"), gallery._search.forget
        part = kept.with_name(f"{kept.name}.01.tmp")  # of a process that was killed
        old.touch(), part.touch()
        assert kept.exists()

        def check() -> None:
            forget()
            assert not kept.exists() and not old.exists() and not part.exists()
            assert other.get("p0") is not None

        monkeypatch.setattr(gallery._search, "forget", check)
        assert gallery.remove("p0") and other.get("p0") is None
    with opened(address) as gallery, opened(address) as other:
        gallery.warm_up()
        index = gallery._search._residents[0].ivf
        assert index is not None
        index.wait()
        assert kept.exists()
        other.remove("p1")
        index.save()  # of a state that is no more: not for a moment is there a file
        assert not kept.exists() and index._seq >= 0
        gallery.search(vectors(1, 1))
        index._removed = False

        def full(*_: object) -> None:
            raise RuntimeError("no space left")

        monkeypatch.setattr("faiss.write_index", full)
        gallery.close()
    assert "could not be kept: no space left" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["g.db"]
    with closing(sqlite3.connect(address)) as connection:  # galleries of every version open
        columns = [row[1] for row in connection.execute("PRAGMA table_info(stamp)")]
    assert columns[-2:] == ["model", "hnsw_from"]


def test_a_search_ends_before_its_index_begins_anew(tmp_path: Path) -> None:
    views = [
        View(seq, vectors(seq, count).astype(np.float32), *[np.arange(count)] * 2, np.zeros(0, int))
        for seq, count in ((1, 300), (2, 900))
    ]
    index = Ivf(tmp_path / "index", lambda write: write(1), views[0])
    index.wait()
    found, anew = index._index, threading.Thread(target=index.restart, args=(views[1],))

    class Slow:
        def search(self, *words: object) -> object:
            anew.start()
            anew.join(0.2)
            return found.search(*words)

    index._index = Slow()
    probe = views[0].rows[7] / np.linalg.norm(views[0].rows[7])
    answer = index.search(views[0], probe, 1)
    assert answer == [(7, pytest.approx(exact(views[0], probe[None], 1)[0][0][1]))]
    anew.join()
    index.wait()
    assert index.search(views[0], probe, 1) is None and index.search(views[1], probe, 1)


def test_an_approximate_index_is_kept_updated_and_forgotten(tmp_path: Path) -> None:
    """The index names whom exact search names, whoever comes and goes, and leaves no bytes."""
    address, probes = tmp_path / "g.db", vectors(60_000, 8)

    def files() -> list[str]:
        return sorted(p.name for p in tmp_path.iterdir() if "-ivf-" in p.name)

    def ready(gallery: Gallery) -> Ivf:
        gallery.warm_up()
        index = gallery._search._residents[0].ivf
        assert index is not None
        index.wait()
        assert index._index is not None
        return index

    with opened(address) as gallery:
        people = filled(gallery, count=400)
        gallery.search(probes, k=1)
        assert files() == []
        gallery.set_index(100)
        assert files() == ["g.db-ivf-aaaaaaaa"]
        assert all(path.stat().st_mode & 0o77 == 0 for path in tmp_path.iterdir())  # private
    with opened(address) as gallery, opened(address) as other:
        index = ready(gallery)
        assert not index._removed
        for step in range(12):
            other.add(f"new {step}", vectors(700 + step, 3))
            people[f"new {step}"] = vectors(700 + step, 3)
            agrees(gallery.search(probes, k=3), brute_force(people, probes, "max", 3))
            view = gallery._search._residents[0]._view
            assert index.search(view, unit(probes)[0], 3) is not None
        gallery.close()
        assert files() == ["g.db-ivf-aaaaaaaa"]  # with those added
        for step in range(0, 12, 2):
            other.remove(f"new {step}")
            del people[f"new {step}"]
        assert files() == []
    with opened(address) as gallery:
        ready(gallery)
        gallery.remove("new 1")
        gallery.add("new 3", vectors(90, 1), replace=True)
        people["new 3"] = vectors(90, 1)
        del people["new 1"]
        for _ in range(8):  # what is gone is most like the probe, and more than the candidates
            gallery.add("again", probes[:1] + vectors(91, 60) / 100, replace=True)
        gallery.add("again", vectors(92, 1), replace=True)
        people["again"] = vectors(92, 1)
        agrees(gallery.search(probes, k=3), brute_force(people, probes, "max", 3))
    assert files() == []  # it holds whom was removed, so that it is not kept
    with opened(address) as gallery:
        gallery.set_index(None)
        agrees(gallery.search(probes, k=3), brute_force(people, probes, "max", 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings": np.full(DIM, np.nan)}, "zero, infinite or not a number"),
        ({"embeddings": np.zeros(DIM)}, "zero, infinite"),
        ({"embeddings": np.ones(DIM - 1)}, r"gallery takes \(n, 16\)"),
        ({"embeddings": np.ones((0, DIM))}, "'x' has no image; give at least one"),
        ({"embeddings": np.ones((1001, DIM))}, "1000 is the maximum"),
        ({"person": ""}, "1 to 200"),
        ({"person": "  "}, "1 to 200"),
        ({"person": "x" * 201}, "1 to 200"),
        ({"person": "\ud800"}, "not valid Unicode"),
        ({"person": "a\0b"}, "NUL"),
        ({"metadata": {"x": float("nan")}}, "not JSON"),
        ({"metadata": {"x": b""}}, "not JSON"),
        ({"metadata": {"x": ["\ud800"]}}, "not valid Unicode"),
        ({"metadata": {"\ud800": 1}}, "not valid Unicode"),
        ({"metadata": [1]}, "not a JSON object"),
        ({"metadata": {"x": "y" * 20_000}}, "16,384 is the maximum"),
        ({"sources": ["a", "b"]}, "1 images and 2 sources"),
        ({"crops": [b"a", b"b"]}, "1 images and 2 crops"),
        ({"sources": ["a" * 9000]}, "9000 bytes"),
        ({"sources": ["\ud800"]}, "not valid Unicode"),
        ({"sources": ["a\0b"]}, "NUL"),
    ],
)
def test_what_cannot_be_stored_is_refused(
    shared: Gallery, change: dict[str, object], message: str
) -> None:
    good = {"person": "x", "embeddings": np.ones(DIM)}
    with pytest.raises(UserError, match=message):
        shared.add(**{**good, **change})  # type: ignore[arg-type]
    assert shared.get("x") is None


@pytest.fixture(scope="module", params=ENGINES)
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    address = str(tmp_path_factory.mktemp("gallery") / "g.db")
    if request.param == "postgresql":
        address = request.getfixturevalue("server").database()
    with opened(address) as gallery:
        gallery.add("bystander", vectors(99, 1), metadata={"kept": True})
        yield gallery


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@example(name='x" or "1" == "1')
@example(name="'; DROP TABLE people; --")
@example(name="%(name)s :name ? $1")
@example(name="%' like \\")
@example(name="../../collections")
@example(name="\u202e[red]{a}\n$meta")
@given(
    name=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
    .map(str.strip)
    .filter(bool)
)
def test_any_name_is_a_name_and_nothing_more(shared: Gallery, name: str) -> None:
    row = vectors(len(name), 1)
    before = shared.people()
    shared.add(f" {name}\n", row, metadata={name: name}, sources=[name])
    found = shared.get(name)
    assert found is not None and list(found.metadata.values()) == [name]
    assert found in shared.people() and shared.search(row, k=2)[0][0].score > 0.999
    assert shared.stored([name])[0][1][0].source == name
    assert shared.remove(name) == 1
    assert shared.people() == before


def test_threads_see_people_whole_and_in_order(address: str) -> None:
    """While people are added, replaced and removed, a search finds them whole or not at all."""
    seen: list[str] = []
    errors: list[BaseException] = []
    stop = threading.Event()
    rows = {f"p{i}": vectors(i, 3) for i in range(6)}

    with opened(address) as gallery:
        gallery.add("always", vectors(500, 1))

        def guarded(work: Callable[[], None]) -> threading.Thread:
            def run() -> None:
                try:
                    work()
                except BaseException as error:
                    errors.append(error)

            return threading.Thread(target=run)

        def look() -> None:
            while not stop.is_set():
                matches = gallery.search(np.concatenate([*rows.values()]), k=20)
                for name, mine in zip(rows, range(0, 18, 3), strict=True):
                    there = [
                        any(m.person == name and m.score > 0.999 for m in matches[mine + j])
                        for j in range(3)
                    ]
                    if any(there) != all(there):
                        seen.append(name)
                assert all("always" in [m.person for m in some] for some in matches)

        def change(names: list[str]) -> None:
            for _ in range(3):
                for name in names:
                    gallery.add(name, rows[name])
                    gallery.add(name, rows[name], replace=True)
                for name in names:
                    assert gallery.remove(name) == 3

        readers = [guarded(look) for _ in range(2)]
        writers = [guarded(lambda i=i: change(list(rows)[i::3])) for i in range(3)]
        for thread in readers + writers:
            thread.start()
        for thread in writers:
            thread.join()
        stop.set()
        for thread in readers:
            thread.join()
        assert not errors and not seen
        assert [person.name for person in gallery.people()] == ["always"]


def test_decide() -> None:
    best = Match("a", 0.5, {})
    assert decide([best, Match("b", 0.4, {})], 0.5) is best
    assert decide([best], 0.51) is None and decide([], 0.0) is None
