"""The service's parts that decide alone: batching, keys, rates."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from sphereface2 import FaceEmbedder, backbones
from sphereface2.errors import UserError
from sphereface2.recognition.service import keys, server
from sphereface2.recognition.service.batching import Batcher


def test_what_arrives_while_the_network_is_busy_shares_a_pass_and_gets_its_own_row() -> None:
    sizes: list[int] = []
    entered, gate = threading.Event(), threading.Event()

    def forward(items: list[np.ndarray], batches: int) -> np.ndarray:
        sizes.append(len(items))
        entered.set()
        gate.wait(10)
        return np.stack(items) * 2

    batcher = Batcher(forward, max_batch=4, max_wait=0.01, on_the_way=lambda: 0)
    futures = [batcher.submit(np.array([0]))]
    assert entered.wait(10)
    futures += [batcher.submit(np.array([i])) for i in range(1, 10)]
    gate.set()
    assert [int(future.result(10)[0]) for future in futures] == [2 * i for i in range(10)]
    assert sizes == [1, 4, 4, 1]
    batcher.close()


def test_a_lone_item_does_not_wait_and_company_is_waited_for() -> None:
    sizes: list[int] = []

    def forward(items: list[np.ndarray], batches: int) -> np.ndarray:
        sizes.append(len(items))
        return np.stack(items)

    on_the_way = 0
    batcher = Batcher(forward, max_batch=8, max_wait=5.0, on_the_way=lambda: on_the_way)
    started = time.monotonic()
    batcher.submit(np.zeros(1)).result(10)
    assert time.monotonic() - started < 2
    on_the_way = 1
    first = batcher.submit(np.zeros(1))
    time.sleep(0.05)
    on_the_way = 0
    batcher.submit(np.zeros(1)).result(10)
    first.result(10)
    assert sizes == [1, 2]
    batcher.close()


def test_two_threads_share_the_work_and_know_it() -> None:
    both, seen = threading.Barrier(2), []

    def forward(items: list[np.ndarray], batches: int) -> np.ndarray:
        both.wait(10)  # as long as one batch waits for the other, nobody passes
        seen.append((len(items), batches))
        return np.stack(items)

    batcher = Batcher(forward, max_batch=2, max_wait=0, on_the_way=lambda: 0, workers=2)
    first = batcher.submit(np.zeros(1))
    time.sleep(0.05)
    futures = [first, batcher.submit(np.ones(1)), batcher.submit(np.ones(1))]
    assert [future.result(10)[0] for future in futures[:2]] == [0, 1]
    assert {batches for _, batches in seen} == {1, 2}
    both.abort()
    batcher.close()
    assert not batcher.alive


def test_a_failed_pass_fails_its_items_and_no_other() -> None:
    def forward(items: list[np.ndarray], batches: int) -> np.ndarray:
        if items[0][0] < 0:
            raise ArithmeticError
        return np.stack(items)

    batcher = Batcher(forward, max_batch=1, max_wait=0, on_the_way=lambda: 0)
    bad, good = batcher.submit(np.array([-1])), batcher.submit(np.array([1]))
    assert isinstance(bad.exception(10), ArithmeticError)
    assert good.result(10)[0] == 1
    waiting = batcher.submit(np.array([3]))
    batcher.close()  # finishes what was accepted
    assert waiting.done() and not batcher.alive
    with pytest.raises(RuntimeError):
        batcher.submit(np.array([1]))


def test_keys_are_known_by_their_hash_alone_and_can_be_withdrawn(tmp_path: Path) -> None:
    path = tmp_path / "new" / "keys.json"
    one, two = keys.add("one", path), keys.add("two", path)
    text = path.read_text()
    assert one.split("_", 2)[2] not in text and two.split("_", 2)[2] not in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    admitted = keys.KeyFile(path)
    for token, name in ((one, "one"), (two, "two")):
        found = admitted.check(token)
        assert found is not None and found.name == name
    # The id of one with the secret of the other, a changed letter, what is no key at all.
    swapped = "_".join([*one.split("_", 2)[:2], two.split("_", 2)[2]])
    changed = one[:-1] + ("A" if one[-1] != "A" else "B")
    for token in (swapped, changed, one[:-1], one + "A", "", "sf2__", "x" * 10_000, one + "\n"):
        assert admitted.check(token) is None
    assert [key.name for key in keys.remove("one", path)] == ["one"]
    assert admitted.check(one) is None and admitted.check(two) is not None
    path.write_text("{")
    assert admitted.check(two) is None


def test_keys_made_and_withdrawn_by_many_processes_at_once_are_all_what_was_said(
    tmp_path: Path,
) -> None:
    path = tmp_path / "keys.json"
    for i in range(4):
        keys.add(f"old{i}", path)
    command = [sys.executable, "-c", _KEYS, str(path)]
    workers = [subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE) for i in range(4)]
    tokens = [token for one in workers for token in one.communicate(timeout=60)[0].split()]
    assert [one.returncode for one in workers] == [0] * 4
    assert {key.name for key in keys.read(path)} == {f"{i}-{j}" for i in range(4) for j in range(5)}
    admitted = keys.KeyFile(path)
    assert len(tokens) == 20 and all(admitted.check(token.decode()) for token in tokens)


_KEYS = """
import sys
from sphereface2.recognition.service import keys
path, i = sys.argv[1:]
keys.remove(f"old{i}", path)
for j in range(5):
    print(keys.add(f"{i}-{j}", path))
"""


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "null", '{"format": "sphereface2-keys", "keys": [{"id": 1}]}']
)
def test_a_damaged_key_file_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"keys\.json"):
        keys.KeyFile(path)


def test_a_key_file_without_keys_or_with_a_bad_hash_admits_nobody(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    keys.add("one", path)
    with pytest.raises(UserError, match="already"):
        keys.add("one", path)
    content = json.loads(path.read_text())
    content["keys"][0]["salt"] = "not hexadecimal"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="damaged"):
        keys.KeyFile(path)
    path.write_text(json.dumps({**content, "keys": []}))
    with pytest.raises(UserError, match="no key"):
        keys.KeyFile(path)
    with pytest.raises(UserError, match="does not exist"):
        keys.KeyFile(tmp_path / "other.json")


@pytest.mark.parametrize("rotations", [False, True])
def test_rotations_reach_what_finds_faces(tmp_path, monkeypatch, rotations):
    network = backbones.build("sfnet4", width=0.125, input_size=32, embedding_dim=16)
    embedder = FaceEmbedder(network)
    monkeypatch.setattr(FaceEmbedder, "from_pretrained", lambda *_, **__: embedder)
    monkeypatch.setattr(server.DrainingServer, "run", lambda one: setattr(one, "started", True))
    server.run("model", str(tmp_path / "g.db"), server.Settings(rotations=rotations))
    assert embedder.aligner.rotations == rotations
