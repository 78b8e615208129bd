"""Images a second of a network in PyTorch, compiled, and exported to ONNX in float32 and int8.

    python benchmarks/export.py                       # untrained SFNet-20 at 64×64 (width 0.25)
    python benchmarks/export.py --large               # and IResNet-50 at 112×112
    python benchmarks/export.py --checkpoint runs/NAME

All variants of a network live in one process and take turns, on 1 and on 2 threads, one image and
64 at a time; the figure is each one's fastest round, the ratio is to eager PyTorch. int8 is
calibrated on drawn faces: its speed does not depend on what it was calibrated on.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from sphereface2 import backbones
from sphereface2.backbones import Backbone, bundle
from sphereface2.backbones.onnx import OnnxNetwork
from sphereface2.data import synthetic
from sphereface2.recognition.export import export

THREADS = (1, 2)
BATCHES = (1, 64)


def exported(net: Backbone, folder: Path) -> tuple[Path, Path]:
    """The network as float32 and int8 ONNX files in ``folder``."""
    rng = np.random.default_rng(0)
    (folder / "faces" / "drawn").mkdir(parents=True)
    (folder / "net").mkdir()
    for i in range(40):
        image = synthetic.render(synthetic.Identity.draw(rng), rng)
        cv2.imwrite(str(folder / "faces" / "drawn" / f"{i}.png"), image[..., ::-1])
    bundle.save(net, folder / "net")
    with contextlib.redirect_stdout(io.StringIO()):
        plain = export(folder / "net", to="onnx")
        int8 = export(folder / "net", to="onnx", int8=True, calibration=folder / "faces")
    return plain.path, int8.path


def on_runtime(file: Path, threads: int) -> Callable[[torch.Tensor], np.ndarray]:
    """The exported network, as a function of what the backbone takes."""
    network = OnnxNetwork(file, threads=threads)
    return lambda images: network(images.numpy())


def rates(
    variants: dict[str, Callable[[torch.Tensor], Any]],
    images: torch.Tensor,
    seconds: float,
) -> dict[str, float]:
    """Images a second of each variant, from its fastest pass over ``images``."""
    fastest = dict.fromkeys(variants, float("inf"))
    for run in variants.values():  # builds kernels, fills caches
        run(images)
    end = time.perf_counter() + seconds * len(variants)
    while time.perf_counter() < end:
        for name, run in variants.items():
            start = time.perf_counter()
            run(images)
            fastest[name] = min(fastest[name], time.perf_counter() - start)
    return {name: len(images) / spent for name, spent in fastest.items()}


@torch.inference_mode()
def measure(label: str, net: Backbone, seconds: float) -> None:
    print(f"{label}, {net.input_size[0]}×{net.input_size[1]}")
    with tempfile.TemporaryDirectory() as folder:
        with torch.inference_mode(False):
            plain, int8 = exported(net, Path(folder))
        for threads in THREADS:
            torch.set_num_threads(threads)
            torch.compiler.reset()
            variants: dict[str, Callable[[torch.Tensor], Any]] = {
                "eager": net,
                "torch.compile": torch.compile(net, dynamic=False),
                "ONNX Runtime": on_runtime(plain, threads),
                "ONNX Runtime int8": on_runtime(int8, threads),
            }
            for batch in BATCHES:
                images = torch.rand(batch, 3, *net.input_size) * 2 - 1
                found = rates(variants, images, seconds)
                for name, rate in found.items():
                    print(
                        f"  {threads} thread(s)  batch {batch:2d}  {name:18s} "
                        f"{rate:8.1f} images/s  {rate / found['eager']:5.2f}×",
                        flush=True,
                    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="a trained network, for the SFNet-20")
    parser.add_argument("--large", action="store_true", help="also IResNet-50 at 112×112")
    parser.add_argument("--seconds", type=float, default=3.0, help="a variant and setting")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.checkpoint:
        measure(
            str(arguments.checkpoint.name), bundle.load(arguments.checkpoint), arguments.seconds
        )
    else:
        net = backbones.build("sfnet20", width=0.25, input_size=64, batch_norm=True).eval()
        measure("sfnet20, width 0.25", net, arguments.seconds)
    if arguments.large:
        measure("iresnet50", backbones.build("iresnet50").eval(), arguments.seconds)


if __name__ == "__main__":
    main()
