"""ONNX Runtime, imported in this one place, with its telemetry switched off."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any

from sphereface2.errors import UserError
from sphereface2.machine import compute_threads


def load() -> ModuleType:
    """Import the module ``onnxruntime``; every import of it in the package goes through here.

    ONNX Runtime 1.32 and later writes a device identifier below ``$HOME`` and asks a telemetry host
    when it starts, unless this environment variable is set before the import.

    Raises:
        UserError: it cannot be imported.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(
            f"ONNX Runtime cannot be imported ({error}): pip install onnxruntime"
        ) from error
    return onnxruntime


def session(model: bytes | Path, *, threads: int | None = None, folder: Path | None = None) -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU.

    Args:
        model: the file's content or its path.
        folder: with the content, where the files lie that it reads weights from.
        threads: of one operator; by default the cores, at most ``OMP_NUM_THREADS``.

    Raises:
        UserError: ONNX Runtime cannot be imported.
        Exception: of ONNX Runtime, which has no common base class: the model is damaged.
    """
    runtime = load()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or compute_threads()
    # Threads that spin while they wait take the cores from whatever else runs, here and elsewhere.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors arrive as exceptions
    if folder is not None:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(folder)
        )
    source = model if isinstance(model, bytes) else str(model)
    return runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
