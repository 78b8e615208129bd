"""An exported network: an ONNX file, run by ONNX Runtime in the place of a backbone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sphereface2.backbones.base import Backbone
from sphereface2.backbones.preprocessing import Preprocessing
from sphereface2.errors import UserError

FORMAT = "sphereface2-export"
FORMAT_VERSION = 1
METADATA_KEY = "sphereface2"
"""Of the ONNX metadata entry whose value is a JSON object; see `recognition.export`."""


class OnnxNetwork(Backbone):
    """A file written by ``sphereface2 export --to onnx``, in evaluation only, on the CPU.

    It has the `preprocessing`, `embedding_dim`, `input_size` and `metadata` of the network it was
    exported from, and takes and gives what that one does. Images and embeddings may lie on any
    device. It runs on as many threads as torch did when it was loaded. It pickles, with the file's
    content.

    Args:
        source: path of the file, or its content.

    Attributes:
        fingerprint: of what the file computes: the checkpoint's for float32, its own for int8.
        description: all that the file says about itself.

    Raises:
        UserError: no file, damaged, or not written by ``sphereface2 export``; onnxruntime missing.
    """

    def __init__(self, source: str | Path | bytes):
        label = "the exported network" if isinstance(source, bytes) else str(source)
        if isinstance(source, bytes):
            content = source
        elif Path(source).is_file():
            content = Path(source).read_bytes()
        else:
            raise UserError(f"{label} does not exist or is no file: give an .onnx file")
        session = _start(content, label)
        described = _description(session, label)
        super().__init__(described["embedding_dim"], described["preprocessing"]["size"], stride=1)
        self.preprocessing = Preprocessing.from_dict(described["preprocessing"])
        self.metadata = described["metadata"]
        self.fingerprint: str = described["fingerprint"]
        self.description = described
        self._content = content
        self._session = session
        self._input = session.get_inputs()[0].name
        self.eval()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_session": None}  # which does not pickle

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._session = _start(self._content, "the exported network")

    def embed(self, images: Tensor) -> Tensor:
        pixels = np.ascontiguousarray(images.detach().float().cpu().numpy())
        (embeddings,) = self._session.run(None, {self._input: pixels})
        return torch.from_numpy(embeddings).to(images.device)


def _start(content: bytes, label: str) -> Any:
    """A session of ONNX Runtime that computes what the file's content says."""
    runtime = import_runtime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors come as exceptions
    try:
        return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions share no base but this
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{label} is damaged or no ONNX file: {first}") from error


def import_runtime() -> Any:
    """The module onnxruntime, or a UserError that says how to install it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(
            "ONNX files need ONNX Runtime: pip install 'sphereface2[export]'"
        ) from error
    return onnxruntime


def _description(session: Any, label: str) -> dict[str, Any]:
    """What the file says about itself, checked against its graph."""
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    try:
        described = json.loads(text) if text else None
    except (ValueError, RecursionError):
        described = None
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        raise UserError(f"{label} was not written by `sphereface2 export`, which tells its inputs")
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
        raise UserError(f"{label} contradicts itself: its description is not of its graph")
    return described
