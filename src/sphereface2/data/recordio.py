"""MXNet's RecordIO in InsightFace's layout: ``train.rec``, ``train.idx``, ``property``.

A record is a little-endian uint32 magic, a uint32 whose top three bits say which part of a
payload it is (0 whole, 1 first, 2 middle, 3 last) and whose low 29 bits are its length, the
bytes, and zeros up to a multiple of four. A payload that holds the magic at a multiple of four is
split there, the magic itself dropped; the reader puts it back between the parts.

A payload is an ``IRHeader`` (``<IfQQ``: flag, label, id, id2), ``flag`` float32 labels that
replace the label if flag > 0, and the encoded image.
"""

from __future__ import annotations

import mmap
import re
import struct
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, TypeVar

import numpy as np

from sphereface2.data.source import MAX_PEOPLE, OpenFile, check_labels, read_names
from sphereface2.errors import UserError
from sphereface2.files import digest, read_text

MAGIC = 0xCED7230A
_MAGIC_BYTES = struct.pack("<I", MAGIC)
_LENGTH_MASK = (1 << 29) - 1
_HEADER = struct.Struct("<IfQQ")
_FRAME = struct.Struct("<II")
#: float32 counts whole numbers up to here: labels and the header record's keys end here too.
_MAX_EXACT_FLOAT = 1 << 24


class RecordIOSource:
    """The images of a ``.rec`` file.

    ``path`` is the ``.rec`` or a folder that holds ``train.rec``. Records with labels (flag > 0)
    and nothing behind them are the header (labels N+1, N+1+C) and the people's, not images. A
    missing, damaged or foreign ``.idx`` is rebuilt in memory by scanning, with a warning; images
    are then those records that hold one, in the order of the file, wherever the packer put the
    header.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.path = path / "train.rec" if path.is_dir() else path
        if not self.path.is_file():
            raise UserError(f"{self.path} does not exist; give a .rec file or the folder of one")
        if self.path.stat().st_size == 0:
            raise UserError(f"{self.path} is empty")
        with self.path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        keys, offsets, problem = _load_index(self.path, data)
        if problem:
            warnings.warn(
                f"{problem}; index rebuilt by scanning {self.path.name}: {len(offsets)} records",
                stacklevel=3,
            )
        records = _Records(self.path, data, keys, offsets)
        images = records.images(rebuilt=bool(problem))
        if not images.any():
            raise UserError(f"{self.path} holds no images")
        self._keys, self._offsets = keys[images], offsets[images]
        self._starts, self._sizes = records.starts[images], records.sizes[images]
        self.labels = check_labels(records.labels[images], self.path)
        self.num_classes = max(int(self.labels.max()) + 1, self._property_classes())
        self.class_names = read_names(self.path.parent, self.num_classes)
        self._length = len(data)
        self._file = OpenFile(self.path)

    def __len__(self) -> int:
        return len(self._offsets)

    def read(self, index: int) -> bytes:
        """The encoded image ``index``, byte for byte as it was packed."""
        size = self._sizes.item(index)
        if size >= 0:
            return self._file.read(self._starts.item(index), size)
        record = self._file.read(self._offsets.item(index), -size)
        payload = read_payload(record, 0, self.path)
        return payload[_image_start(payload, self.path) :]

    def name(self, index: int) -> str:
        return f"{self.path.name} key {self._keys[index]}"

    def fingerprint(self) -> str:
        return digest("recordio", str(self._length), self._keys, self._offsets, self.labels)

    def _property_classes(self) -> int:
        path = self.path.parent / "property"
        if not path.exists():
            return 0
        try:
            classes = int(read_text(path).split(",")[0])
        except ValueError as error:
            raise UserError(
                f"{path} should read 'classes,height,width'; correct it or delete it"
            ) from error
        if not 0 <= classes <= MAX_PEOPLE:
            raise UserError(
                f"{path} gives {classes} classes, expected 0 to {MAX_PEOPLE:,}; correct it or "
                "delete it"
            )
        if classes <= int(self.labels.max()):
            warnings.warn(
                f"{path} says {classes} classes but label {int(self.labels.max())} occurs; "
                "the records are used",
                stacklevel=3,
            )
        return classes


def _load_index(path: Path, data: mmap.mmap) -> tuple[np.ndarray, np.ndarray, str]:
    """Keys and offsets by ascending key, and why they were rebuilt, or nothing."""
    index_path = path.with_suffix(".idx")
    problem = f"{index_path} is missing"
    if index_path.exists():
        keys, offsets = _parse_index(index_path)
        contradiction = _contradiction(path, data, keys, offsets)
        if not contradiction:
            order = np.argsort(keys, kind="stable")
            return keys[order], offsets[order], ""
        problem = f"{index_path} is damaged or another file's ({contradiction})"
    offsets = scan(data, path)
    return np.arange(len(offsets), dtype=np.int64), offsets, problem


def _parse_index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Keys and offsets; (empty, empty) if any line is not two whole numbers."""
    none = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    try:
        values = np.array(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(), dtype=np.int64)
    except (ValueError, OverflowError):
        return none
    if len(values) == 0 or len(values) % 2:
        return none
    return values[0::2].copy(), values[1::2].copy()


