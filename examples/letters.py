"""Letters as people: each class is a character, its images are of the fonts that matplotlib ships.

Training sees Latin letters; the test asks of pairs of images of other scripts whether both show the
same letter. No class of the training helps with that, as no face of the training helps with
strangers. The network is any `torch.nn.Module`; of this package only the losses are used.

    python examples/letters.py
"""

from __future__ import annotations

import argparse
import time
import unicodedata
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from sphereface2 import heads
from sphereface2.evaluation.verification import eer, tar_at_far

SIDE, DIM = 32, 128
FONTS = ("DejaVuSans*.ttf", "DejaVuSerif*.ttf", "STIXGeneral*.ttf")
TRAIN, TEST = {"LATIN"}, {"GREEK", "CYRILLIC", "ARMENIAN", "GEORGIAN", "LAO"}
LOSSES = {
    "sphereface2": {"r": 4.0, "m": 0.3, "loss_weight": 10.0},
    "softmax": {},
    "cosface": {"s": 8.0, "m": 0.2},
    "arcface": {"s": 8.0, "m": 0.2},
}


@cache
def letters() -> tuple[TensorDataset, TensorDataset]:
    """Images (N, 1, 32, 32) in [-1, 1] and labels (N,), to train on and of unseen letters.

    A letter counts if eight fonts have it and it does not look like one before it, as the Cyrillic
    A does.
    """
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    paths = sorted(path for pattern in FONTS for path in folder.glob(pattern))
    fonts = {path.stem: ImageFont.truetype(path, 22) for path in paths}
    having: dict[int, list[str]] = {}
    for path in paths:
        for code in FT2Font(path).get_charmap():
            having.setdefault(code, []).append(path.stem)
    found: tuple[list[list[np.ndarray]], ...] = ([], [])
    looks = set()
    for code in sorted(having):
        script = unicodedata.name(chr(code), "").partition(" ")[0]
        if unicodedata.category(chr(code))[0] == "L" and script in TRAIN | TEST:
            images = {name: _draw(chr(code), fonts[name]) for name in having[code]}
            look = images.get("DejaVuSans", np.zeros(1)).tobytes()
            if len(images) >= 8 and look not in looks:
                looks.add(look)
                found[script in TEST].append(list(images.values()))
    return _dataset(found[0]), _dataset(found[1])


def _draw(letter: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    image = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(image).text((SIDE // 2, 23), letter, 255, font=font, anchor="ms")
    return np.asarray(image)


def _dataset(classes: list[list[np.ndarray]]) -> TensorDataset:
    labels = np.repeat(np.arange(len(classes)), [len(images) for images in classes])
    pixels = torch.tensor(np.concatenate(classes))[:, None].float()
    return TensorDataset(pixels / 127.5 - 1, torch.tensor(labels))


def network() -> nn.Sequential:
    """Images (B, 1, 32, 32) to embeddings (B, 128)."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs)]
        layers += [nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, DIM))


@torch.no_grad()
def verify(net: nn.Module, data: TensorDataset) -> tuple[float, float]:
    """Equal error rate, and TAR at a FAR of 1e-3, over all pairs of every third image."""
    images, labels = (tensor[::3] for tensor in data.tensors)
    rows = F.normalize(net.eval()(images))
    first, second = torch.triu_indices(len(rows), len(rows), 1)
    scores = (rows @ rows.T)[first, second].numpy()
    same = (labels[first] == labels[second]).numpy()
    return eer(scores, same), tar_at_far(scores, same, [1e-3])[0].value or 0.0


def classes(data: TensorDataset) -> int:
    return int(data.tensors[1].max()) + 1


def train(loss: str, seed: int, epochs: int = 3, batch: int = 128) -> nn.Module:
    torch.manual_seed(seed)
    data, net = letters()[0], network()
    head = heads.build(loss, DIM, classes(data), **LOSSES[loss])
    images, labels = data.tensors
    rates = [0.004, 0.1]  # of the network and of the prototypes, which follow the embeddings
    groups = [{"params": net.parameters()}, {"params": head.parameters()}]
    optimizer = torch.optim.AdamW(groups)
    steps = epochs * (len(labels) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps)
    for step in range(steps):
        place = step % (len(labels) // batch) * batch
        if place == 0:
            order = torch.randperm(len(labels))
        drawn = order[place : place + batch]
        optimizer.zero_grad()
        head(net(images[drawn]), labels[drawn]).backward()
        optimizer.step()
        schedule.step()
    return net


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=LOSSES)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    seen, unseen = letters()
    for name, data in (("train", seen), ("test", unseen)):
        print(f"{name}: {classes(data):,} letters, {len(data):,} images")
    print(f"{'':12}  EER         TAR at FAR 1e-3")
    print(row("pixels", [verify(nn.Flatten(), unseen)]))
    for loss in arguments.losses:
        found = [verify(train(loss, seed), unseen) for seed in range(arguments.seeds)]
        print(row(loss, found), flush=True)
    print(f"{time.process_time():.0f} s of CPU")


def row(name: str, found: list[tuple[float, float]]) -> str:
    """Mean ± standard deviation over the seeds, in %."""
    figures = 100 * np.array(found)
    spread = figures.std(axis=0, ddof=1) if len(found) > 1 else np.zeros(2)
    cells = [
        f"{mean:5.2f} ± {width:4.2f}" for mean, width in zip(figures.mean(0), spread, strict=True)
    ]
    return f"{name:12}  " + "  ".join(cells)


if __name__ == "__main__":
    main()
