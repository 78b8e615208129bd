"""The script that measures on a GPU, at toy size on the CPU, and the rival that it measures."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpu import backbones, capacity, partial_fc, run, speedrun, steps
from gpu import heads as head_table
from gpu import tests as device_tests
from gpu.measure import Part
from sphereface2 import heads

SCRIPT = Path(run.__file__)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("module", "column", "rows"),
    [(head_table, "× bf16", 20), (capacity, "seconds a step", 2), (partial_fc, "× Partial-FC", 6)],
)
def test_parts_measure_every_row(module, column, rows):
    saved = []
    part = Part(CPU, tiny=True, save=lambda rows: saved.append(len(rows)))
    module.run(part)
    assert part.failures == 0
    found = [row for row in part.rows if column in row]
    assert len(found) >= rows
    assert all(row[column] > 0 and "error" not in row for row in found)
    assert saved == list(range(1, len(part.rows) + 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "column"),
    [(steps, "× eager"), (backbones, "MFU full"), (speedrun, "held-out TAR@1e-1")],
)
def test_parts_train_on_synthetic_faces(module, column):
    part = Part(CPU, tiny=True, seconds=600)
    module.run(part)
    assert part.failures == 0
    assert 0 < part.rows[-1][column] <= 1


def test_an_endless_and_a_failing_part_are_recorded(tmp_path, monkeypatch):
    folder = tmp_path / "gpu"  # a second portion of the namespace package that holds the parts
    folder.mkdir()
    (folder / "endless.py").write_text("import time\ntime.sleep(60)")
    (folder / "fails.py").write_text("def run(part):\n    part.record(ran=True)\n    1 / 0")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(run, "PARTS", {"endless": 5, "fails": 100})
    monkeypatch.setattr(run, "GRACE", 0)
    arguments = argparse.Namespace(
        out=tmp_path / "out", seconds=200, tiny=True, device="cpu", data=tmp_path, limits=run.PARTS
    )
    assert run.run(list(run.PARTS), arguments) == 1
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    endless, fails = (results["parts"][name] for name in run.PARTS)
    assert (endless["status"], fails["status"]) == ("failed", "failed")
    assert "took more than 5 s and was ended" in endless["error"]
    assert fails["rows"] == [{"ran": True}]
    assert "ZeroDivisionError" in fails["output"]
    assert not re.search(f"{run.ROOT}/|{sys.executable}", json.dumps(results))
    assert "ZeroDivisionError" in fails["output"]
    assert results["environment"]["torch"] == torch.__version__
    assert len(list((tmp_path / "out").iterdir())) == 2


@pytest.mark.slow
def test_the_part_of_tests_keeps_what_was_found_before_its_time_was_up(tmp_path):
    (tmp_path / "test_good.py").write_text(
        "import pytest\ndef test_a(): pass\n@pytest.mark.skip\ndef test_b(): pass"
    )
    (tmp_path / "test_bad.py").write_text(
        "import pytest\n@pytest.mark.parametrize('word', ['a b'])\n"
        "def test_c(word): assert word == 'c'"
    )
    (tmp_path / "test_endless.py").write_text(
        "import time\ndef test_d(): pass\ndef test_e(): time.sleep(600)"
    )
    # As in the repository, whose options make pytest print dots.
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -q\nmarkers =\n gpu\n slow\n")
    part = Part(CPU, seconds=60)
    device_tests.run(part, tmp_path)
    bad, failure, endless, good = part.rows
    assert (bad["failed"], bad["status"], failure["test"].split("::")[1]) == (1, 1, "test_c[a b]")
    assert "assert 'a b' == 'c'" in failure["message"]
    assert (endless["passed"], endless["status"]) == (1, "cut short")
    assert good == {"module": "test_good", "passed": 1, "failed": 0, "skipped": 1, "status": 0}
    assert part.failures == 2


def test_an_unknown_part_is_refused():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--parts", "heads,speed"],
        capture_output=True,
        text=True,
        env={**os.environ, "OUT": "/nonexistent"},
    )
    assert done.returncode == 2
    assert "there is no part 'speed'; there are tests, heads" in done.stderr


def test_partial_fc_over_all_classes_is_arcface_with_sgd(device):
    torch.manual_seed(0)
    people, dim, batch = 60, 8, 12
    settings = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01}
    rival = partial_fc.PartialFC(
        dim, people, share=1.0, dtype=torch.float32, device=device, **settings
    )
    weight = torch.nn.Parameter(rival.weight.double())
    arcface = heads.build("arcface", dim, people, s=64.0, m=0.5).double().to(device)
    sgd = torch.optim.SGD([weight], **settings)
    for _ in range(3):
        x = torch.randn(batch, dim, device=device)
        labels = torch.randint(people, (batch,), device=device)
        ours = x.clone().requires_grad_()
        loss = rival.backward(ours, labels)
        theirs = x.double().requires_grad_()
        unit = torch.nn.functional.normalize(weight)
        with torch.no_grad():
            arcface.weight.copy_(unit)
        expected = arcface(theirs, labels)
        expected.backward()
        unit.backward(arcface.weight.grad)
        sgd.step()
        weight.grad = arcface.weight.grad = None
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-4, atol=0)
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(rival.weight.double(), weight.detach(), rtol=1e-3, atol=1e-4)


def test_partial_fc_samples_the_batchs_classes_and_a_share(device):
    torch.manual_seed(0)
    rival = partial_fc.PartialFC(8, 1000, share=0.1, device=device)
    labels = torch.tensor([3, 999, 3, 500], device=device)
    rows, own = rival.sample(labels)
    assert len(rows) == 100
    assert torch.equal(rows, rows.unique())
    assert torch.equal(rows[own], labels)
    before = rival.weight.clone()
    torch.manual_seed(1)
    rival.backward(torch.randn(4, 8, device=device, requires_grad=True), labels)
    changed = (rival.weight != before).any(1)
    assert changed[labels].all() and changed.sum() == 100
