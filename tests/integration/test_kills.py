"""Killed at any moment and resumed, a run ends in the weights of one that was not.

``make test`` tries a few moments of each kind, ``make test-slow`` twenty.
"""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
from killing import (
    SETTINGS,
    STEPS,
    Run,
    assert_equal,
    left_behind,
    metrics,
    stored_network,
    unpack_faces,
    weights,
)

KINDS: dict[str, tuple[int, dict[str, object]]] = {
    "one process": (1, {}),
    "workers, muon": (
        1,
        {"data.workers": 2, "data.cache": "ram", "training.optimizer": "muon"},
    ),
    "two ranks": (2, {}),
    "two ranks, average": (2, {"data.cache": "device", "training.ema": 0.9}),
    "two ranks, sharded": (
        2,
        {"head.sharded": "true", "data.cache": "ram", "training.ema": 0.9},
    ),
    "two ranks, workers": (2, {"data.workers": 1, "training.autocast": "bf16"}),
    "three ranks": (3, {}),
}


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack_faces(tmp_path_factory.mktemp("faces"))


@pytest.fixture(scope="module")
def whole(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An uninterrupted run of each kind, made when it is asked for."""
    runs: dict[str, Path] = {}

    class Made(dict[str, Path]):
        def __missing__(self, kind: str) -> Path:
            ranks, options = KINDS[kind]
            folder = tmp_path_factory.mktemp("whole") / "run"
            run = Run(folder, {**SETTINGS, **options, "data.train": faces}, ranks)
            assert run.wait() == [0] * ranks, run.told()
            network = "average" if "training.ema" in options else "backbone"
            assert_equal(stored_network(folder, network), weights(folder))
            self[kind] = folder
            return folder

    return Made(runs)


def kill_and_resume(
    kind: str, whole: dict[str, Path], faces: Path, folder: Path, seed: int, *, writing: bool
) -> bool:
    """One kill; False if the run had ended before it."""
    ranks, options = KINDS[kind]
    settings = {**SETTINGS, **options, "data.train": faces}
    expected = whole[kind]
    rng = random.Random(seed)
    run = Run(folder, settings, ranks)
    after, delay = rng.randrange(STEPS), rng.uniform(0, 0.02)
    alive = run.signal_when(
        signal.SIGKILL,
        lambda: run.steps() >= after and (not writing or run.is_writing()),
        delay / 4 if writing else delay,
    )
    run.wait()
    if not alive or len(metrics(folder)) >= len(metrics(expected)):
        return False
    again = Run(folder, settings, ranks)
    assert again.wait() == [0] * ranks, again.told()[-3000:]
    assert_equal(weights(folder), weights(expected))
    assert_equal(weights(folder, "best"), weights(expected, "best"))
    assert metrics(folder) == metrics(expected)
    network = "average" if "training.ema" in options else "backbone"
    assert_equal(stored_network(folder, network), weights(folder))
    assert not list(left_behind(folder))
    return True


@pytest.mark.parametrize("kind", ["workers, muon", "two ranks, sharded"])
def test_a_killed_run_goes_on_bit_for_bit(
    kind: str, whole: dict[str, Path], faces: Path, tmp_path: Path
) -> None:
    assert any(
        kill_and_resume(kind, whole, faces, tmp_path / str(seed), seed, writing=seed == 0)
        for seed in range(3)
    ), "every run ended before it was killed"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("writing", [False, True], ids=["any moment", "while writing"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kill_is_made_good(
    kind: str, writing: bool, whole: dict[str, Path], faces: Path, tmp_path: Path
) -> None:
    kills, seed = 0, 0
    while kills < 20:
        assert seed < 60, f"{kills} kills in {seed} runs"
        kills += kill_and_resume(
            kind, whole, faces, tmp_path / str(seed), 1000 * writing + seed, writing=writing
        )
        seed += 1
    print(f"{kind}: {kills} of {kills} kills made good")
