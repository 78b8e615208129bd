"""A gallery outlives the death of the processes that fill it, and of its server."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from gallery_worker import kill_clients, kill_server

from postgres import Postgres


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
