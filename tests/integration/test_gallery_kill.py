"""A gallery among processes: one order of all they do, and nothing lost when they die."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from gallery_worker import kill_clients, kill_server
from serial_worker import Operation, compete, serial

from postgres import Postgres


def test_the_judge_of_orders_is_no_fool() -> None:
    write, read = ("write", 7, None), ("read", None)
    assert serial([Operation(*write, 0, 4), Operation(*read, [7, 7], 1, 3)])
    assert serial([Operation(*write, 0, 4), Operation(*read, [None, None], 1, 3)])
    assert not serial([Operation(*write, 0, 4), Operation(*read, [7, None], 1, 3)])
    assert not serial([Operation(*write, 0, 1), Operation(*read, [None, None], 2, 3)])
    seen = [Operation(*read, [7, 7], 1, 2), Operation(*read, [None, None], 3, 4)]
    assert not serial([Operation(*write, 0, 9), *seen])
    assert serial([Operation(*write, 0, 9), *reversed([s._replace(begun=1) for s in seen])])
    gone = Operation("remove", None, 1, 5, 6)
    assert serial([Operation(*write, 0, 4), gone, Operation(*read, [None, 7], 7, 8)])
    assert not serial([gone])


def test_three_processes_agree_on_one_order(tmp_path: Path, server: Postgres) -> None:
    for uri in (str(tmp_path / "g.db"), server.database()):
        count, histories = compete(uri, 3, 2)
        assert count > 50 and all(map(serial, histories.values()))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", ["sqlite", "postgresql"])
def test_two_processes_agree_on_one_order_for_a_minute(
    engine: str, tmp_path: Path, server: Postgres
) -> None:
    uri = str(tmp_path / "g.db") if engine == "sqlite" else server.database()
    count, histories = compete(uri, 2, 60)
    print(f"{engine}: {count} operations")
    assert count > 1000 and all(map(serial, histories.values()))


def test_two_kills_on_sqlite(tmp_path: Path) -> None:
    assert len(list(kill_clients(str(tmp_path / "g.db"), 2, seed=0))) == 2


def test_one_kill_of_a_client_and_one_of_the_server(server: Postgres) -> None:
    assert len(list(kill_clients(server.database(), 1, seed=0))) == 1
    assert len(list(kill_server(server.database(), server.kill, server.start, 1, seed=0))) == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_on_sqlite(tmp_path: Path) -> None:
    for line in kill_clients(str(tmp_path / "g.db"), 20, seed=1):
        print(line)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_of_clients_and_five_of_the_server(server: Postgres) -> None:
    for line in kill_clients(server.database(), 20, seed=1):
        print(line)
    for line in kill_server(server.database(), server.kill, server.start, 5, seed=1):
        print(line)
