"""``examples/``: losses in other projects' training loops, and in another domain."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[2] / "examples"
BY_PIXELS = 0.21
"""Equal error rate of the images themselves, which whatever learns must be far below."""


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(EXAMPLES)
    torch.manual_seed(0)


@pytest.mark.parametrize("loss", ["sphereface2", "cosface"])
def test_trainers_of_pytorch_metric_learning(loss: str) -> None:
    example = importlib.import_module("metric_learning_trainer")
    assert example.main(epochs=2, loss=loss) < BY_PIXELS / 2


def test_lightning() -> None:
    pytest.importorskip("lightning")
    example = importlib.import_module("lightning_module")
    assert example.main(epochs=2) < BY_PIXELS / 2


def test_trainer_of_hugging_face() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    example = importlib.import_module("huggingface_trainer")
    assert example.main(epochs=2) < BY_PIXELS / 2


def test_the_comparison_of_letters() -> None:
    command = [sys.executable, EXAMPLES / "letters.py", "--seeds", "1", "--losses", "sphereface2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rates = dict(re.findall(r"^(\w+) +([\d.]+) ±", done.stdout, re.MULTILINE))
    assert float(rates["sphereface2"]) < float(rates["pixels"]) / 3
