"""The gallery: exact, whole or not at all, safe with any name, and rid of whom it forgets."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sphereface2.errors import UserError
from sphereface2.recognition import gallery as module
from sphereface2.recognition.gallery import Enrolment, Gallery, Match, decide
from sphereface2.recognition.store import Row, Store

pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")

MODEL, DIM = "a" * 64, 16


def opened(folder: Path, **options) -> Gallery:
    return Gallery.open(folder, **{"fingerprint": MODEL, "dim": DIM, **options})


def vectors(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((*shape, DIM)).astype(np.float32)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.mark.parametrize("index", ["flat", "ivf", "hnsw"])
def test_exact_search_equals_brute_force(tmp_path: Path, index: str) -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 6, 120)
    people = {f"p{i}": vectors(i, int(n)) for i, n in enumerate(counts)}
    probes = vectors(1000, 25)
    with opened(tmp_path / "g", index=index) as gallery:
        stored = list(gallery.add_many(Enrolment(n, rows) for n, rows in people.items()))
        assert sorted(p.name for some in stored for p in some) == sorted(people)
    with opened(tmp_path / "g") as gallery:  # from the files, with the index built
        for fusion in ("max", "mean"):
            scores = np.stack(
                [
                    (unit(probes) @ unit(rows).T).max(1)
                    if fusion == "max"
                    else unit(probes) @ unit(unit(rows).sum(0))
                    for rows in people.values()
                ],
                axis=1,
            )
            best = np.argsort(-scores, axis=1)[:, :7]
            found = gallery.search(probes, k=7, fusion=fusion, exact=True)
            names = list(people)
            assert [[m.person for m in ms] for ms in found] == [[names[i] for i in r] for r in best]
            np.testing.assert_allclose(
                [[m.score for m in ms] for ms in found],
                np.take_along_axis(scores, best, 1),
                atol=1e-5,
            )


def test_k_people_are_found_though_one_has_the_nearest_hundred_pictures(tmp_path: Path) -> None:
    probe = vectors(0)
    with opened(tmp_path / "g") as gallery:
        gallery.add("many", unit(probe) + 0.01 * vectors(1, 100))
        for i in range(3):
            gallery.add(f"other {i}", vectors(10 + i))
        found = gallery.search(probe, k=3)[0]
        assert found[0].person == "many" and len({m.person for m in found}) == 3
        assert len(gallery.search(probe, k=9)[0]) == 4  # as many as there are


def test_a_person_grows_is_replaced_and_goes(tmp_path: Path) -> None:
    a, b = vectors(1, 2), vectors(2, 1)
    with opened(tmp_path / "g") as gallery:
        assert gallery.search(a) == [[], []] and gallery.people() == []
        first = gallery.add("Zoé", a, metadata={"since": 2024})
        gallery.add("Zoe\u0301", b)  # the same name, written otherwise
        person = gallery.get("Zoé")
        assert person is not None and (person.pictures, person.metadata) == (3, {"since": 2024})
        template = unit(unit(np.concatenate([a, b])).sum(0))
        assert gallery.search(template, fusion="mean")[0][0].score == pytest.approx(1, abs=1e-6)
        second = gallery.add("Zoé", b, replace=True, metadata={})
        assert len(set(first + second)) == 3 and gallery.stats()["pictures"] == 1
        assert gallery.get("Zoé") == module.Person("Zoé", 1, {})
        assert gallery.set_metadata("Zoe\u0301", {"room": 7}) == gallery.get("Zoé")
        assert gallery.search(b, fusion="mean")[0][0].metadata == {"room": 7}
        assert gallery.search(b, fusion="mean")[0][0].score == pytest.approx(1, abs=1e-6)
        assert gallery.set_metadata("nobody", {}) is None
        with pytest.raises(UserError, match="no JSON object"):
            gallery.set_metadata("Zoé", [1])  # type: ignore[arg-type]
        assert gallery.remove("Zoé") == 1 and gallery.remove("Zoé") == 0
        assert gallery.search(b) == [[]] and gallery.search(b, fusion="mean") == [[]]
    with opened(tmp_path / "g") as gallery:
        assert gallery.people() == [] and gallery.search(b) == [[]]
    with pytest.raises(UserError, match="was closed"):
        gallery.people()


def test_compacting_leaves_no_byte_of_whom_was_removed(tmp_path: Path) -> None:
    gone, stays = vectors(1, 1), vectors(2, 3)

    def files_with(row: np.ndarray) -> list[Path]:
        # Files may be compressed by pages, but random float32 numbers do not compress: four
        # neighbouring ones are found as they are.
        needles = [unit(row).astype("<f4")[i : i + 4].tobytes() for i in range(0, DIM, 4)]
        files = [path for path in (tmp_path / "g").rglob("*") if path.is_file()]
        return [p for p in files if any(n in p.read_bytes() for n in needles)]

    with opened(tmp_path / "g") as gallery:
        gallery.add("gone", gone)
        gallery.add("stays", stays, metadata={"a": [1]}, sources=["x", None, "z"])
    assert files_with(gone[0]) and files_with(stays[2])  # the search can find what is there
    with opened(tmp_path / "g") as gallery:
        gallery.remove("gone")
        assert gallery.stats()["removed"] == 1
        gallery.compact()
        assert gallery.stats()["removed"] == 0
        assert files_with(gone[0]) == []
        ((person, sources),) = gallery.sources()
        assert (person.name, person.pictures, person.metadata) == ("stays", 3, {"a": [1]})
        assert sources == ["x", None, "z"]
    assert files_with(gone[0]) == [] and files_with(stays[2])
    with opened(tmp_path / "g") as gallery:
        assert gallery.search(stays)[2][0].score == pytest.approx(1, abs=1e-6)


def test_changes_without_end_take_no_space_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """People come and go: neither the database's memory nor its files grow with how many did."""
    import pyarrow

    from sphereface2.recognition import store

    monkeypatch.setattr(store, "FLUSH_WRITES", 20)
    monkeypatch.setattr(module, "COMPACT_FROM", 16)
    memory, files = [], []
    with opened(tmp_path / "g") as gallery:
        gallery.add("stays", vectors(0, 3))
        for i in range(40):
            gallery.add(f"passer-by {i}", vectors(i + 1, 2))
            gallery.remove(f"passer-by {i}")
            assert gallery.stats()["removed"] < 16
            memory.append(pyarrow.total_allocated_bytes())
            files.append(sum(p.stat().st_size for p in (tmp_path / "g").rglob("*.*")))
        assert max(memory[20:]) <= 1.1 * max(memory[:20])
        assert max(files[20:]) <= 1.1 * max(files[:20])
        assert gallery.people() == [module.Person("stays", 3, {})]
        assert [m[0].person for m in gallery.search(vectors(0, 3))] == ["stays"] * 3


