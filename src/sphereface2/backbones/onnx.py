"""An exported network: an ONNX file, run by ONNX Runtime, without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from sphereface2 import onnx_runtime
from sphereface2.backbones.preprocessing import Preprocessing
from sphereface2.errors import UserError
from sphereface2.machine import compute_threads

FORMAT = "sphereface2-export"
FORMAT_VERSION = 1
METADATA_KEY = "sphereface2"
"""Of the ONNX metadata entry whose value is a JSON object; see `recognition.export`."""


class OnnxNetwork:
    """A file written by ``sphereface2 export --to onnx`` or ``import``, evaluated on the CPU.

    Called with normalised images, float32 (B, 3, h, w), it gives embeddings, float32
    (B, embedding_dim), not L2-normalised, as the network does that it was exported from. It pickles
    with the file's content.

    Args:
        source: path of the file, or its content.
        folder: with the content, that of the model whose weights it reads, if it holds none.
        threads: of one operator unless a call says otherwise; see `onnx_runtime.session`.

    Attributes:
        embedding_dim, input_size, preprocessing, metadata: of the network that it was
            exported from.
        content: of the file.
        fingerprint: of what the file computes: the checkpoint's for float32, its own for int8.
        description: all that the file says about itself.

    Raises:
        UserError: no file, damaged, or not written by ``sphereface2 export``; onnxruntime missing.
    """

    def __init__(
        self,
        source: str | Path | bytes,
        *,
        threads: int | None = None,
        folder: Path | None = None,
    ) -> None:
        label = "the exported network" if isinstance(source, bytes) else str(source)
        if not isinstance(source, bytes) and not Path(source).is_file():
            raise UserError(f"{label} does not exist or is no file: give an .onnx file")
        self.content = source if isinstance(source, bytes) else Path(source).read_bytes()
        self._threads = threads
        self._sessions: dict[int, Any] = {}  # by threads, each with the weights
        self._folder = folder if isinstance(source, bytes) else Path(source).resolve().parent
        self.description = _description(self._session(None, label), label)
        self.embedding_dim: int = self.description["embedding_dim"]
        self.preprocessing = Preprocessing.from_dict(self.description["preprocessing"])
        self.input_size = self.preprocessing.size
        self.metadata: dict[str, Any] = self.description["metadata"]
        self.fingerprint: str = self.description["fingerprint"]

    def __call__(self, images: np.ndarray, *, threads: int | None = None) -> np.ndarray:
        """Embeddings of images; ``threads``: of this call, for callers with several at once."""
        if images.dtype != np.float32 or images.shape[1:] != (3, *self.input_size):
            raise UserError(
                f"the network takes float32 images of shape (B, 3, {self.input_size[0]}, "
                f"{self.input_size[1]}), not {images.dtype} of shape {images.shape}"
            )
        session = self._session(threads)
        place = session.get_inputs()[0]
        # Foreign graphs may be for one image at a time.
        parts = np.split(images, len(images)) if place.shape[0] == 1 else [images]
        return np.concatenate([session.run(None, {place.name: part})[0] for part in parts])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sessions": {}}  # which do not pickle

    def _session(self, threads: int | None, label: str = "the exported network") -> Any:
        threads = threads or self._threads or compute_threads()
        if threads in self._sessions:
            return self._sessions[threads]
        try:
            session = onnx_runtime.session(self.content, threads=threads, folder=self._folder)
        except UserError:
            raise
        except Exception as error:  # onnxruntime's own exceptions share no base but this
            first = str(error).strip().splitlines()[0]
            raise UserError(f"{label} is damaged or not an ONNX file: {first}") from error
        return self._sessions.setdefault(threads, session)


def _description(session: Any, label: str) -> dict[str, Any]:
    """What the file says about itself, checked against its graph."""
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    try:
        described = json.loads(text) if text else None
    except (ValueError, RecursionError):
        described = None
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        raise UserError(
            f"{label} does not describe its inputs: give a file written by `sphereface2 export`, "
            "or make a model of it with `sphereface2 import FILE OUT --from onnx`"
        )
    if (version := described.get("format_version")) != FORMAT_VERSION:
        raise UserError(
            f"{label} has format version {version!r} and this package reads {FORMAT_VERSION}: "
            f"use the package version that wrote it ({described.get('package_version')})"
        )
    try:
        size = Preprocessing.from_dict(described["preprocessing"]).size
        shapes = [list(place.shape) for place in session.get_inputs() + session.get_outputs()]
        expected = [[3, *size], [described["embedding_dim"]]]
        fits = [shape[1:] for shape in shapes] == expected
        fits = fits and isinstance(described["fingerprint"], str)
        fits = fits and isinstance(described.setdefault("metadata", {}), dict)
    except (KeyError, UserError) as error:
        raise UserError(f"{label} lacks its preprocessing, dimension or fingerprint") from error
    if not fits:
        raise UserError(f"{label} is inconsistent: its description does not match its graph")
    return described
