"""Make of two runs the model that comes with the package: ``make box`` calls it last.

    python benchmarks/box/pack.py FIRST RUN DATA [FOLDER]

The mean of the weights of both, where RUN started from FIRST, in float16; thresholds from the
validation people; an ONNX graph that reads those weights. The card and the licence in the folder
are written by hand: correct their figures by ``benchmarks/peers.py``.

Source of the mean: Wortsman et al., "Robust fine-tuning of zero-shot models", 2022.
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


def main(first: Path, run: Path, data: Path, folder: Path = MODEL.parent) -> None:
    network, before = bundle.load(run), bundle.load(first).state_dict()
    weights = {
        key: value.lerp(before[key], 0.5).half() if value.is_floating_point() else value
        for key, value in network.state_dict().items()
    }
    bundle.save(network, folder)
    atomic_write(folder / bundle.WEIGHTS, safetensors.torch.save(weights, {"format": "pt"}))
    (folder / "calibration.json").unlink(missing_ok=True)
    calibrate(folder, all_pairs=[data], fars=FARS)
    export(folder, to="onnx", share_weights=True, out=folder / MODEL.name)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
