"""Verification sets: which images to compare and which pairs show one person.

Layouts: InsightFace's ``.bin`` (a pickle, read by an unpickler that admits data only), LFW's
``pairs.txt`` next to a folder of images, pair lists of ``label path0 path1``, the lists of CALFW
and CPLFW (two lines of ``image label`` a pair), and CFP's protocol folder.
"""

from __future__ import annotations

import csv
import io
import os
import pickle
import pickletools
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Final

import numpy as np

from sphereface2.errors import UserError
from sphereface2.files import digest

Image = bytes | np.ndarray
_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class ImageFiles(Sequence[bytes]):
    """Image files as a sequence of their encoded bytes, read when asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return ImageFiles(self.paths[index])
        try:
            return self.paths[index].read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {self.paths[index]}: {error.strerror}") from error


@dataclass(frozen=True)
class PairSet:
    """A verification set of P pairs over N distinct images.

    Attributes:
        name: what to call the set, the file's stem.
        images: N encoded images (bytes) or decoded ones (uint8 RGB, (H, W, 3)).
        pairs: int64 (P, 2), indices into ``images``.
        same: bool (P,), whether the pair shows one person.
        folds: int64 (P,), the fold of each pair, 0 to K-1; all 0 where there are no folds.
        people: int64 (N,), the identity of each image, or None where the set does not tell.
        image_names: N names for messages, or None.
    """

    name: str
    images: Sequence[Image]
    pairs: np.ndarray
    same: np.ndarray
    folds: np.ndarray
    people: np.ndarray | None = None
    image_names: Sequence[str] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.pairs)

    def fingerprint(self) -> str:
        """sha256 over the images and the pairs; reads every image."""
        images = (
            image if isinstance(image, bytes) else f"{image.shape}".encode() + image.tobytes()
            for image in (self.images[i] for i in range(len(self.images)))
        )
        return digest(self.pairs.astype(np.int64), self.same.astype(bool), *images)

    def image_name(self, index: int) -> str:
        """Name image ``index`` in a message."""
        if self.image_names is not None:
            return self.image_names[index]
        where = np.argwhere(self.pairs == index)
        return f"{self.name}: image {where[0, 1]} of pair {where[0, 0]}" if len(where) else "image"


def consecutive_folds(pairs: int, folds: int = 10) -> np.ndarray:
    """The fold of each pair when nothing says otherwise: int64 (pairs,).

    Consecutive blocks as even as can be, the first ``pairs % folds`` one longer: the convention of
    the field (scikit-learn's ``KFold(10, shuffle=False)``), and LFW's own folds when the pairs
    stand in the official order. Fewer pairs than folds cannot be split and are all in fold 0.
    """
    if pairs < folds:
        return np.zeros(pairs, np.int64)
    sizes = np.full(folds, pairs // folds)
    sizes[: pairs % folds] += 1
    return np.repeat(np.arange(folds), sizes)


def load_pairs(
    path: str | Path, *, images: str | Path | None = None, names: str | Path | None = None
) -> PairSet:
    """Read a verification set.

    Args:
        path: an InsightFace ``.bin``, an LFW ``pairs.txt``, a list of ``label path0 path1`` lines
            (tab, comma or space; 1 = one person), or one of ``image label`` lines, two a pair.
        images: the folder that holds the images of a text list; by default the list's own folder.
        names: for a ``.bin``, the ``pairs.txt`` in whose order it was written: it tells who the
            people are, so that intervals can be bootstrapped over people.

    Raises:
        UserError: the file is missing, damaged, of no known layout, or names missing images.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no verification set {path}")
    with path.open("rb") as file:
        head = file.read(2)
    if path.suffix == ".bin" or head[:1] == b"\x80":
        if images is not None:
            raise UserError(f"{path} holds its own images: leave out the image folder")
        return _load_bin(path, Path(names) if names is not None else None)
    if names is not None:
        raise UserError(f"a list of names belongs to a .bin, but {path} is a text list")
    return _load_text(path, Path(images) if images is not None else path.parent)


# --- .bin ----------------------------------------------------------------------------------------


class _DType:
    """Stand-in for numpy.dtype: remembers the type code."""

    __slots__ = ("code",)

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code.decode() if isinstance(code, bytes) else str(code)

    def __setstate__(self, state: Any) -> None:
        # Byte order, fields and alignment; of no meaning for the one-byte types we accept.
        if self.code not in ("u1", "b1"):
            raise pickle.UnpicklingError(f"an array of type {self.code}")


class _NdArray:
    """Stand-in for numpy.ndarray, filled by the pickle's own state tuple."""

    __slots__ = ("array",)

    def __init__(self) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.array = _array(data, dtype, shape, "F" if fortran else "C")


def _array(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(dtype, _DType) or dtype.code not in ("u1", "b1"):
        raise pickle.UnpicklingError("an array that is not of bytes or booleans")
    if not isinstance(data, bytes | bytearray):
        raise pickle.UnpicklingError("an array without its bytes")
    raw: np.ndarray = np.frombuffer(data, dtype=np.uint8 if dtype.code == "u1" else np.bool_)
    return raw.reshape(tuple(int(n) for n in shape), order="F" if order == "F" else "C")


def _reconstruct(subtype: Any, shape: Any, code: Any) -> _NdArray:
    return _NdArray()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> _NdArray:
    result = _NdArray()
    result.array = _array(data, dtype, shape, order)
    return result


def _scalar(dtype: Any, data: Any) -> Any:
    return _array(data, dtype, (), "C")[()].item()


def _encode(text: Any, codec: Any = "latin1") -> bytes:
    """Protocol 2 writes Python 3's bytes as ``_codecs.encode(text, "latin1")``."""
    if codec not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"the codec {codec}")
    return str(text).encode("latin1")


class _Frozen:
    """A callable that a pickle's BUILD instruction cannot alter."""

    __slots__ = ("_call",)
    _call: Callable[..., Any]

    def __init__(self, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "_call", call)

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"an assignment to {name}")

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a changed function")