def test_a_change_cut_short_leaves_nothing_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies between the pictures and the person: as if it had died before."""
    put = Store.put

    def cut(self: Store, name: str, rows: list[Row]) -> None:
        if "people" in name:
            raise KeyboardInterrupt
        put(self, name, rows)

    a = vectors(1, 2)
    gallery = opened(tmp_path / "g")
    gallery.add("old", a)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", cut)
        for person in ("new", "old"):
            with pytest.raises(KeyboardInterrupt):
                gallery.add(person, vectors(2, 3), replace=person == "old")
        assert [m.person for m in gallery.search(vectors(2, 3), k=5)[0]] == ["old"]
        with pytest.raises(KeyboardInterrupt):
            gallery.compact()
    assert gallery.stats()["pictures"] == 8  # the leftovers, found by nobody
    gallery.close()
    with opened(tmp_path / "g") as gallery:
        assert gallery.stats()["pictures"] == 2 and gallery.get("new") is None
        assert gallery.search(a)[1] == [Match("old", pytest.approx(1, abs=1e-6), {})]
        assert len(gallery._store.collections()) == 3  # and the half-written copy is gone


@pytest.mark.parametrize("index", ["flat", "ivf", "hnsw"])
def test_a_torn_index_is_made_again_and_torn_data_are_told(tmp_path: Path, index: str) -> None:
    """A process killed while the database writes an index leaves part of a file."""
    rows = vectors(1, 50)
    with opened(tmp_path / "g", index=index) as gallery:
        for _ in gallery.add_many(Enrolment(f"p{i}", row) for i, row in enumerate(rows)):
            pass
    torn = list((tmp_path / "g").rglob("*.idx"))
    assert len(torn) >= 3
    for file in torn:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with opened(tmp_path / "g") as gallery:
        assert [m[0].person for m in gallery.search(rows, exact=True)] == [
            f"p{i}" for i in range(50)
        ]
    (data,) = (tmp_path / "g").glob("collections/*pictures*/partitions/*/data/*.parquet")
    data.write_bytes(data.read_bytes()[:20])
    with pytest.raises(UserError, match="cannot be read"):
        opened(tmp_path / "g")


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    opened(tmp_path / "g").close()
    with pytest.raises(UserError, match="model aaaaaaaaaaaa and the model given is bbbbbbbbbbbb"):
        opened(tmp_path / "g", fingerprint="b" * 64)
    with pytest.raises(UserError, match="16 numbers and the model gives 32"):
        opened(tmp_path / "g", dim=32)
    with pytest.raises(UserError, match="made with the index flat, not hnsw"):
        opened(tmp_path / "g", index="hnsw")
    with pytest.raises(UserError, match="did you mean 'flat'"):
        opened(tmp_path / "g", index="flta")
    with pytest.raises(UserError, match="no gallery at"):
        opened(tmp_path / "none", create=False)
    with pytest.raises(UserError, match="no address of a Milvus server"):
        Gallery.open("ftp://x/y", fingerprint=MODEL, dim=DIM)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        opened(tmp_path / "full")
    with opened(tmp_path / "g") as gallery:
        new = [Enrolment("x", np.ones((2, 3), np.float32), {"k": 1})]
        gallery.reembed(lambda _: new, fingerprint="c" * 64, dim=3)
        assert gallery.search(np.ones(3))[0][0].person == "x"
    with opened(tmp_path / "g", fingerprint="c" * 64, dim=3) as gallery:
        assert gallery.get("x") == module.Person("x", 2, {"k": 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings": np.full(DIM, np.nan)}, "zero, infinite or not a number"),
        ({"embeddings": np.zeros(DIM)}, "zero, infinite"),
        ({"embeddings": np.ones(DIM - 1)}, r"gallery takes \(n, 16\)"),
        ({"embeddings": np.ones((0, DIM))}, "without a picture"),
        ({"embeddings": np.ones((1001, DIM))}, "1000 is the most"),
        ({"person": ""}, "1 to 200"),
        ({"person": "  "}, "1 to 200"),
        ({"person": "x" * 201}, "1 to 200"),
        ({"person": "\ud800"}, "not valid Unicode"),
        ({"metadata": {"x": float("nan")}}, "not JSON"),
        ({"metadata": {"x": b""}}, "not JSON"),
        ({"metadata": {"x": ["\ud800"]}}, "not valid Unicode"),
        ({"metadata": {"\ud800": 1}}, "not valid Unicode"),
        ({"metadata": [1]}, "no JSON object"),
        ({"metadata": {"x": "y" * 20_000}}, "16,384 is the most"),
        ({"sources": ["a", "b"]}, "1 pictures and 2 sources"),
        ({"sources": ["a" * 9000]}, "9002 bytes"),
    ],
)
def test_what_cannot_be_stored_is_refused(
    shared: Gallery, change: dict[str, object], message: str
) -> None:
    good = {"person": "x", "embeddings": np.ones(DIM)}
    with pytest.raises(UserError, match=message):
        shared.add(**{**good, **change})  # type: ignore[arg-type]
    assert shared.get("x") is None


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory):
    with opened(tmp_path_factory.mktemp("gallery") / "g") as gallery:
        gallery.add("bystander", vectors(99, 1), metadata={"kept": True})
        yield gallery


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@example(name='x" or "1" == "1')
@example(name="key in ['stamp'] or true // '")
@example(name="bystander\x00")
@example(name="%' like \\")
@example(name="../../collections")
@example(name="\u202e[red]{a}\n$meta")
@given(name=st.text(min_size=1, max_size=30).filter(str.strip))
def test_any_name_is_a_name_and_nothing_more(shared: Gallery, name: str) -> None:
    row = vectors(len(name), 1)
    before = shared.people()
    shared.add(name, row, metadata={name: name})
    found = shared.get(name)
    assert found is not None and list(found.metadata.values()) == [name]
    assert found in shared.people() and shared.search(row, k=2)[0][0].score > 0.999
    assert shared.remove(name) == 1
    assert shared.people() == before


def test_threads_see_people_whole_and_in_order(tmp_path: Path) -> None:
    """While people are added, replaced and removed, a search finds them whole or not at all."""
    seen: list[str] = []
    errors: list[BaseException] = []
    stop = threading.Event()
    rows = {f"p{i}": vectors(i, 3) for i in range(12)}

    with opened(tmp_path / "g") as gallery:
        gallery.add("always", vectors(500, 1))

        def look() -> None:
            try:
                while not stop.is_set():
                    matches = gallery.search(np.concatenate([*rows.values()]), k=20)
                    for name, mine in zip(rows, range(0, 36, 3), strict=True):
                        there = [
                            any(m.person == name and m.score > 0.999 for m in matches[mine + j])
                            for j in range(3)
                        ]
                        if any(there) != all(there):
                            seen.append(name)
                    assert all("always" in [m.person for m in some] for some in matches)
            except BaseException as error:
                errors.append(error)

        def change(names: list[str]) -> None:
            try:
                for _ in range(3):
                    for name in names:
                        gallery.add(name, rows[name])
                        gallery.add(name, rows[name], replace=True)
                    for name in names:
                        assert gallery.remove(name) == 3
            except BaseException as error:
                errors.append(error)

        readers = [threading.Thread(target=look) for _ in range(2)]
        writers = [threading.Thread(target=change, args=(list(rows)[i::3],)) for i in range(3)]
        for thread in readers + writers:
            thread.start()
        for thread in writers:
            thread.join()
        stop.set()
        for thread in readers:
            thread.join()
        assert not errors and not seen
        assert [person.name for person in gallery.people()] == ["always"]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that many clients may use: Milvus Lite behind a TCP port."""
    from milvus_lite.adapter.grpc.server import start_server_in_thread

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = str(tmp_path_factory.mktemp("server"))
    server, database, _ = start_server_in_thread(folder, host="127.0.0.1", port=port)
    yield f"http://127.0.0.1:{port}"
    server.stop(grace=5).wait()
    database.close()


