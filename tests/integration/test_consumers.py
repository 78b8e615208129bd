"""Other projects' packages, as PyPI has them, on files that ``export`` writes for them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from sphereface2 import backbones
from sphereface2.align.template import TEMPLATE, warp
from sphereface2.backbones import bundle
from sphereface2.data import synthetic
from sphereface2.embedder import Embedder
from sphereface2.recognition.export import export

PAGE = Path(__file__).parents[2] / "docs" / "export.md"
PACKAGES = ["insightface>=2.1,<3", "deepface>=0.0.101", "gdown", "beautifulsoup4", "soupsieve"]
"""Without what they depend on: insightface would put a second OpenCV over ours."""

WHOLE = """
from insightface.app.common import Face

face = Face(kps=np.load("landmarks.npy"), bbox=np.zeros(4), det_score=1.0)
embeddings = [model.get(cv2.imread("photograph.png"), face)]
"""


@pytest.mark.slow
def test_insightface_and_deepface_embed_equally(tmp_path: Path) -> None:
    """The recipes of the page, in processes of their own."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", "packages"]
    subprocess.run([*pip, *PACKAGES], cwd=tmp_path, check=True)
    torch.manual_seed(0)
    net = backbones.build(
        "sfnet4", width=0.25, embedding_dim=64, input_size=(112, 96), colour_order="BGR",
        mean=(100.0, 110.0, 120.0), std=(60.0, 61.0, 62.0),
    ).eval()  # fmt: skip
    (tmp_path / "net").mkdir()
    bundle.save(net, tmp_path / "net")
    export(tmp_path / "net", to="insightface", out=tmp_path / "model.insightface.onnx")
    embedder = Embedder(net, flip=False)
    rng = np.random.default_rng(0)
    crops = [synthetic.render(synthetic.Identity.draw(rng), rng) for _ in range(4)]
    np.save(tmp_path / "crops.npy", np.stack(crops)[..., ::-1])
    turn = np.array([[0.8, -0.3], [0.3, 0.8]])
    photograph = cv2.resize(np.concatenate(crops[:2], axis=1), (480, 240))
    landmarks = (TEMPLATE @ turn + (90, 10)).astype(np.float32)
    cv2.imwrite(str(tmp_path / "photograph.png"), photograph[..., ::-1])
    np.save(tmp_path / "landmarks.npy", landmarks)
    recipes = re.findall(r"^```py\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(recipes) == 2
    for recipe in recipes:
        np.testing.assert_allclose(_run(recipe, tmp_path), embedder.embed(crops), atol=1e-5)
    alone = embedder.embed([warp(photograph, landmarks)])
    # The two crops differ by the rounding of a 32nd of a pixel.
    np.testing.assert_allclose(_run(recipes[0] + WHOLE, tmp_path), alone, atol=2e-3)


def _run(recipe: str, folder: Path) -> np.ndarray:
    before = 'import cv2, numpy as np\ncrops = list(np.load("crops.npy"))\n'
    after = '\nnp.save("found.npy", embeddings)\n'
    kept = {
        **os.environ,
        "PYTHONPATH": "packages",
        "DEEPFACE_HOME": str(folder),
        "HOME": str(folder),
    }
    done = subprocess.run(
        [sys.executable, "-c", before + recipe + after],
        cwd=folder, env=kept, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = np.load(folder / "found.npy")
    return found / np.linalg.norm(found, axis=1, keepdims=True)