_NUMPY_CORE: Final = ("numpy.core.", "numpy._core.")
_ADMITTED: Final[dict[tuple[str, str], Callable[..., Any]]] = {
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _NdArray,
    ("_codecs", "encode"): _encode,
    **{(core + "multiarray", "_reconstruct"): _reconstruct for core in _NUMPY_CORE},
    **{(core + "multiarray", "scalar"): _scalar for core in _NUMPY_CORE},
    **{(core + "numeric", "_frombuffer"): _from_buffer for core in _NUMPY_CORE},
}


# Numbers, booleans, None; bytes and text; tuples and lists; the stack, the memo, the frame of the
# program; and for numpy's arrays a name, a call and a state.
_OPERATIONS: Final = frozenset(
    """
    INT BININT BININT1 BININT2 LONG LONG1 LONG4 NONE NEWTRUE NEWFALSE
    STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
    UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8
    EMPTY_LIST APPEND APPENDS LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 MARK
    POP POP_MARK DUP GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE PROTO FRAME STOP
    GLOBAL STACK_GLOBAL REDUCE BUILD
    """.split()  # noqa: SIM905
)


def _check_program(data: bytes) -> None:
    """Read a pickle's operations without carrying them out; UnpicklingError for a foreign one."""
    count = 0
    for count, (operation, argument, _) in enumerate(pickletools.genops(data), 1):
        if operation.name not in _OPERATIONS:
            raise pickle.UnpicklingError(f"the operation {operation.name}")
        # The memo is an array: storing at 4 billion would take the memory of so many entries.
        stores = operation.name in ("PUT", "BINPUT", "LONG_BINPUT")
        if stores and argument is not None and not 0 <= argument <= count:
            raise pickle.UnpicklingError(f"a reference numbered {argument}")


class _DataUnpickler(pickle.Unpickler):
    """Builds tuples, lists, bytes, booleans, integers, strings and uint8 arrays; nothing else.

    Every global that a pickle names is looked up in a closed table of stand-ins defined above, so
    a pickle imports nothing and calls no function but those; numpy itself is not reached either.
    """

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _Frozen(_ADMITTED[module, name])
        except KeyError:
            raise pickle.UnpicklingError(f"the name {module!r}.{name!r}") from None