def _contradiction(path: Path, data: mmap.mmap, keys: np.ndarray, offsets: np.ndarray) -> str:
    """What in the index contradicts the file, or an empty string."""
    if len(keys) == 0:
        return "no whole line"
    if offsets.min() < 0 or (offsets % 4).any() or int(offsets.max()) + _FRAME.size > len(data):
        return "an offset lies outside the file or between records"
    words = np.frombuffer(data, dtype="<u4", count=len(data) // 4)
    bad = np.flatnonzero(words[offsets // 4] != MAGIC)
    if len(bad):
        return f"no record starts at the offset of key {keys[bad[0]]}"
    if len(np.unique(keys)) != len(keys) or len(np.unique(offsets)) != len(offsets):
        return "a key or an offset occurs twice"
    starts = np.sort(offsets)
    frames = words[starts // 4 + 1]
    ends = starts + _FRAME.size + _padded((frames & _LENGTH_MASK).astype(np.int64))
    for i in np.flatnonzero((frames >> 29 != 0) | (ends > len(data))).tolist():
        ends[i] = record_end(data, int(starts[i]), path)
    if starts[0] != 0 or (ends[:-1] != starts[1:]).any() or ends[-1] < len(data):
        return "it leaves out records of the file"
    return ""


class _Records:
    """What the headers of all records say, gathered in one sweep of the map.

    Attributes:
        starts: int64 (N,), where the bytes behind a record's labels start.
        sizes: int64 (N,), how many they are; less than 0: the record is split and takes that many
            bytes with its frames.
        labels: float32 (N,), the first label.
        bare: bool (N,), whether the record has labels and nothing behind them.
    """

    def __init__(self, path: Path, data: mmap.mmap, keys: np.ndarray, offsets: np.ndarray) -> None:
        self.path, self._keys = path, keys
        words = np.frombuffer(data, dtype="<u4", count=len(data) // 4)
        at = offsets // 4
        frames = words[at + 1]
        whole = frames >> 29 == 0
        length = (frames & _LENGTH_MASK).astype(np.int64)
        short = np.flatnonzero(whole & (length < _HEADER.size))
        if len(short):
            raise UserError(
                f"{path}: the record at byte {offsets[short[0]]} is too short for a header"
            )
        # A split record may be split inside its header; those few are joined one by one below.
        flags = np.where(whole, words[np.minimum(at + 2, len(words) - 1)], 0).astype(np.int64)
        self.starts = offsets + _FRAME.size + _HEADER.size + 4 * flags
        self.sizes = length - _HEADER.size - 4 * flags
        liars = np.flatnonzero(whole & (self.sizes < 0))
        if len(liars):
            raise UserError(
                f"{path}: key {keys[liars[0]]} declares {flags[liars[0]]} labels but holds fewer; "
                "copy the set again"
            )
        first = at + np.where(flags > 0, 2 + _HEADER.size // 4, 3)
        floats = words.view("<f4")
        self.labels = floats[np.minimum(first, len(words) - 1)]
        self.bare = (flags > 0) & (self.sizes == 0)
        #: The header's labels, if the first record is one.
        self._header = floats[first[0]] if self.bare[0] else None
        for i in np.flatnonzero(~whole).tolist():
            payload = read_payload(data, int(offsets[i]), path)
            start = _image_start(payload, path)
            where = 4 if start == _HEADER.size else _HEADER.size
            self.labels[i] = struct.unpack_from("<f", payload, where)[0]
            self.sizes[i] = int(offsets[i]) - record_end(data, int(offsets[i]), path)

    def images(self, *, rebuilt: bool) -> np.ndarray:
        """bool (N,): which records are images.

        Raises:
            UserError: there are not as many as the header promises.
        """
        images = ~self.bare
        # From 2^24 on the header's float32 cannot say N; NaN says nothing.
        if self._header is None or not self._header < _MAX_EXACT_FLOAT:
            return images
        promised = int(self._header) - 1
        by_key = (self._keys >= 1) & (self._keys <= promised)
        if not rebuilt and int(by_key.sum()) == promised:
            return by_key
        if int(images.sum()) != promised:
            raise UserError(
                f"{self.path}: the header record declares {promised} images but there are "
                f"{int(images.sum())}; copy the set again"
            )
        return images


def _image_start(payload: bytes, path: Path) -> int:
    if len(payload) < _HEADER.size:
        raise UserError(f"{path}: a record of {len(payload)} bytes is too short for a header")
    flag = struct.unpack_from("<I", payload)[0]
    start = _HEADER.size + 4 * flag
    if start > len(payload):
        raise UserError(f"{path}: a record declares {flag} labels but holds fewer")
    return start


def _frame(data: mmap.mmap | bytes, offset: int, path: Path) -> tuple[int, int, int]:
    """(continuation flag, start of the bytes, their length) of the part at ``offset``."""
    if offset + _FRAME.size > len(data):
        raise UserError(f"{path} ends inside the record at byte {offset}; copy the set again")
    magic, word = _FRAME.unpack_from(data, offset)
    if magic != MAGIC:
        raise UserError(f"{path} is damaged: no record starts at byte {offset}; copy the set again")
    length = word & _LENGTH_MASK
    if offset + _FRAME.size + length > len(data):
        raise UserError(f"{path} ends inside the record at byte {offset}; copy the set again")
    return word >> 29, offset + _FRAME.size, length


_Length = TypeVar("_Length", int, np.ndarray)


def _padded(length: _Length) -> _Length:
    return (length + 3) & ~3


def read_payload(data: mmap.mmap | bytes, offset: int, path: Path) -> bytes:
    """The payload of the record at ``offset``, its parts joined by the magic."""
    kind, start, length = _frame(data, offset, path)
    if kind == 0:
        return data[start : start + length]
    if kind != 1:
        raise UserError(f"{path} is damaged: byte {offset} starts in the middle of a record")
    parts = [data[start : start + length]]
    while kind != 3:
        kind, start, length = _frame(data, start + _padded(length), path)
        if kind not in (2, 3):
            raise UserError(f"{path} is damaged: the record at byte {offset} never ends")
        parts.append(data[start : start + length])
    return _MAGIC_BYTES.join(parts)


def record_end(data: mmap.mmap | bytes, offset: int, path: Path) -> int:
    """The first byte past the record at ``offset`` and its padding."""
    kind, start, length = _frame(data, offset, path)
    while kind in (1, 2):
        kind, start, length = _frame(data, start + _padded(length), path)
    return start + _padded(length)


def scan(data: mmap.mmap | bytes, path: Path) -> np.ndarray:
    """int64 offsets of all records, in file order; UserError at the first byte that is wrong."""
    offsets = []
    offset = 0
    while offset < len(data):
        offsets.append(offset)
        offset = record_end(data, offset, path)
    return np.array(offsets, dtype=np.int64)


# -- writing -----------------------------------------------------------------------------------


def pack(label: float | Iterable[float], image: bytes = b"", key: int = 0) -> bytes:
    """A payload: IRHeader, extra labels if ``label`` is a sequence, then the image bytes."""
    if isinstance(label, (int, float)):
        return _HEADER.pack(0, label, key, 0) + image
    labels = np.asarray(list(label), dtype="<f4")
    return _HEADER.pack(len(labels), 0.0, key, 0) + labels.tobytes() + image


def write_record(file: BinaryIO, payload: bytes) -> int:
    """Append one record, split wherever the payload holds the magic aligned; bytes written."""
    found = (match.start() for match in re.finditer(re.escape(_MAGIC_BYTES), payload))
    cuts = [at for at in found if at % 4 == 0]
    parts = [
        payload[start:end]
        for start, end in zip([0, *(at + 4 for at in cuts)], [*cuts, len(payload)], strict=True)
    ]
    written = 0
    for i, part in enumerate(parts):
        if len(part) > _LENGTH_MASK:
            raise UserError(f"a record of {len(part)} bytes exceeds RecordIO's 512 MiB")
        kind = 0 if len(parts) == 1 else 1 if i == 0 else 3 if i == len(parts) - 1 else 2
        padding = bytes(_padded(len(part)) - len(part))
        written += file.write(_FRAME.pack(MAGIC, kind << 29 | len(part)) + part + padding)
    return written


class RecordIOWriter:
    """Writes ``train.rec``, ``train.idx`` and ``property`` into an existing folder.

    Images are added person by person in ascending order of label (the per-person records of the
    layout name ranges of keys; a label left out gets an empty range); ``close`` completes the
    header record. Used as a context manager.
    """

    def __init__(self, directory: str | Path, size: tuple[int, int] = (112, 112)) -> None:
        self.directory = Path(directory)
        self.size = size
        self._file = (self.directory / "train.rec").open("wb")
        self._offset = write_record(self._file, pack((0.0, 0.0)))
        self._index = [0]
        self._first_keys: list[int] = []
        self._label = -1

    def add(self, label: int, image: bytes) -> None:
        """Append an image of person ``label``: the label added last, or a larger one."""
        if label < max(self._label, 0):
            raise ValueError(f"label {label} after {self._label}: labels must ascend from 0")
        if label >= _MAX_EXACT_FLOAT:
            raise UserError(f"RecordIO keeps labels as float32: {label} is past 2**24")
        self._first_keys += [len(self._index)] * (label - self._label)
        self._label = label
        self._append(pack(float(label), image, len(self._index)))

    def _append(self, payload: bytes) -> None:
        self._index.append(self._offset)
        self._offset += write_record(self._file, payload)

    def close(self) -> None:
        if self._file.closed:
            return
        end = len(self._index)
        people = len(self._first_keys)
        bounds = [*self._first_keys, end]
        for person in range(people):
            self._append(pack((float(bounds[person]), float(bounds[person + 1])), key=end + person))
        self._file.seek(0)
        write_record(self._file, pack((float(end), float(end + people))))
        self._file.close()
        lines = "".join(f"{key}\t{offset}\n" for key, offset in enumerate(self._index))
        (self.directory / "train.idx").write_text(lines)
        (self.directory / "property").write_text(f"{people},{self.size[0]},{self.size[1]}\n")

    def __enter__(self) -> RecordIOWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()
