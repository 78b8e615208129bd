"""One change between any two statements of another, on a server: as if one came after the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import count, product
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from postgres import Postgres
from sphereface2.errors import UserError
from sphereface2.recognition.gallery import Gallery

DIM, MODEL = 8, "f" * 64
BLOCKED_SECONDS = 0.03  # a change that takes longer waits for the other


def rows(seed: int, images: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((images, DIM))


#: What is done to the people x and y; `image` is one of two images of x.
CHANGES: dict[str, Callable[[Gallery, int], object]] = {
    "remove": lambda gallery, image: gallery.remove("x"),
    "set": lambda gallery, image: gallery.set_metadata("x", {"v": 1}),
    "remove image": lambda gallery, image: gallery.remove_image("x", image),
    "rename": lambda gallery, image: gallery.rename("x", "y"),
    "rename back": lambda gallery, image: gallery.rename("y", "x"),
    "add": lambda gallery, image: len(gallery.add("x", rows(1, 2))),
    "replace": lambda gallery, image: len(gallery.add("x", rows(2, 2), replace=True)),
    "enrol": lambda gallery, image: len(gallery.add("x", rows(3, 1), known=False)),
    "add other": lambda gallery, image: len(gallery.add("y", rows(4, 2))),
}
READS: dict[str, Callable[[Gallery, int], object]] = {
    "search": lambda gallery, image: found(gallery),
    "stats": lambda gallery, image: list(gallery.stats().items())[:2],  # people and images
    "stored": lambda gallery, image: [(who, len(images)) for who, images in gallery.stored()],
}


def found(gallery: Gallery) -> list[object]:
    matches = gallery.search(rows(9, 1), k=4)[0]
    return [(match.person, round(match.score, 4), match.metadata) for match in matches]


def told(work: Callable[[Gallery, int], object], gallery: Gallery, image: int) -> object:
    try:
        return work(gallery, image)
    except UserError as error:
        return type(error).__name__


def state(gallery: Gallery) -> list[object]:
    means = [round(match.score, 4) for match in gallery.search(rows(9, 1), k=4, fusion="mean")[0]]
    return [gallery.people(), found(gallery), means]


def reset(gallery: Gallery, there: bool) -> int:
    """Nobody there, or x with two images, of whose ids this is one."""
    for name in "xy":
        gallery.remove(name)
    return gallery.add("x", rows(0, 2), metadata={"v": 0})[0] if there else 0


def between(
    one: Gallery, two: Gallery, first: Any, second: Any, image: int, place: int
) -> tuple[object, object] | None:
    """Both answers, the second asked after a statement of the first; None if it has fewer."""
    done, started = 0, list[Future[object]]()

    def statement(*_: object) -> None:
        nonlocal done
        done += 1
        if done == place:
            started.append(pool.submit(told, second, two, image))
            wait(started, timeout=BLOCKED_SECONDS)

    with ThreadPoolExecutor(1) as pool:
        sa.event.listen(one._db.engine, "after_cursor_execute", statement)
        try:
            answer = told(first, one, image)
        finally:
            sa.event.remove(one._db.engine, "after_cursor_execute", statement)
        return (answer, started[0].result(timeout=20)) if started else None


def check(server: Postgres, cases: Any) -> int:
    """How many places there were; AssertionError if an answer is that of neither order."""
    places = 0
    # What is on the disk after a crash is not asked here.
    address = server.database() + "?options=-csynchronous_commit%3Doff"
    with Gallery.open(address, fingerprint=MODEL, dim=DIM) as one, Gallery.open(address) as two:
        for a, b, there in cases:
            first, second = (CHANGES | READS)[a], CHANGES[b]
            image = reset(one, there)
            before = told(first, one, image), told(second, one, image), state(one)
            image = reset(one, there)
            late = told(second, one, image), told(first, one, image), state(one)
            right = [before, (late[1], late[0], late[2])]
            for place in count(1):
                got = between(one, two, first, second, reset(one, there), place)
                if got is None:
                    break
                assert (*got, state(one)) in right, (a, b, there, place, got, right)
                places += 1
    return places


def test_a_change_between_the_statements_of_another(server: Postgres) -> None:
    absent = [("remove", "add"), ("set", "enrol")]
    there = [("remove image", "rename"), ("rename", "add"), ("rename", "remove"), ("add", "rename")]
    cases = [(*pair, False) for pair in absent] + [(*pair, True) for pair in there]
    assert (
        check(server, [*cases, ("rename", "add other", True), ("add other", "rename", True)]) > 25
    )


def test_searches_and_the_index_do_not_wait_for_each_other(server: Postgres) -> None:
    address = server.database()
    database = address.rpartition("/")[2]
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
    with Gallery.open(address, fingerprint=MODEL, dim=DIM) as one, Gallery.open(address) as two:
        one.add("x", rows(0, 2))
        with ThreadPoolExecutor(1) as pool, two._db.read() as search:
            search.exec_driver_sql("SELECT count(*) FROM people")
            changed = pool.submit(one.set_index, None)
            while server.sql(waiting, database) == "0\n" and not changed.done():
                pass
            assert search.exec_driver_sql("SELECT count(*) FROM images").scalar() == 2
            search.exec_driver_sql("ROLLBACK")
            changed.result(timeout=20)
        assert two.search(rows(0, 1), k=1)[0][0].person == "x"
        with two._db.read() as search:  # there is no index left to take the tables for
            search.exec_driver_sql("SELECT count(*) FROM images")
            one.set_index(None)
        one.set_index(0)
        assert two.search(rows(0, 1), k=1)[0][0].person == "x"


@pytest.mark.slow
def test_the_index_goes_while_the_server_tidies_up(server: Postgres) -> None:
    """An autovacuum that would take a minute is stopped, as the server does for any lock."""
    address = server.database()
    database = address.rpartition("/")[2]
    running = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
        "AND query LIKE 'autovacuum: VACUUM%images'"
    )
    slow = "autovacuum_vacuum_cost_delay = 100, autovacuum_vacuum_cost_limit = 1"
    with Gallery.open(address, fingerprint=MODEL, dim=DIM) as gallery:
        for name in "vwxyz":  # four images a page, and a page in 100 ms
            crops = [np.random.default_rng(0).bytes(1_700)] * 500
            gallery.add(name, rows(0, 500), crops=crops)
        server.sql(f"ALTER TABLE images SET ({slow})", database)
        server.sql("ALTER SYSTEM SET autovacuum_naptime = '1s'")
        server.sql("SELECT pg_reload_conf()")
        try:
            until = time.monotonic() + 60
            while server.sql(running, database) == "0\n":
                assert time.monotonic() < until
                time.sleep(0.05)
            start = time.monotonic()
            gallery.set_index(None)
            assert time.monotonic() - start < 10
        finally:
            server.sql("ALTER SYSTEM RESET autovacuum_naptime")
            server.sql("SELECT pg_reload_conf()")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_change_between_the_statements_of_every_other(server: Postgres) -> None:
    print(check(server, product(CHANGES | READS, CHANGES, (False, True))), "places")
