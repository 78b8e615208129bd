"""Plots of a run, as PNG: its curves, a batch as the network sees it, the worst held-out pairs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from sphereface2.data.dataset import FaceDataset
from sphereface2.data.sampler import BatchKey
from sphereface2.evaluation.plots import COLOURS, GRID, INK, panels, write
from sphereface2.training.validation import shown

_COLUMNS, _ROWS, _WORST = 8, 4, 8
_LOOKED_AT = 1000


def plot_curves(metrics: Path, path: Path) -> None:
    """Loss, and the held-out people's TAR, over steps.

    Args:
        metrics: the run's ``metrics.jsonl``.
        path: PNG to write.
    """
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    losses = [(one["step"], one["loss"]) for one in records if one["kind"] == "train"]
    found: dict[str, list[tuple[int, float]]] = {}
    for one in records:
        for key, value in one.items() if one["kind"] == "validation" else ():
            if "TAR" in key or "accuracy" in key:
                found.setdefault(key, []).append((one["step"], value))
    titles = ["Loss", *(["Validation"] if found else [])]
    canvas, axes = panels(titles, size=(6.4, 3.2 * len(titles)), sharex=True)
    axes[0].plot(*np.array(losses, float).reshape(-1, 2).T, color=COLOURS[0], linewidth=1.4)
    axes[0].set_ylim(bottom=0)
    for k, (name, points) in enumerate(found.items()):
        colour, label = COLOURS[k % len(COLOURS)], shown(name).replace("held-out ", "")
        axes[1].plot(*np.array(points).T, "o-", color=colour, ms=4, lw=1.4, label=label)
    if found:
        axes[1].set_ylim(0, 1.01)
        axes[1].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        canvas.figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    for place in axes:
        place.grid(True, color=GRID, linewidth=0.7)
        place.set_axisbelow(True)
    axes[-1].set_xlabel("step", color=INK)
    write(canvas, path)


def plot_batch(dataset: FaceDataset, path: Path) -> None:
    """A mosaic of training images of different people, augmented and of the network's size."""
    people, firsts = np.unique(dataset.labels, return_index=True)
    # Evenly over the people; those of a small set more than once, augmented anew.
    chosen = firsts[np.linspace(0, len(people) - 1, _COLUMNS * _ROWS).astype(int)]
    images = dataset[BatchKey(0, 0, chosen)].images.permute(0, 2, 3, 1).numpy()
    canvas, places = panels([""] * len(images), columns=_COLUMNS, size=(8, 4))
    for place, image in zip(places, images, strict=True):
        _show(place, image)
    write(canvas, path)


def plot_worst_pairs(
    read: Callable[[int], np.ndarray],
    pairs: np.ndarray,
    scores: np.ndarray,
    same: np.ndarray,
    path: Path,
) -> None:
    """A mosaic of the genuine pairs least alike and of the impostor pairs most alike.

    Args:
        read: gives the pixels of image ``i``.
        pairs: (P, 2), images.
        scores: (P,), similarities.
        same: bool (P,), True for genuine pairs.
        path: PNG to write.
    """
    drawn: list[tuple[str, int]] = []
    for name, kind, sign in (("genuine", same, 1), ("impostor", ~same, -1)):
        rows, met = np.flatnonzero(kind), set[int]()
        order = rows[np.argsort(sign * scores[rows], kind="stable")[:_LOOKED_AT]]
        for k in order.tolist():  # each image once: one bad image would fill the mosaic
            if len(met) < 2 * _WORST and met.isdisjoint(pairs[k].tolist()):
                met.update(pairs[k].tolist())
                drawn.append((f"{name} {scores[k]:.2f}", k))
    canvas, places = panels([title for title, _ in drawn], columns=_COLUMNS // 2, size=(8, 5.4))
    for place, (_, k) in zip(places, drawn, strict=True):
        first, second = (cv2.resize(read(int(i)), (112, 112)) for i in pairs[k])
        _show(place, np.hstack([first, second]))
    write(canvas, path)


def _show(place: Axes, pixels: np.ndarray) -> None:
    place.imshow(pixels)
    place.set_axis_off()