@pytest.fixture
def clients(address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Gallery, Gallery]]:
    """Two clients of a new gallery on a server, as two processes are."""
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.5)
    empty = Store(address)
    for name in empty.collections():
        empty.drop(name)
    empty.close()
    with (
        Gallery.open(address, fingerprint=MODEL, dim=DIM) as one,
        Gallery.open(address, fingerprint=MODEL, dim=DIM) as other,
    ):
        yield one, other


def again(there: list) -> list[Enrolment]:
    """Everybody as they are, for `Gallery.reembed`: who is called p7 has the vectors of seed 7."""
    return [Enrolment(p.name, vectors(int(p.name[1:]), p.pictures), p.metadata) for p, _ in there]


def names(gallery: Gallery) -> list[str]:
    return [person.name for person in gallery.people()]


def test_nobody_is_lost_while_others_remove_compact_and_reembed(
    clients: tuple[Gallery, Gallery],
) -> None:
    one, other = clients
    errors: list[BaseException] = []
    acknowledged, refused = [], []
    moved = threading.Event()
    one.add("p0", vectors(0, 2))

    def add() -> None:
        number = 1
        try:
            while not moved.is_set() or number < 20:
                try:
                    one.add(f"p{number}", vectors(number, 2))
                    acknowledged.append(f"p{number}")
                except UserError as error:
                    refused.append(str(error))
                    continue
                finally:
                    assert one.search(vectors(0, 2))[1][0].score > 0.999
                number += 1
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=add)
    thread.start()
    for _ in range(3):
        gone = vectors(99, 1)
        other.add("gone", gone)
        other.remove("gone")
        other.compact()
        other.reembed(again, fingerprint=MODEL, dim=DIM)
    moved.set()
    thread.join()
    assert not errors
    assert sorted(names(one)) == sorted(["p0", *acknowledged]) == sorted(names(other))
    assert refused and all("being moved" in error for error in refused)
    for name in acknowledged:
        matches = other.search(vectors(int(name[1:]), 2), k=1)
        assert [m[0].person for m in matches] == [name] * 2
    assert len(one._store.collections()) == 3
    assert other.stats()["pictures"] == 2 * (1 + len(acknowledged))


