"""Plots of an evaluation: ROC curves and score histograms, as PNG.

Other reports draw with the same colours and `panels`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, PercentFormatter

from sphereface2.evaluation.reliability import Reliability
from sphereface2.evaluation.verification import roc
from sphereface2.files import atomic_write

COLOURS = ("#2a6f97", "#c8553d", "#588157", "#7b5ea7", "#b8860b", "#444444")
GENUINE, IMPOSTOR, INK, GRID = "#2a6f97", "#c8553d", "#333333", "#dddddd"


def panels(
    titles: Sequence[str],
    *,
    columns: int = 1,
    size: tuple[float, float] = (6.4, 4.4),
    sharex: bool = False,
    sharey: bool = False,
) -> tuple[FigureCanvasAgg, list[Axes]]:
    """A figure of ``size`` inches with a panel for each title, row by row."""
    # A Figure of its own, outside pyplot: no global state, no window, safe in threads.
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    rows = -(-len(titles) // columns)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey).ravel()
    for empty in grid[len(titles) :]:
        empty.set_axis_off()
    for axes, title in zip(grid, titles, strict=False):
        axes.set_title(title, loc="left", color=INK, fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#999999")
        axes.tick_params(colors=INK, labelsize=9)
    return canvas, list(grid[: len(titles)])


def write(canvas: FigureCanvasAgg, path: Path) -> None:
    """Write the figure as PNG; its folder is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    canvas.print_png(content)
    atomic_write(path, content.getvalue())


def plot_roc(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]], path: str | Path, *, title: str = "ROC"
) -> None:
    """TAR over FAR on a logarithmic FAR axis, one curve for each name: ``{name: (far, tar)}``.

    Points at FAR 0 are left out. The axis starts at the smallest FAR that a curve resolves.
    """
    canvas, (axes,) = panels([title])
    lowest = 1.0
    for k, (name, (far, tar)) in enumerate(curves.items()):
        # What lies inside a horizontal or a vertical run draws nothing, and may be millions.
        inner = (np.diff(far)[:-1] == 0) & (np.diff(far)[1:] == 0)
        inner |= (np.diff(tar)[:-1] == 0) & (np.diff(tar)[1:] == 0)
        shown = (far > 0) & ~np.pad(inner, 1)[: len(far)]
        if not shown.any():
            continue
        lowest = min(lowest, float(far[shown][0]))
        axes.step(
            far[shown],
            tar[shown],
            where="post",
            color=COLOURS[k % len(COLOURS)],
            linewidth=1.8,
            label=name,
        )
    axes.set_xscale("log")
    axes.set_xlim(lowest, 1)
    axes.set_ylim(0, 1.01)
    axes.xaxis.set_major_locator(LogLocator(numticks=12))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("FAR: impostor pairs accepted", color=INK)
    axes.set_ylabel("TAR: genuine pairs accepted", color=INK)
    axes.grid(True, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    if len(curves) > 1:
        axes.legend(frameon=False, loc="lower right", fontsize=9)
    write(canvas, Path(path))


def plot_scores(
    scores: np.ndarray,
    same: np.ndarray,
    path: str | Path,
    *,
    threshold: float | None = None,
    title: str = "Scores",
) -> None:
    """Histograms of the genuine and the impostor scores, each summing to one."""
    canvas, (axes,) = panels([title])
    low, high = float(scores.min()), float(scores.max())
    bins = np.linspace(low, high if high > low else low + 1e-6, 61).tolist()
    for chosen, colour, name in (
        (~same, IMPOSTOR, "impostor"),
        (same, GENUINE, "genuine"),
    ):
        count = int(chosen.sum())
        if count:
            axes.hist(
                scores[chosen],
                bins,
                weights=np.full(count, 1 / count),
                histtype="stepfilled",
                facecolor=colour + "55",
                edgecolor=colour,
                linewidth=1.3,
                label=f"{count:,} {name} pairs",
            )
    if threshold is not None:
        axes.axvline(threshold, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.annotate(
            f"threshold {threshold:.3f}",
            (threshold, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -2),
            textcoords="offset points",
            va="top",
            fontsize=9,
            color=INK,
        )
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("cosine similarity", color=INK)
    axes.set_ylabel("share of pairs in a bin", color=INK)
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=9)
    write(canvas, Path(path))


def plot_reliability(found: Reliability, path: str | Path, *, title: str = "Reliability") -> None:
    """Share of genuine pairs over the predicted probability, with the share of pairs in bins."""
    canvas, (axes,) = panels([title])
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1.2, linestyle=(0, (4, 3)))
    axes.errorbar(
        found.predicted,
        found.observed,
        # Wilson's interval may end a rounding error short of the share itself.
        yerr=np.maximum([found.observed - found.low, found.high - found.observed], 0),
        color=GENUINE,
        marker="o",
        markersize=4.5,
        linewidth=1.6,
        elinewidth=1,
        capsize=2.5,
        label=f"{found.pairs.sum():,} pairs, ECE {100 * found.ece:.2f} %",
    )
    axes.bar(
        found.predicted,
        found.share,
        width=0.025,
        color=GRID,
        zorder=0,
        label="share of pairs",
    )
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(0, 1.02)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("predicted probability (both kinds of pair equally frequent)", color=INK)
    axes.set_ylabel("share of genuine pairs", color=INK)
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    write(canvas, Path(path))


def plot_pairs(
    name: str, scores: np.ndarray, same: np.ndarray, threshold: float, folder: str | Path
) -> list[Path]:
    """``NAME_roc.png`` and ``NAME_scores.png`` of a scored verification set, in ``folder``."""
    folder = Path(folder)
    far, tar, _ = roc(scores, same)
    paths = [folder / f"{name}_roc.png", folder / f"{name}_scores.png"]
    plot_roc({name: (far, tar)}, paths[0], title=f"{name}: ROC of {len(scores):,} pairs")
    plot_scores(scores, same, paths[1], threshold=threshold, title=f"{name}: scores")
    return paths
