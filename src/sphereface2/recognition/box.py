"""The model that comes with the package, for whoever names none."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from sphereface2 import console

MODEL = Path(__file__).parents[1] / "box" / "model.onnx"
"""A graph for ONNX Runtime, beside its weights, calibration, card and licence; torch loads the
folder."""

T = TypeVar("T", str, Path)


def chosen(model: T | None) -> T | str:
    """The model that a user names, or the package's own, of which one line on standard error tells.

    Example:
        >>> chosen("runs/NAME")
        'runs/NAME'
    """
    if model is not None:
        return model
    console.note(
        "model: the one that comes with sphereface2, for research only; its card: "
        f"{MODEL.with_name('README.md')}"
    )
    return str(MODEL)
