"""``sphereface2 verify``: do two pictures show one person?"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from sphereface2.console import print_json
from sphereface2.errors import UserError
from sphereface2.evaluation.verification import far_key, pair_scores
from sphereface2.files import atomic_write, printable, writing

if TYPE_CHECKING:
    from sphereface2.align import Face
    from sphereface2.recognition.embedder import FaceEmbedder

_SAME, _DIFFERENT, _UNDECIDED, _INK = "#2a6f97", "#c8553d", "#777777", "#333333"
_HOW = "to decide, fit a calibration: sphereface2 calibrate {} --pairs FILE --far 1e-2"


def compare(
    embedder: FaceEmbedder,
    first: str | Path,
    second: str | Path,
    *,
    far: float | None = None,
    prior: float = 0.5,
    aligned: bool = False,
) -> tuple[dict[str, Any], list[Face | None]]:
    """Compare two pictures.

    Args:
        embedder: the network, with its calibration if there is one.
        first, second: image files.
        far: decide at this FAR; None: the calibration's default.
        prior: share of matched pairs that is expected, for the probability.
        aligned: the pictures are aligned crops already.

    Returns:
        A report, JSON-able, and the face found in each picture (None where ``aligned``). Keys:
        ``pictures``, ``similarity`` (cosine), ``llr`` (natural logarithm), ``probability`` (at
        ``prior``), ``far``, ``threshold``, ``decision`` ("same" or "different") and ``faces``
        (``box``, ``landmarks`` and ``score`` of each, or None). Without a calibration ``llr``,
        ``probability``, ``far``, ``threshold`` and ``decision`` are None.

    Raises:
        UserError: a picture cannot be read or shows no face, or the calibration has no such FAR.
    """
    calibration = embedder.calibration
    if calibration is None and far is not None:
        raise UserError("--far needs a calibration: run sphereface2 calibrate on the model first")
    threshold = None if calibration is None else calibration.threshold(far)
    faces: list[Face | None] = [None, None]
    pictures: list[Any] = [Path(first), Path(second)]
    if not aligned:
        found = [embedder.crop(picture) for picture in pictures]
        pictures, faces = [crop for crop, _ in found], [face for _, face in found]
    rows = embedder.embed(pictures, aligned=True)
    score = float(pair_scores(rows, np.array([[0, 1]]))[0])
    report: dict[str, Any] = {
        "pictures": [str(first), str(second)],
        "similarity": score,
        "llr": None,
        "probability": None,
        "prior": prior,
        "far": None,
        "threshold": threshold,
        "decision": None,
        "faces": [
            face
            and {
                "box": face.box.tolist(),
                "landmarks": face.landmarks.tolist(),
                "score": float(face.score),
            }
            for face in faces
        ],
    }
    if calibration is not None and threshold is not None:
        report |= {
            "llr": float(calibration.llr(score)),
            "probability": float(calibration.probability(score, prior)),
            "far": calibration.far_default if far is None else far,
            "decision": "same" if score >= threshold else "different",
        }
    return report, faces


def verify(
    first: str | Path,
    second: str | Path,
    *,
    model: str,
    far: float | None = None,
    prior: float = 0.5,
    aligned: bool = False,
    picture: str | Path | None = None,
    device: str | None = None,
    as_json: bool = False,
) -> dict[str, Any]:
    """The command ``sphereface2 verify``: compare two pictures, print, return `compare`'s report.

    Args:
        first, second, far, prior, aligned: of `compare`.
        model: a run, a model folder or a hub id.
        picture: PNG to write with both pictures, the faces found and the verdict.
        device: where to compute.
        as_json: print JSON instead of a table.
    """
    from sphereface2.recognition.embedder import FaceEmbedder

    if picture is not None and Path(picture).suffix.lower() != ".png":
        name = Path(picture).with_suffix(".png") if Path(picture).name else "NAME.png"
        raise UserError(f"--picture writes a PNG: name it {name}")
    embedder = FaceEmbedder.from_pretrained(model, device=device)
    report, faces = compare(embedder, first, second, far=far, prior=prior, aligned=aligned)
    if picture is not None:
        report["picture"] = str(picture)
    if as_json:
        print_json(report)
    else:
        _print(report, model)
    if picture is not None:  # after the verdict, which does not depend on it
        draw(report, faces, picture)
        if not as_json:
            Console(highlight=False, markup=False).print(f"picture: {picture}", soft_wrap=True)
    return report


def verdict(report: dict[str, Any]) -> str:
    """The decision of a report in words."""
    return {"same": "same person", "different": "different people", None: "no decision"}[
        report["decision"]
    ]


def draw(report: dict[str, Any], faces: list[Face | None], path: str | Path) -> None:
    """Write a PNG of a report's two pictures, with the boxes and landmarks of the faces.

    Raises:
        UserError: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    from sphereface2.images import read_image

    colour = {"same": _SAME, "different": _DIFFERENT, None: _UNDECIDED}[report["decision"]]
    figure = Figure(figsize=(8, 4.9), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for place, name, face in zip(figure.subplots(1, 2), report["pictures"], faces, strict=True):
        pixels = read_image(Path(name))
        place.imshow(pixels, interpolation="antialiased")
        place.set_axis_off()
        title = printable(Path(name).name)
        place.set_title(title, fontsize=9, color=_INK, parse_math=False)  # "$" is just a letter
        if face is not None:
            x0, y0, x1, y1 = (float(edge) for edge in face.box)
            place.add_patch(
                Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=2)
            )
            place.scatter(*face.landmarks.T, s=16, c="white", edgecolors=_INK, linewidths=0.9)
            # A box may reach beyond the picture; the picture stays the frame.
            place.set_xlim(-0.5, pixels.shape[1] - 0.5)
            place.set_ylim(pixels.shape[0] - 0.5, -0.5)
    figure.suptitle(verdict(report).capitalize(), color=colour, fontsize=15, fontweight="bold")
    figure.supxlabel(" · ".join(_facts(report)), color=_INK, fontsize=10)
    memory = io.BytesIO()
    canvas.print_png(memory)
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, memory.getvalue())


def _facts(report: dict[str, Any]) -> list[str]:
    facts = [f"similarity {report['similarity']:.3f}"]
    if report["decision"] is not None:
        facts[0] += f", threshold {report['threshold']:.3f} for FAR {far_key(report['far'])}"
        facts.append(f"probability {100 * report['probability']:.2f} %")
        facts.append(f"LLR {report['llr']:+.2f}")
    return facts


def _print(report: dict[str, Any], model: str) -> None:
    console = Console()
    table = Table(show_header=False, title=verdict(report), title_justify="left")
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_row("similarity", f"{report['similarity']:.4f}")
    if report["decision"] is not None:
        table.add_row(f"threshold for FAR {far_key(report['far'])}", f"{report['threshold']:.4f}")
        table.add_row("log-likelihood ratio", f"{report['llr']:+.2f}")
        table.add_row(
            f"probability at a prior of {report['prior']:g}", f"{100 * report['probability']:.2f} %"
        )
    console.print(table)
    if report["decision"] is None:
        line = f"the model has no calibration, so its similarity says little; {_HOW.format(model)}"
        console.print(line, soft_wrap=True, highlight=False, markup=False)