def _load_bin(path: Path, names: Path | None) -> PairSet:
    try:
        # Sets written by Python 2 hold their images as `str`, which only "bytes" keeps whole.
        data = path.read_bytes()
        _check_program(data)
        content = _DataUnpickler(io.BytesIO(data), encoding="bytes").load()
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is not a plain verification set and was not read: it holds {error}"
        ) from error
    except Exception as error:  # a damaged pickle can fail in any operation of the machine
        raise UserError(f"{path} is damaged: {type(error).__name__}: {error!s:.100}") from error

    if not (isinstance(content, tuple | list) and len(content) == 2):
        raise UserError(f"{path} is not a verification set: expected (images, same or not)")
    images, same = (c.array if isinstance(c, _NdArray) else c for c in content)
    if not isinstance(images, list | tuple) or not isinstance(same, list | tuple | np.ndarray):
        raise UserError(f"{path} is not a verification set: expected two lists")
    if len(images) != 2 * len(same) or len(same) == 0:
        raise UserError(
            f"{path} has {len(images)} images for {len(same)} pairs: expected two a pair"
        )
    verdicts = same.tolist() if isinstance(same, np.ndarray) else same
    if not all(isinstance(verdict, int) and verdict in (0, 1) for verdict in verdicts):
        raise UserError(f"{path} has a pair whose verdict is neither true nor false")
    same = np.array(verdicts, bool)

    who: list[str] | None = None
    folds = None
    if names is not None:
        listed = _parse_pairs_txt(names, _lines(names))
        who = [person for entry in listed.entries for person, _ in entry]
        if len(listed.entries) != len(same):
            raise UserError(f"{names} lists {len(listed.entries)} pairs, {path} has {len(same)}")
        wrong = np.flatnonzero(listed.same != same)
        if len(wrong):
            raise UserError(
                f"{names} and {path} disagree on pair {wrong[0]}: is it another set's list?"
            )
        folds = listed.folds

    # An image that serves several pairs is embedded once.
    seen: dict[Hashable, int] = {}
    distinct: list[Image] = []
    index = np.empty(len(images), np.int64)
    for i, item in enumerate(images):
        image = _bin_image(path, i, item)
        key = (who[i] if who else None, image if isinstance(image, bytes) else image.tobytes())
        if key not in seen:
            seen[key] = len(distinct)
            distinct.append(image)
        index[i] = seen[key]
    people = None
    if who is not None:
        people = np.empty(len(distinct), np.int64)
        people[index] = np.unique(who, return_inverse=True)[1]
    return PairSet(
        name=path.stem,
        images=distinct,
        pairs=index.reshape(-1, 2),
        same=same,
        folds=consecutive_folds(len(same)) if folds is None else folds,
        people=people,
    )


def _bin_image(path: Path, i: int, item: Any) -> Image:
    if isinstance(item, _NdArray):
        item = item.array
    if isinstance(item, bytes | bytearray):
        return bytes(item)
    if isinstance(item, np.ndarray) and item.dtype == np.uint8:
        if item.ndim == 1:  # encoded bytes held as an array
            return item.tobytes()
        if item.ndim == 3 and item.shape[2] == 3:
            return np.ascontiguousarray(item)
    raise UserError(f"{path}: image {i % 2} of pair {i // 2} is neither bytes nor a uint8 array")


# --- text lists ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _PairsTxt:
    entries: list[tuple[tuple[str, int], tuple[str, int]]]
    same: np.ndarray
    folds: np.ndarray


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is neither a .bin nor a text list") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    lines = [(n, line.strip()) for n, line in enumerate(text.splitlines(), 1)]
    lines = [(n, line) for n, line in lines if line and not line.startswith("#")]
    if not lines:
        raise UserError(f"{path} lists no pairs")
    return lines


def _load_text(path: Path, root: Path) -> PairSet:
    lines = _lines(path)
    if not root.is_dir():
        raise UserError(f"there is no image folder {root}")
    # pairs.txt opens with "folds pairs" (or "pairs" in View 1); a headless one with names.
    first = re.split(r"\s+", lines[0][1])
    lfw = all(f.isdigit() for f in first) and len(first) <= 2
    lfw |= len(first) in (3, 4) and not re.fullmatch(r"[01]|-1", first[0]) and first[-1].isdigit()
    if lfw:
        return _load_pairs_txt(path, lines, root)
    if len(first) == 2 and PurePath(first[0]).suffix.lower() in _SUFFIXES and first[1].isdigit():
        return _load_two_line_list(path, lines, root)
    return _load_pair_list(path, lines, root)


