"""Embedding a set of crops: `sphereface2 embed` against the bare network on tensors in memory.

    python benchmarks/embedding.py
    python benchmarks/embedding.py --ray

The bound is the network's forward pass over the same images and their mirror images, already
normalised and in memory, in the same batches. `embed` does everything from the files on disk to the
finished Parquet file: reading the model, opening the set, decoding, resizing, the forward passes,
writing the parts and putting them together. The two take turns; the ratio is the median over the
rounds. What `embed` does beside the forward passes is then told in CPU time, which other work on
the machine hardly moves (most plainly with OMP_NUM_THREADS=1). With --ray the same file is also
made by a Ray of its own on this machine, and compared.
Uses the real faces that `sphereface2 fit` would train on, else synthetic ones.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from sphereface2 import backbones
from sphereface2.backbones import bundle
from sphereface2.data import open_source, synthetic
from sphereface2.data.locate import find
from sphereface2.data.recordio import RecordIOWriter
from sphereface2.images import decode, read_image
from sphereface2.recognition.face_embedder import FaceEmbedder
from sphereface2.recognition.features import embed_set

NETWORKS = {
    "sfnet20, width 0.25, 64 px": ("sfnet20", {"width": 0.25, "input_size": 64}, 2048),
    "sfnet20, 112 px": ("sfnet20", {}, 128),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=None, help="a set of crops")
    parser.add_argument("--images", type=int, default=2048, help="at most, for each network")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ray", action="store_true", help="compare with the Ray engine too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = find()
        train = args.data or (found.train if found else None)
        if train is None:
            print("no faces found: synthetic ones")
            train = synthetic.write(folder / "faces", people=300)
        print(f"crops of {train}, batches of {args.batch_size}, {torch.get_num_threads()} threads")
        for title, (backbone, options, images) in NETWORKS.items():
            torch.manual_seed(0)
            network = backbones.build(backbone, batch_norm=True, **options)
            model, crops = folder / title, folder / f"crops {title}"
            model.mkdir()
            bundle.save(network, model)
            pixels = pack(train, crops, min(images, args.images))
            run(title, model, crops, pixels, args.batch_size, args.rounds)
            split(model, crops, pixels, args.batch_size)
            if args.ray:
                same = made(model, crops, folder / "here", args.batch_size, "local") == made(
                    model, crops, folder / "ray", args.batch_size, "ray"
                )
                print(f"  the file that Ray makes is {'the same' if same else 'ANOTHER'}")


def pack(train: Path, target: Path, images: int) -> torch.Tensor:
    """Copy the first images of a set into one of their own; their pixels, (N, 3, H, W)."""
    source = open_source(train)
    target.mkdir()
    decoded = []
    with RecordIOWriter(target) as writer:
        for index in range(min(images, len(source))):
            data = source.read(index)
            writer.add(int(source.labels[index]), data)
            decoded.append(decode(data))
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2)


def made(model: Path, crops: Path, out: Path, batch_size: int, engine: str) -> bytes:
    """The file that `embed` makes."""
    out.unlink(missing_ok=True)
    with contextlib.redirect_stdout(io.StringIO()):
        embed_set(
            model, crops, out=out, aligned=True, batch_size=batch_size, engine=engine, device="cpu"
        )
    return out.read_bytes()


@torch.inference_mode()
def bare(network: backbones.Backbone, inputs: list[torch.Tensor]) -> None:
    for batch in inputs:
        network(batch) + network(batch.flip(3))


def run(
    title: str, model: Path, crops: Path, pixels: torch.Tensor, batch_size: int, rounds: int
) -> None:
    network = bundle.load(model)
    inputs = [network.preprocessing(batch) for batch in pixels.split(batch_size)]
    bounds, rates = [], []
    for number in range(rounds + 1):
        start = time.perf_counter()
        bare(network, inputs)
        middle = time.perf_counter()
        made(model, crops, crops / "f.parquet", batch_size, "local")
        end = time.perf_counter()
        if number:  # the first is to warm up
            bounds.append(len(pixels) / (middle - start))
            rates.append(len(pixels) / (end - middle))
    ratios = [rate / bound for rate, bound in zip(rates, bounds, strict=True)]
    print(
        f"{title}, {len(pixels):,} images: embed {statistics.median(rates):,.0f} images/s, bare "
        f"network {statistics.median(bounds):,.0f}: {statistics.median(ratios):.2f} of the bound "
        f"({min(ratios):.2f} to {max(ratios):.2f})",
        flush=True,
    )


def split(model: Path, crops: Path, pixels: torch.Tensor, batch_size: int) -> None:
    """Print the CPU time of what `embed` is made of, each alone."""
    network, source = bundle.load(model), open_source(crops)
    inputs = [network.preprocessing(batch) for batch in pixels.split(batch_size)]
    parts = {
        "forward passes": lambda: bare(network, inputs),
        "resizing and normalising": lambda: [
            network.preprocessing(batch) for batch in pixels.split(batch_size)
        ],
        "decoding": lambda: [read_image(source.read(i)) for i in range(len(source))],
        "loading the model": lambda: FaceEmbedder.from_pretrained(model, device="cpu"),
    }
    told = []
    for name, work in parts.items():
        start = time.process_time()
        work()
        told.append(f"{name} {time.process_time() - start:.2f}")
    print(f"  CPU seconds: {', '.join(told)}", flush=True)


if __name__ == "__main__":
    main()