def test_a_move_waits_for_the_change_under_way_and_stops_the_next(
    clients: tuple[Gallery, Gallery],
) -> None:
    one, other = clients
    one.add("p1", vectors(1, 1))
    put, added = one._store.put, []

    def slow(name: str, rows: list[Row]) -> None:
        if "people" in name:
            mover.start()
            while not module._leases(one._store):
                time.sleep(0.01)
            time.sleep(0.2)
        put(name, rows)

    def embed(there: list) -> Iterator[Enrolment]:
        added.extend(person.name for person, _ in there)
        for change in (
            lambda: one.add("p3", vectors(3, 1)),
            lambda: one.remove("p1"),
            lambda: one.set_metadata("p1", {"a": 1}),
            lambda: other_too.reembed(again, fingerprint=MODEL, dim=DIM),
        ):
            with pytest.raises(UserError, match="another process"):
                change()
        yield from again(there)

    uri = one.stats()["uri"]
    with Gallery.open(uri, fingerprint=MODEL, dim=DIM) as other_too:
        mover = threading.Thread(
            target=other.reembed, args=(embed,), kwargs={"fingerprint": "b" * 64, "dim": DIM}
        )
        one._store.put = slow  # type: ignore[method-assign]
        one.add("p2", vectors(2, 1))
        one._store.put = put  # type: ignore[method-assign]
        mover.join()
        assert sorted(added) == names(other) == ["p1", "p2"]
    for look in (lambda: one.search(vectors(1, 1)), one.people, lambda: one.remove("p1")):
        with pytest.raises(UserError, match="was moved to another model"):
            look()
    assert not module._leases(other._store)


