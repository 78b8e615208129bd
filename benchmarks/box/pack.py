"""Make of a run the model that comes with the package: ``make box`` calls it last.

    python benchmarks/box/pack.py RUN DATA [FOLDER]

Weights in float16, thresholds from the validation people, an ONNX graph that reads those weights.
The card and the licence in the folder are written by hand: correct their figures by
``benchmarks/peers.py``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import safetensors.torch

from sphereface2.backbones import bundle
from sphereface2.files import atomic_write
from sphereface2.recognition.box import MODEL
from sphereface2.recognition.calibrate import calibrate
from sphereface2.recognition.export import export

FARS = (1e-3, 1e-2, 1e-4)


def main(run: Path, data: Path, folder: Path = MODEL.parent) -> None:
    bundle.save(bundle.load(run), folder)
    file = folder / bundle.WEIGHTS
    weights = safetensors.torch.load_file(file)
    halves = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
    atomic_write(file, safetensors.torch.save(halves, {"format": "pt"}))
    (folder / "calibration.json").unlink(missing_ok=True)
    calibrate(folder, all_pairs=[data], fars=FARS)
    export(folder, to="onnx", share_weights=True, out=folder / MODEL.name)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
