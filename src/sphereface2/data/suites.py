"""The field's test suites by name, and the verification sets of a command: opened, not scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sphereface2.data import ijb
from sphereface2.data.folder import ImageSource
from sphereface2.data.ijb import TemplateSet
from sphereface2.data.opening import is_bin, load_pairs, names_beside, open_source
from sphereface2.data.pairlist import read_cfp
from sphereface2.data.pairs import PairSet, union
from sphereface2.data.source import Source
from sphereface2.errors import UserError, did_you_mean

_BINS = {
    "lfw": ("lfw.bin",),
    "agedb30": ("agedb_30.bin", "agedb30.bin"),
    "calfw": ("calfw.bin",),
    "cplfw": ("cplfw.bin",),
    "cfp_ff": ("cfp_ff.bin",),
    "cfp_fp": ("cfp_fp.bin",),
}
#: The authors' lists and the image folders they go with, in either of two places.
_LISTS = {
    "lfw": (("lfw/pairs.txt", "lfw/lfw"), ("pairs.txt", "lfw"), ("lfw_pairs.txt", "lfw")),
    "calfw": (
        ("calfw/pairs_CALFW.txt", "calfw/aligned images"),
        ("pairs_CALFW.txt", "aligned images"),
    ),
    "cplfw": (
        ("cplfw/pairs_CPLFW.txt", "cplfw/aligned images"),
        ("pairs_CPLFW.txt", "aligned images"),
    ),
}
_CFP = ("cfp-dataset", "")
_COMBINED = ("lfw", "agedb30", "calfw", "cplfw")
_MEGAFACE = (("facescrub_images", "megaface_images"), ("probes", "distractors"))
SUITES = (*_BINS, "combined", "ijbb", "ijbc", "megaface")


@dataclass(frozen=True)
class MegaFace:
    """MegaFace's challenge.

    Attributes:
        probes: a labelled set.
        distractors: images of other people: a folder of any depth, or a packed set.
    """

    probes: Source
    distractors: Source


def open_suite(name: str, root: str | Path) -> PairSet | TemplateSet | MegaFace:
    """Find a suite's files under ``root``.

    Args:
        name: one of `SUITES`.
        root: the folder that holds the suite, or several of them.

    Raises:
        UserError: unknown name; or files are missing, and all that were looked for are named.
    """
    root = Path(root)
    if name not in SUITES:
        raise UserError(
            f"there is no suite {name!r}{did_you_mean(name, SUITES)}; available: "
            f"{', '.join(SUITES)}"
        )
    if not root.is_dir():
        raise UserError(f"there is no folder {root} to look for suite {name} in: give --root one")
    if name in ("ijbb", "ijbc"):
        return ijb.load(name, root)
    if name == "megaface":
        places = [(root / probes, root / distractors) for probes, distractors in _MEGAFACE]
        for probes, distractors in places:
            if probes.exists() and distractors.exists():
                return MegaFace(open_source(probes), _open_images(distractors))
        raise UserError(_missing(name, root, [list(both) for both in places]))
    if name == "combined":
        absent = [
            _missing(part, root, looked) for part in _COMBINED if (looked := _absent(part, root))
        ]
        if absent:
            raise UserError("suite combined needs four sets, and " + "; ".join(absent))
        return union(name, [_open_pairs(part, root) for part in _COMBINED])
    return _open_pairs(name, root)


def _forms(name: str, root: Path) -> list[tuple[list[Path], Callable[[], PairSet]]]:
    """Each form that a set of pairs may have: the files it needs, and what reads them."""

    def packed(path: Path) -> tuple[list[Path], Callable[[], PairSet]]:
        return [path], lambda: load_pairs(path, names=names_beside(path))

    def listed(path: Path, images: Path) -> tuple[list[Path], Callable[[], PairSet]]:
        return [path, images], lambda: load_pairs(path, images=images)

    def cfp(folder: Path) -> tuple[list[Path], Callable[[], PairSet]]:
        protocol = name[-2:].upper()
        needed = [folder / "Protocol" / "Pair_list_F.txt", folder / "Protocol" / "Split" / protocol]
        if protocol == "FP":
            needed.append(folder / "Protocol" / "Pair_list_P.txt")
        return needed, lambda: read_cfp(folder, protocol)

    forms = [packed(root / file) for file in _BINS[name]]
    forms += [listed(root / path, root / images) for path, images in _LISTS.get(name, ())]
    if name.startswith("cfp"):
        forms += [cfp(root / folder) for folder in _CFP]
    return forms


def _absent(name: str, root: Path) -> list[list[Path]]:
    """The files of every form, or nothing if one form is whole."""
    forms = [needed for needed, _ in _forms(name, root)]
    return [] if any(all(p.exists() for p in needed) for needed in forms) else forms


def _open_pairs(name: str, root: Path) -> PairSet:
    for needed, read in _forms(name, root):
        if all(path.exists() for path in needed):
            return replace(read(), name=name)
    raise UserError(_missing(name, root, _absent(name, root)))


def _missing(name: str, root: Path, forms: list[list[Path]]) -> str:
    looked_for = (
        " with ".join(f"{p} (found)" if p.exists() else str(p) for p in needed) for needed in forms
    )
    return f"suite {name} is not under {root}: looked for {', or '.join(looked_for)}"


def _open_images(path: Path) -> Source:
    """The images at ``path``, whomever they show: a folder of any depth, or a packed set."""
    packed = path.is_file() or any(path.glob("[!.]*.rec")) or any(path.glob("[!.]*.tar"))
    return open_source(path) if packed else ImageSource(path)


def open_pair_sets(
    paths: Sequence[Path], images: Path | None = None, names: Path | None = None
) -> list[PairSet]:
    """Open the verification sets of a command's ``--pairs``, ``--images`` and ``--names``.

    Args:
        paths: ``.bin`` files and text lists.
        images: the image folder of the text lists.
        names: the list of people of the one ``.bin``; by default ``X_pairs.txt`` beside ``X.bin``.

    Raises:
        UserError: a set cannot be read, or ``images`` or ``names`` belong to none of them.
    """
    packed = [path for path in paths if is_bin(path)]
    if names is not None and len(packed) != 1:
        raise UserError(f"--names belongs to one .bin file, and --pairs gives {len(packed)}")
    if images is not None and len(packed) == len(paths):
        raise UserError("--images belongs to a text list of pairs, and --pairs gives none")
    return [
        load_pairs(path, names=names or names_beside(path))
        if path in packed
        else load_pairs(path, images=images)
        for path in paths
    ]
