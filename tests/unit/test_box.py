"""The model that comes with the package, and graphs that share a model's weights."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from sphereface2 import backbones
from sphereface2.backbones import bundle
from sphereface2.backbones.onnx import OnnxNetwork
from sphereface2.data import synthetic
from sphereface2.embedder import Embedder
from sphereface2.errors import UserError
from sphereface2.evaluation.all_pairs import AllPairsResult
from sphereface2.recognition.box import MODEL
from sphereface2.recognition.evaluate import evaluate
from sphereface2.recognition.export import export
from sphereface2.recognition.face_embedder import FaceEmbedder

FOLDER = MODEL.parent


def crops(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [synthetic.render(synthetic.Identity.draw(rng), rng) for _ in range(count)]


def test_it_is_small_and_says_what_it_may_be_used_for() -> None:
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir() if path.is_file()}
    expected = {"model.onnx", "model.safetensors", "config.json", "calibration.json"}
    assert files.keys() == expected | {"README.md", "LICENSE"}
    assert sum(files.values()) <= 8_000_000
    card = (FOLDER / "README.md").read_text()
    for fact in ("license: other", "research", "decide", "CelebA", "dlib"):
        assert fact in card, fact


def test_the_graph_computes_what_torch_does_and_the_calibration_is_its_own() -> None:
    ours = FaceEmbedder.from_pretrained()
    theirs = FaceEmbedder.from_pretrained(FOLDER)
    assert isinstance(ours.network, OnnxNetwork) and isinstance(theirs.network, torch.nn.Module)
    assert ours.fingerprint == theirs.fingerprint
    assert ours.calibration is not None and ours.calibration.far_default == 1e-3
    first, second = (one.embed(crops(3), aligned=True) for one in (ours, theirs))
    np.testing.assert_allclose((first * second).sum(1), 1, atol=1e-5)
    again = pickle.loads(pickle.dumps(ours.network))
    pixels = ours.network.preprocessing.arrays(crops(1))
    np.testing.assert_array_equal(again(pixels), ours.network(pixels))


def test_no_torch_is_imported() -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from sphereface2 import FaceEmbedder\n"
        "import numpy as np\n"
        "e = FaceEmbedder.from_pretrained()\n"
        "print(e.embed(np.zeros((112, 112, 3), np.uint8), aligned=True).shape)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "(144,)\n", done.stderr


def test_evaluate_judges_it_where_no_model_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faces = synthetic.write(tmp_path / "set", people=3, images_per_person=3, pairs_per_fold=2)
    found = evaluate(all_pairs=faces)
    assert found.checkpoint == str(MODEL) and len(found.of(AllPairsResult)) == 1
    assert "for research only" in capsys.readouterr().err


@pytest.mark.parametrize("half", [False, True])
def test_a_graph_reads_the_weights_beside_it(tmp_path: Path, half: bool) -> None:
    net = backbones.build("sfnet4", width=0.25, embedding_dim=8, input_size=32, batch_norm=True)
    with torch.no_grad():
        net(torch.randn(16, 3, 32, 32))  # running statistics that are not the initial ones
    model = tmp_path / "model"
    model.mkdir()
    bundle.save(net, model)
    if half:
        weights = safetensors.torch.load_file(model / bundle.WEIGHTS)
        halves = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
        safetensors.torch.save_file(halves, model / bundle.WEIGHTS)
    written = export(model, to="onnx", share_weights=True)
    assert written.cosine_min > 0.99999
    assert written.bytes < 0.2 * (model / bundle.WEIGHTS).stat().st_size
    moved = model.rename(tmp_path / "moved")
    embeddings = [Embedder.load(path).embed(crops(2)) for path in (moved / "model.onnx", moved)]
    np.testing.assert_allclose(embeddings[0], embeddings[1], atol=1e-5)
    with pytest.raises(UserError, match="must lie beside its weights"):
        export(moved, to="onnx", share_weights=True, out=tmp_path / "other.onnx")
    (moved / bundle.WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"model\.onnx"):
        Embedder.load(moved / "model.onnx")


@pytest.mark.slow
@pytest.mark.skipif("SPHEREFACE2_DATA" not in os.environ, reason="needs LFW as lfw.bin")
def test_the_cards_figure_on_lfw() -> None:
    from sphereface2.data.opening import load_pairs
    from sphereface2.evaluation.verification import kfold_accuracy, pair_scores

    data = Path(os.environ["SPHEREFACE2_DATA"])
    lfw = load_pairs(data / "lfw.bin", names=data / "lfw_pairs.txt")
    scores = pair_scores(Embedder.load(MODEL).embed_pairs(lfw), lfw.pairs)
    found = 100 * kfold_accuracy(scores, lfw.same, lfw.folds).accuracy
    assert f"LFW | {found:.2f} %" in (FOLDER / "README.md").read_text()
