"""``sphereface2 verify``: do two images show one person?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from sphereface2 import console
from sphereface2.align.unaligned import warn_if_unaligned
from sphereface2.errors import UserError
from sphereface2.evaluation.results import far_key
from sphereface2.files import printable, takes_paths, writing
from sphereface2.images import read_image
from sphereface2.recognition.box import chosen
from sphereface2.recognition.face_embedder import FaceEmbedder, Verification


@takes_paths
def verify(
    first: Path,
    second: Path,
    /,
    *,
    model: str | None = None,
    far: float | None = None,
    threshold: float | None = None,
    prior: float = 0.5,
    aligned: bool = False,
    plot: Path | None = None,
    device: str | None = None,
    as_json: bool = False,
) -> dict[str, Any]:
    """Compare two images: similarity, decision and probability that they show one person.

    Args:
        first: An image file.
        second: Another image file.
        model: A run, a model folder, an exported .onnx file, or the id of a model on the hub;
            default: the model that comes with the package.
        far: Decide with the calibrated threshold for this false accept rate; default: the
            calibration's first.
        threshold: Decide at this similarity (cosine) instead of a calibrated threshold.
        prior: Share of genuine pairs that is expected, for the probability.
        aligned: The images are face crops by the template already.
        plot: PNG file to write with both images, the faces found and the decision.
        device: Where to compute: cpu, cuda, mps; by default the best there is.
        as_json: Print JSON instead of a table.

    Returns:
        ``images`` (two paths), `Verification.to_dict` and, if it was written, ``plot``.

    Raises:
        UserError: an image cannot be read or shows no face, no such model, or a wrong option.
    """
    both = (Path(first), Path(second))
    for path in both:
        if not path.is_file():
            raise UserError(f"{path} does not exist or is no file: give an image file")
    if plot is not None and Path(plot).suffix.lower() != ".png":
        name = Path(plot).with_suffix(".png") if Path(plot).name else "NAME.png"
        raise UserError(f"--plot writes a PNG: name it {name}")
    model = chosen(model)
    if aligned:
        warn_if_unaligned("the pair", both.__getitem__, (0, 1), remedy="leave out --aligned")
    embedder = FaceEmbedder.from_pretrained(model, device=device)
    result = embedder.verify(*both, far=far, threshold=threshold, prior=prior, aligned=aligned)
    report = {"images": [*map(str, both)], **result.to_dict()}
    if plot is not None:
        report["plot"] = str(plot)
    console.tell(as_json, report, *_parts(result, model))
    if plot is not None:  # after the decision, which does not depend on it
        draw(result, both, Path(plot))
        if not as_json:
            console.show(f"plot: {plot}")
    return report


def draw(result: Verification, images: tuple[Path, Path], path: Path) -> None:
    """Write a PNG of two compared images, with boxes and landmarks; UserError if it cannot be."""
    from matplotlib.patches import Rectangle

    from sphereface2.evaluation.plots import GENUINE, IMPOSTOR, INK, panels, write

    colour = {True: GENUINE, False: IMPOSTOR, None: "#777777"}[result.same]
    canvas, places = panels(["", ""], columns=2, size=(8, 4.9))
    for place, name, face in zip(places, images, result.faces, strict=True):
        pixels = read_image(name)
        place.imshow(pixels, interpolation="antialiased")
        place.set_axis_off()
        title = printable(name.name)
        place.set_title(title, fontsize=9, color=INK, parse_math=False)  # "$" is just a letter
        if face is not None:
            x0, y0, x1, y1 = (float(edge) for edge in face.box)
            place.add_patch(
                Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=2)
            )
            x, y = face.landmarks.T
            place.scatter(x, y, s=16, c="white", edgecolors=INK, linewidths=0.9)
            # A box may reach beyond the image; the image stays the frame.
            place.set_xlim(-0.5, pixels.shape[1] - 0.5)
            place.set_ylim(pixels.shape[0] - 0.5, -0.5)
    verdict = result.verdict.capitalize()
    canvas.figure.suptitle(verdict, color=colour, fontsize=15, fontweight="bold")
    facts = [f"{name} {value}" for name, value in _facts(result)]
    canvas.figure.supxlabel(" · ".join(facts), color=INK, fontsize=10)
    with writing(path):
        write(canvas, path)


def _facts(result: Verification) -> list[tuple[str, str]]:
    facts = [("similarity", f"{result.similarity:.4f}")]
    if result.threshold is not None:
        chosen = "threshold" if result.far is None else f"threshold for FAR {far_key(result.far)}"
        facts.append((chosen, f"{result.threshold:.4f}"))
    if result.llr is not None and result.probability is not None:
        facts.append(("log-likelihood ratio", f"{result.llr:+z.2f}"))
        at = f"probability at a prior of {result.prior:g}"
        facts.append((at, f"{100 * result.probability:.2f} %"))
    return facts


def _parts(result: Verification, model: str) -> list[Table | str]:
    table = console.table(result.verdict, ["", ""], dim=[0])
    table.show_header = False
    for row in _facts(result):
        table.add_row(*row)
    if result.same is not None:
        return [table]
    return [
        table,
        "the model has no calibration, so there is no threshold: run sphereface2 "
        f"calibrate {model} --pairs FILE --far 1e-2, or give --threshold",
    ]