def _parse_pairs_txt(path: Path, lines: list[tuple[int, str]]) -> _PairsTxt:
    header = [int(f) for f in lines[0][1].split()] if re.fullmatch(r"[\d\s]+", lines[0][1]) else []
    entries, same = [], []
    for number, line in lines[1:] if header else lines:
        fields = line.split("\t") if "\t" in line else line.split()
        numbers = fields[1:] if len(fields) == 3 else fields[1::2]
        if len(fields) not in (3, 4) or not all(n.isdigit() for n in numbers):
            raise UserError(f"{path} line {number}: expected 'name n1 n2' or 'name1 n1 name2 n2'")
        other = fields[0] if len(fields) == 3 else fields[2]
        entries.append(((fields[0], int(numbers[0])), (other, int(numbers[1]))))
        same.append(fields[0] == other)
    per_fold = 2 * header[-1] if header else 0
    count = header[0] if len(header) == 2 else 1
    if header and len(entries) != count * per_fold:
        raise UserError(
            f"{path} promises {count * per_fold} pairs in its first line and has {len(entries)}"
        )
    folds = np.arange(count).repeat(per_fold) if count > 1 else consecutive_folds(len(entries))
    return _PairsTxt(entries, np.array(same), folds)


def _load_pairs_txt(path: Path, lines: list[tuple[int, str]], root: Path) -> PairSet:
    listed = _parse_pairs_txt(path, lines)
    files: dict[tuple[str, int], int] = {}
    index = [[files.setdefault(image, len(files)) for image in pair] for pair in listed.entries]
    paths = []
    for person, number in files:
        stem = root / person / f"{person}_{number:04d}"
        found = next((p for s in _SUFFIXES if (p := stem.with_name(stem.name + s)).exists()), None)
        paths.append(found or stem.with_name(stem.name + ".jpg"))
    _require(path, paths, root)
    return PairSet(
        name=path.stem,
        images=ImageFiles(paths),
        pairs=np.array(index, np.int64),
        same=listed.same,
        folds=listed.folds,
        people=np.unique([person for person, _ in files], return_inverse=True)[1].astype(np.int64),
        image_names=[str(p) for p in paths],
    )


def _load_pair_list(path: Path, lines: list[tuple[int, str]], root: Path) -> PairSet:
    files: dict[str, int] = {}
    index, same = [], []
    for number, line in lines:
        if "\t" in line:
            fields = line.split("\t")
        elif "," in line:
            fields = next(csv.reader([line], skipinitialspace=True))
        else:
            fields = line.split()
        fields = [f.strip() for f in fields]
        if len(fields) != 3 or fields[0] not in ("0", "1", "-1"):
            raise UserError(f"{path} line {number}: expected 'label path0 path1' with label 1 or 0")
        same.append(fields[0] == "1")
        index.append([files.setdefault(f, len(files)) for f in fields[1:]])
    paths = [root / f for f in files]
    _require(path, paths, root)
    pairs, verdicts = np.array(index, np.int64), np.array(same)
    # root/person/image is the usual layout, and the labels tell whether it is this list's.
    people = np.unique([str(PurePath(f).parent) for f in files], return_inverse=True)[1]
    agrees = bool(np.array_equal(people[pairs[:, 0]] == people[pairs[:, 1]], verdicts))
    return PairSet(
        name=path.stem,
        images=ImageFiles(paths),
        pairs=pairs,
        same=verdicts,
        folds=consecutive_folds(len(pairs)),
        people=people.astype(np.int64) if agrees else None,
        image_names=[str(p) for p in paths],
    )


def _load_two_line_list(path: Path, lines: list[tuple[int, str]], root: Path) -> PairSet:
    """CALFW's and CPLFW's list: 0 marks a mismatched pair; a matched one has 1, or its fold."""
    if len(lines) % 2:
        raise UserError(f"{path} has {len(lines)} lines: expected two a pair")
    files: dict[str, int] = {}
    index, marks = [], []
    for (number, line), (_, other) in zip(lines[::2], lines[1::2], strict=True):
        fields = [*line.split(), *other.split()]
        if len(fields) != 4 or not fields[1].isdigit() or fields[1] != fields[3]:
            raise UserError(f"{path} line {number}: expected two lines 'image label', labels equal")
        marks.append(int(fields[1]))
        index.append([files.setdefault(f, len(files)) for f in fields[::2]])
    paths = [root / f for f in files]
    _require(path, paths, root)
    pairs, label = np.array(index, np.int64), np.array(marks)
    people = np.unique(
        [re.sub(r"_\d+$", "", str(PurePath(f).with_suffix(""))) for f in files],
        return_inverse=True,
    )[1]
    agrees = bool(np.array_equal(people[pairs[:, 0]] == people[pairs[:, 1]], label > 0))
    # The matched pairs may all stand before the mismatched: each kind is split for itself.
    folds = np.empty(len(label), np.int64)
    for kind in (label > 0, label == 0):
        folds[kind] = consecutive_folds(int(kind.sum()))
    if label.max() > 1:
        folds[label > 0] = label[label > 0] - 1
    return PairSet(
        name=path.stem,
        images=ImageFiles(paths),
        pairs=pairs,
        same=label > 0,
        folds=folds,
        people=people.astype(np.int64) if agrees else None,
        image_names=[str(p) for p in paths],
    )


