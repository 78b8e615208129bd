"""dlib's published face network as an ONNX file for our crops: a teacher, and a peer to measure.

    pip install 'sphereface2[teacher-dlib,export]'
    python benchmarks/box/dlib_network.py dlib.onnx
    sphereface2 import dlib.onnx runs/dlib --from onnx --mean 0 --std 1
    sphereface2 embed runs/dlib DATA/celeb50k --aligned --no-flip --out runs/teacher.parquet
    sphereface2 fit --config box --teacher runs/teacher.parquet

The weights (CC0, 22 MB, trained by Davis King on about 3 million faces) come with the package
``face-recognition-models``. dlib reads the face from a chip of 150×150 pixels; the graph cuts it
from a crop of 112×112 by a fixed scale and shift, by which dlib's mean eyes fall on our template's,
and repeats the crop's border below it. With ``dlib-bin`` installed, ``--check`` compares the
embeddings of the two on noise.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHIP, CROP = 150, 112
SCALE, EYES, CHIP_EYES = 1.491, (55.91, 51.6), (74.0, 47.13)
"""Chip pixels a crop pixel; the middle between the eyes, in the crop and in the chip."""
MEAN, DEVIATION = (122.782, 117.001, 104.298), 256.0


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


class Convolution(nn.Conv2d):
    """A convolution and the affine layer after it, as one; unpadded where it strides."""

    def __init__(self, values: Iterator[np.ndarray], inputs: int, outputs: int, side: int, by: int):
        super().__init__(inputs, outputs, side, by, 0 if by > 1 else side // 2)
        filters, affine = (torch.from_numpy(next(values).copy()) for _ in range(2))
        gamma, beta = affine[:outputs], affine[outputs:]
        weight = filters[:-outputs].reshape(self.weight.shape)
        self.weight.data = weight * gamma[:, None, None, None]
        assert self.bias is not None
        self.bias.data = filters[-outputs:] * gamma + beta


class Unit(nn.Module):
    """f(x + conv(f(conv(x)))); maps of unequal size or depth are added as if filled up with 0."""

    def __init__(self, values: Iterator[np.ndarray], inputs: int, outputs: int, by: int):
        super().__init__()
        self.by = by
        self.first = Convolution(values, inputs, outputs, 3, by)
        self.second = Convolution(values, outputs, outputs, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.second(F.relu(self.first(x)))
        x = F.avg_pool2d(x, self.by) if self.by > 1 else x
        side = max(x.shape[3], branch.shape[3])
        deeper = branch.shape[1] - x.shape[1]
        x = F.pad(x, (0, side - x.shape[3], 0, side - x.shape[2], 0, deeper))
        branch = F.pad(branch, (0, side - branch.shape[3], 0, side - branch.shape[2]))
        return F.relu(x + branch)


class DlibNetwork(nn.Module):
    """Crops (B, 3, 112, 112), RGB from 0 to 255, to embeddings (B, 128), whose length is dlib's."""

    def __init__(self, weights: Path):
        super().__init__()
        values = tensors(weights.read_bytes())
        self.stem = Convolution(values, 3, 32, 7, 2)
        widths = [32, 32, 32, 32, -64, 64, 64, 64, -128, 128, 128, -256, 256, 256, -256]
        self.units = nn.Sequential(
            *(
                Unit(values, abs(inputs), abs(outputs), 2 if outputs < 0 else 1)
                for inputs, outputs in pairwise(widths)
            )
        )
        self.register_buffer("linear", torch.from_numpy(next(values).reshape(256, 128).copy()))
        if next(values, None) is not None:
            raise ValueError(f"{weights} has more layers than dlib's face network")
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.register_buffer("across", _interpolation(EYES[0], CHIP_EYES[0]))
        self.register_buffer("down", _interpolation(EYES[1], CHIP_EYES[1]))

    def chip(self, crops: Tensor) -> Tensor:
        """The chips (B, 3, 150, 150), by bilinear interpolation."""
        return self.down @ crops @ self.across.T

    def forward(self, crops: Tensor) -> Tensor:
        x = (self.chip(crops) - self.mean) / DEVIATION
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2)
        return self.units(x).mean((2, 3)) @ self.linear


def _interpolation(crop: float, chip: float) -> Tensor:
    """(150, 112): weights by which a row of chip pixels is made of crop pixels."""
    places = ((np.arange(CHIP) - chip) / SCALE + crop).clip(0, CROP - 1)
    low = np.minimum(places.astype(int), CROP - 2)
    rows = np.zeros((CHIP, CROP), np.float32)
    rows[np.arange(CHIP), low] = 1 - (places - low)
    rows[np.arange(CHIP), low + 1] += places - low
    return torch.from_numpy(rows)


def main() -> None:
    import face_recognition_models

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="ONNX file to write")
    parser.add_argument("--check", action="store_true", help="compare with dlib on noise")
    arguments = parser.parse_args()
    weights = Path(face_recognition_models.face_recognition_model_location())
    network = DlibNetwork(weights).eval()
    batch = torch.export.Dim("batch", min=1)
    example = torch.zeros(2, 3, CROP, CROP)
    program = torch.export.export(network, (example,), dynamic_shapes=({0: batch},))
    torch.onnx.export(
        program,
        dynamo=True,
        opset_version=20,
        input_names=["images"],
        output_names=["embeddings"],
        external_data=False,
        verbose=False,
    ).save(arguments.out)  # type: ignore[union-attr]
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e6:.1f} MB")
    if arguments.check:
        import dlib

        crops = torch.from_numpy(np.random.default_rng(0).uniform(0, 255, (4, 3, CROP, CROP)))
        chips = network.chip(crops.float()).round().clip(0, 255)
        pixels = [np.ascontiguousarray(c.permute(1, 2, 0).byte().numpy()) for c in chips]
        theirs = dlib.face_recognition_model_v1(str(weights)).compute_face_descriptor(pixels, 0)
        x = F.max_pool2d(F.relu(network.stem((chips - network.mean) / DEVIATION)), 3, 2)
        ours = (network.units(x).mean((2, 3)) @ network.linear).detach().numpy()
        print(f"largest difference to dlib: {np.abs(ours - np.array(theirs)).max():.1e}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
