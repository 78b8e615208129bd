"""The gallery on both engines: whole or not at all, safe with any name."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from galleries import DIM, ENGINES, agrees, brute_force, filled, opened, unit, vectors
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from postgres import Postgres
from sphereface2.errors import UserError
from sphereface2.recognition.gallery import (
    Enrolment,
    Gallery,
    Person,
    PersonExistsError,
    UnknownPersonError,
)
from sphereface2.recognition.gallery import rows as module


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
        gallery.compact()
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


def test_a_server_writes_a_persons_row_once_a_change(server: Postgres) -> None:
    """Each time would link the template into its graph anew."""
    address = server.database()
    with opened(address) as gallery:
        gallery.add("Ann", vectors(1, 2), metadata={})
        gallery.add("Ann", vectors(2, 2), metadata={"room": 7})
    written = "SELECT n_tup_ins, n_tup_upd FROM pg_stat_user_tables WHERE relname = 'people'"
    until = time.monotonic() + 20  # connections count what they did when they end
    while (rows := server.sql(written, address.rpartition("/")[2]).strip()) != "1|1":
        assert time.monotonic() < until, rows
        time.sleep(0.05)


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
        with pytest.raises(UnknownPersonError, match="'nobody' is enrolled: enrol them first"):
            gallery.add("nobody", a, known=True)
        with pytest.raises(UnknownPersonError, match=r"people\(\) names everybody"):
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


def test_images_that_several_enrol_at_once_are_enrolled_once(address: str) -> None:
    """Each has all images to give, and the gallery takes each from one of them alone."""
    names, barrier = [f"p{i}" for i in range(40)], threading.Barrier(2)
    told: list[int] = []

    def enrol(start: int) -> None:
        passed: list[int] = []
        with opened(address) as gallery:
            people = (  # in other orders, so that neither is always the first
                Enrolment(name, vectors(i, 3), sources=[f"{name}/{j}" for j in range(3)])
                for i, name in list(enumerate(names))[start:] + list(enumerate(names))[:start]
            )
            barrier.wait()
            for person in people:
                list(gallery.add_many([person], passed=lambda _, count: passed.append(count)))
        told.append(sum(passed))

    opened(address).close()
    threads = [threading.Thread(target=enrol, args=(start,)) for start in (0, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    with opened(address) as gallery:
        assert [p.images for p in gallery.people()] == [3] * 40 and sum(told) == 120
        # An image that is there, one that is new and one without a source.
        rows = np.concatenate([vectors(0, 3)[:1], vectors(99, 3)[1:]])
        more = [Enrolment("p0", rows, {"v": 1}, sources=["p0/0", "new", None])]
        passed: list[int] = []
        for _ in range(2):
            list(gallery.add_many(more, passed=lambda _, count: passed.append(count)))
        assert passed == [1, 2]
        (_, images), *_ = gallery.stored(["p0"])
        assert [i.source for i in images] == ["p0/0", "p0/1", "p0/2", "new", None, None]
        rows = np.concatenate([vectors(0, 3), vectors(99, 3)[1:], vectors(99, 3)[2:]])
        (found,) = gallery.search(unit(unit(rows).sum(0)), k=1, fusion="mean")
        assert found[0].person == "p0" and found[0].score == pytest.approx(1, abs=1e-6)
        # Another set's file of that name, and one that is given twice.
        rows = np.concatenate([vectors(7, 2), vectors(7, 1)])
        named = [Enrolment("p0", rows, sources=["p0/0", "p0/1", "p0/0"])]
        list(gallery.add_many(named, passed=lambda _, count: passed.append(count)))
        assert passed == [1, 2, 1] and gallery.get("p0").images == 8
        with pytest.raises(ValueError, match="replace takes no passed"):
            list(gallery.add_many(named, replace=True, passed=lambda _, count: None))


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings": np.full(DIM, np.nan)}, "zero, infinite or not a number"),
        ({"embeddings": np.zeros(DIM)}, "zero, infinite"),
        ({"embeddings": np.ones(DIM - 1)}, r"gallery takes \(n, 16\)"),
        ({"embeddings": np.ones((0, DIM))}, "'x' has no image; give at least one"),
        ({"embeddings": np.ones((1001, DIM))}, "1000 is the maximum"),
        ({"embeddings": [[1.0], [1.0, 2.0]]}, "no array of numbers"),
        ({"embeddings": torch.ones(1, DIM, requires_grad=True)}, r"tensor\.detach\(\)\.cpu\(\)"),
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
        ({"sources": ["a", "b"]}, "1 image and 2 sources"),
        ({"sources": [3]}, "sources of 'x' must be str or None, got 3"),
        ({"sources": "a"}, "sources of 'x' must be a list, got 'a'"),
        ({"crops": ["a"]}, "crops of 'x' must be bytes or None, got 'a'"),
        ({"crops": [b"a", b"b"]}, "1 image and 2 crops"),
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


@pytest.mark.parametrize("dim", [0, -3, 8.5, np.int64(8)])
def test_a_dimension_that_no_database_stores_makes_no_gallery(tmp_path: Path, dim: object) -> None:
    with pytest.raises(UserError, match="dim must be an integer ≥ 1, got"):
        Gallery.open(tmp_path / "g.db", fingerprint="f", dim=dim)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_number_of_people_is_a_whole_one(shared: Gallery) -> None:
    for k in (0, 2.5, "3", None, 1001):
        with pytest.raises(UserError, match=r"k must be an integer from 1 to 1000, got"):
            shared.search(vectors(99, 1), k=k)  # type: ignore[arg-type]
    assert shared.search(vectors(99, 1), k=np.int64(2))[0][0].person == "bystander"
    with pytest.raises(UserError, match="index_from must be an integer"):
        shared.set_index(2.5)  # type: ignore[arg-type]


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