def test_what_died_on_a_server_stands_in_nobodys_way_for_ever(
    clients: tuple[Gallery, Gallery], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = clients
    one.add("p1", vectors(1, 1))

    def row(key: str, age: float, **content: object) -> Row:
        text = json.dumps({"time": time.time() - age, **content})
        return Row(key, text, np.array([1, 0], np.float32))

    # A process that died while it moved the gallery, one that died while it changed it.
    one._store.create(f"{module.PREFIX}people_7", DIM)
    one._store.put(module.META, [row("lease-a", 60)])
    with pytest.raises(UserError, match="being moved"):
        one.add("p2", vectors(2, 1))
    other.compact()
    assert len(one._store.collections()) == 4  # it may be alive
    one._store.put(module.META, [row("lease-a", module.LEASE_SECONDS)])
    one.add("p2", vectors(2, 1))
    other.compact()
    assert len(one._store.collections()) == 3
    one._store.put(module.META, [row("note-a-0", 60, pictures=["a.b"])])
    with pytest.raises(UserError, match="being changed by another process"):
        other.reembed(again, fingerprint=MODEL, dim=DIM)
    one._store.put(module.META, [row("note-a-0", module.NOTE_SECONDS, pictures=["a.b"])])
    other.reembed(again, fingerprint=MODEL, dim=DIM)
    assert names(one) == ["p1", "p2"]

    # Who saw no gallery, though there is one by now, does not make it anew.
    stamp = module._create(one._store, MODEL, DIM, "flat")
    assert stamp == other._stamp and names(other) == ["p1", "p2"]

    # Who slept for longer than the lease counts does not move the gallery any more.
    def slept(there: list) -> list[Enrolment]:
        monkeypatch.setattr(module, "LEASE_SECONDS", 0)
        return again(there)

    with pytest.raises(UserError, match="did not answer for long"):
        other.reembed(slept, fingerprint="b" * 64, dim=DIM)
    assert names(one) == ["p1", "p2"] and len(one._store.collections()) == 3


def test_a_server_is_asked_for_what_a_folder_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server here: what goes to the client is checked, not what a server makes of it."""
    import pymilvus

    made: dict[str, object] = {}
    real = pymilvus.MilvusClient

    class Client:
        create_schema = staticmethod(real.create_schema)
        prepare_index_params = staticmethod(real.prepare_index_params)

        def __init__(self, **options: object) -> None:
            made["client"] = options

        def create_collection(self, name: str, **options: object) -> None:
            made[name] = options

        def create_index(self, name: str, params: list, **options: object) -> None:
            (made["index"],) = params
            made["waits"] = options["sync"]

        def load_collection(self, name: str) -> None:
            made["loaded"] = name

    monkeypatch.setattr(pymilvus, "MilvusClient", Client)
    store = Store("http://milvus.example:19530/lobby", token="user:secret")
    assert not store.local
    assert made["client"] == {"uri": "http://milvus.example:19530/lobby", "token": "user:secret"}
    store.create("c", 512, "hnsw")
    options = made["c"]
    assert isinstance(options, dict)
    assert options["consistency_level"] == "Strong" and options["num_shards"] == 1
    assert made["waits"] and made["loaded"] == "c"
    assert made["index"].get_index_configs() == {  # type: ignore[attr-defined]
        "M": 16,
        "efConstruction": 200,
        "index_type": "HNSW",
        "metric_type": "IP",
    }


def test_decide() -> None:
    best = Match("a", 0.5, {})
    assert decide([best, Match("b", 0.4, {})], 0.5) is best
    assert decide([best], 0.51) is None and decide([], 0.0) is None