def load_cfp(root: str | Path, protocol: str) -> PairSet:
    """Read CFP in its authors' layout.

    ``root/Protocol/Pair_list_F.txt`` and ``Pair_list_P.txt`` number the frontal and the profile
    images by ``number path`` lines, paths relative to ``Protocol``;
    ``root/Protocol/Split/FP/01/same.txt`` to ``10/diff.txt`` hold the folds, a line
    ``number,number`` a pair.

    Args:
        root: the folder with ``Protocol`` and ``Data``.
        protocol: "FF" (frontal against frontal) or "FP" (frontal against profile).

    Raises:
        UserError: a file is missing or says something else.
    """
    folder = Path(root) / "Protocol"
    frontal = _cfp_images(folder / "Pair_list_F.txt")
    second = frontal if protocol == "FF" else _cfp_images(folder / "Pair_list_P.txt")
    split = folder / "Split" / protocol
    folds_at = sorted(p for p in split.iterdir() if p.is_dir()) if split.is_dir() else []
    if len(folds_at) < 2:
        raise UserError(f"{split} holds {len(folds_at)} folds: expected the folders 01 to 10")
    files: dict[Path, int] = {}
    index, same, folds = [], [], []
    for fold, place in enumerate(folds_at):
        for name in ("same.txt", "diff.txt"):
            for number, line in _lines(place / name):
                fields = [f.strip() for f in line.split(",")]
                if len(fields) != 2 or fields[0] not in frontal or fields[1] not in second:
                    raise UserError(
                        f"{place / name} line {number}: expected two numbers of the pair lists"
                    )
                one, other = frontal[fields[0]], second[fields[1]]
                index.append([files.setdefault(p, len(files)) for p in (one, other)])
                same.append(name == "same.txt")
                folds.append(fold)
    paths = list(files)
    _require(split, paths, Path(root))
    pairs, verdicts = np.array(index, np.int64), np.array(same)
    # Data/Images/PERSON/frontal/01.jpg, if the labels agree.
    people = np.unique([str(p.parent.parent) for p in paths], return_inverse=True)[1]
    agrees = bool(np.array_equal(people[pairs[:, 0]] == people[pairs[:, 1]], verdicts))
    return PairSet(
        name=f"cfp_{protocol.lower()}",
        images=ImageFiles(paths),
        pairs=pairs,
        same=verdicts,
        folds=np.array(folds, np.int64),
        people=people.astype(np.int64) if agrees else None,
        image_names=[str(p) for p in paths],
    )


def _cfp_images(path: Path) -> dict[str, Path]:
    found = {}
    for number, line in _lines(path):
        fields = line.split(maxsplit=1)
        if len(fields) != 2 or not fields[0].isdigit():
            raise UserError(f"{path} line {number}: expected 'number path'")
        found[fields[0]] = Path(os.path.normpath(path.parent / fields[1]))
    return found


class _Chain(Sequence[Image]):
    """Sequences of images one after the other."""

    def __init__(self, parts: Sequence[Sequence[Image]]) -> None:
        self.parts = parts
        self.ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: Any) -> Any:
        part = int(np.searchsorted(self.ends, index, side="right"))
        return self.parts[part][index - int(self.ends[part]) + len(self.parts[part])]


def union(name: str, sets: Sequence[PairSet]) -> PairSet:
    """One set of all pairs of ``sets``: fold k holds the pairs of their folds k.

    A person may be in several of them under numbers that differ, so the people are not told.
    """
    shifts = np.cumsum([0, *(len(s.images) for s in sets)])
    return PairSet(
        name=name,
        images=_Chain([s.images for s in sets]),
        pairs=np.concatenate([s.pairs + n for s, n in zip(sets, shifts, strict=False)]),
        same=np.concatenate([s.same for s in sets]),
        folds=np.concatenate([s.folds for s in sets]),
        image_names=[s.image_name(i) for s in sets for i in range(len(s.images))],
    )


def _require(path: Path, paths: list[Path], root: Path) -> None:
    missing = [p for p in paths if not p.is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(paths)} images that {path} lists are missing, "
            f"the first is {missing[0]}: is {root} the right image folder?"
        )
