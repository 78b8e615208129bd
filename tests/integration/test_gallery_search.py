"""Searches on both engines: those of brute force, whatever changes meanwhile."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from galleries import DIM, MODEL, agrees, brute_force, filled, opened, unit, vectors

from sphereface2.errors import UserError
from sphereface2.evaluation.neighbours import nearest_other
from sphereface2.recognition.gallery import (
    Enrolment,
    Gallery,
    Match,
    decide,
)
from sphereface2.recognition.gallery import ivf as ivf_module
from sphereface2.recognition.gallery.engines import Resident, exact
from sphereface2.recognition.gallery.ivf import Ivf, View


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


def test_k_people_are_found_though_one_has_the_nearest_hundreds(address: str) -> None:
    probe = vectors(0)
    with opened(address) as gallery:
        gallery.add("many", unit(probe) + 0.01 * vectors(1, 600))
        for i in range(3):
            gallery.add(f"other {i}", vectors(10 + i))
        found = gallery.search(probe, k=3)[0]
        assert found[0].person == "many" and len({m.person for m in found}) == 3
        assert len(gallery.search(probe, k=9)[0]) == 4  # as many as there are


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


def test_a_change_read_in_part_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sphereface2.recognition.gallery.engines._SCORES", 1)  # a probe at a time
    probes = vectors(50_000, 6)
    with opened(tmp_path / "g.db") as gallery, opened(tmp_path / "g.db") as other:
        people = filled(gallery)
        gallery.set_index(256)
        gallery.warm_up()
        gallery._search._residents[0].ivf.wait()
        more = {f"q{i}": vectors(5000 + i, 2) for i in range(700)}
        list(other.add_many(Enrolment(name, rows) for name, rows in more.items()))
        people |= more
        append, calls = Resident._append, iter(range(9))

        def cut_short(self: Resident, *words: object) -> None:
            append(self, *words)  # type: ignore[arg-type]
            if next(calls) == 0:
                raise sqlite3.OperationalError("disk I/O error")

        monkeypatch.setattr(Resident, "_append", cut_short)
        with pytest.raises(UserError, match="disk I/O error"):
            gallery.search(probes)
        found = gallery.search(probes, k=4, exact=True)
        agrees(found, brute_force(people, probes, "max", 4))
        # By the index too: of 16 numbers, each image's own code is among the nearest.
        own = gallery.search(np.stack([rows[0] for rows in more.values()]), k=1)
        assert [one[0].person for one in own] == list(more)


def test_embeddings_made_again_by_the_same_model_are_seen_by_other_processes(
    tmp_path: Path,
) -> None:
    with opened(tmp_path / "g.db") as gallery, opened(tmp_path / "g.db") as other:
        gallery.add("a", vectors(0, 1))
        other.search(vectors(0), k=1)
        new = vectors(1, 1)
        gallery.reembed(
            lambda stored: [(one.id, new[0]) for _, theirs in stored for one in theirs],
            fingerprint=MODEL,
            dim=DIM,
        )
        assert other.search(new, k=1)[0][0].score == pytest.approx(1, abs=1e-5)


def test_a_search_leaves_pytorch_its_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sphereface2.evaluation.neighbours.ALL", 0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with opened(tmp_path / "g.db") as gallery:
            gallery.set_index(256)
            filled(gallery)
            gallery.search(vectors(0))
            gallery.warm_up()
            gallery._search._residents[0].ivf.wait()
            gallery.search(vectors(0))
        nearest_other(unit(vectors(1, 60)), np.arange(60), unit(vectors(2, 60)), workers=1)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


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
        assert not kept.exists() and index._view.seq >= 0
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


def test_images_that_come_while_an_index_is_built_are_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, ids = unit(vectors(3, 320)).astype(np.float32), np.arange(320)
    first, second = (
        View(seq, rows[:count], ids[:count], ids[:count], np.zeros(0, int))
        for seq, count in ((1, 300), (2, 320))
    )
    begun, trained = threading.Event(), ivf_module._trained
    monkeypatch.setattr(ivf_module, "_trained", lambda *words: begun.wait(10) and trained(*words))
    index = Ivf(tmp_path / "index", lambda write: write(2), first)
    index.update(second, 20, False)
    assert index.search(second, rows[310], 1) is None  # not yet
    begun.set()
    index.wait()
    assert index._index.ntotal == 320 and (tmp_path / "index").exists()
    assert index.search(second, rows[310], 1) == [(310, pytest.approx(1, abs=1e-5))]
    assert index.search(first, rows[310], 1) is None  # of a state that is no more


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


def test_decide() -> None:
    best = Match("a", 0.5, {})
    assert decide([best, Match("b", 0.4, {})], 0.5) is best
    assert decide([best], 0.51) is None and decide([], 0.0) is None
