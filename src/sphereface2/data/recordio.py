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
from array import array
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
_AT_ONCE = 1 << 16  # records whose headers are gathered together


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
        keys, records, problem = _load_index(self.path, data)
        if problem:
            warnings.warn(
                f"{problem}; index rebuilt by scanning {self.path.name}: {len(keys)} records",
                stacklevel=3,
            )
        records.measure(keys)
        images = np.argsort(keys, kind="stable")
        images = images[records.images(keys, rebuilt=bool(problem))[images]]
        if not len(images):
            raise UserError(f"{self.path} holds no images")
        self._keys, self._offsets = keys[images], records.offsets[images]
        self._starts, self._sizes = records.starts[images], records.sizes[images]
        self.labels = check_labels(records.labels[images], self.path)
        if self.labels.max() >= _MAX_EXACT_FLOAT:
            raise UserError(
                f"{self.path}: label {int(self.labels.max())} is past 2**24, from where float32, "
                "which RecordIO keeps labels in, gives two people one label: pack the set as a "
                "WebDataset or a list"
            )
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


def _load_index(path: Path, data: mmap.mmap) -> tuple[np.ndarray, _Records, str]:
    """Keys of the records in the order of the file, these, and why the index was rebuilt, if so."""
    index_path = path.with_suffix(".idx")
    problem = f"{index_path} is missing"
    if index_path.exists():
        keys, offsets = _parse_index(index_path)
        contradiction = _impossible(keys, offsets, len(data))
        if not contradiction:
            by_place = np.argsort(offsets, kind="stable")
            keys = keys[by_place]
            records = _Records(path, data, offsets[by_place])
            contradiction = records.contradiction(keys)
            if not contradiction:
                return keys, records, ""
        problem = f"{index_path} is damaged or another file's ({contradiction})"
    records = _Records(path, data, scan(data, path))
    return np.arange(len(records.offsets)), records, problem


def _parse_index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Keys and offsets; (empty, empty) if any line is not two whole numbers."""
    none = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    text = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)  # older NumPy, of no number
            values = np.fromstring(text, dtype=np.int64, sep=" ")
    except (ValueError, DeprecationWarning):
        return none
    if len(values) == 0 or len(values) % 2:
        return none
    return values[0::2].copy(), values[1::2].copy()


def _impossible(keys: np.ndarray, offsets: np.ndarray, length: int) -> str:
    """Why there can be no such index of a file of that length, or an empty string."""
    if len(keys) == 0:
        return "no whole line"
    if offsets.min() < 0 or (offsets % 4).any() or int(offsets.max()) + _FRAME.size > length:
        return "an offset lies outside the file or between records"
    if any((np.diff(np.sort(values)) == 0).any() for values in (keys, offsets)):
        return "a key or an offset occurs twice"
    return ""


class _Records:
    """What the headers of all records say, gathered in one sweep of the map.

    A second sweep would read the file a second time, where it is larger than the memory that the
    system has to keep it in.

    Args:
        path: the file.
        data: its map.
        offsets: int64 (N,), ascending, where records start.

    Attributes:
        starts: int64 (N,), where the bytes behind a record's labels start.
        sizes: int64 (N,), how many they are; less than 0: the record is split and takes that many
            bytes with its frames.
        labels: float32 (N,), the first label.
        bare: bool (N,), whether the record has labels and nothing behind them.
    """

    def __init__(self, path: Path, data: mmap.mmap, offsets: np.ndarray) -> None:
        self.path, self._data, self.offsets = path, data, offsets
        words = np.frombuffer(data, dtype="<u4", count=len(data) // 4)
        count = len(offsets)
        self._starting = np.empty(count, bool)
        self._frames, self._flags = np.empty(count, "<u4"), np.empty(count, "<u4")
        labels = np.empty(count, "<u4")
        for first in range(0, count, _AT_ONCE):
            chunk = slice(first, first + _AT_ONCE)
            at = offsets[chunk] // 4
            magic, frame, flag, label, more = (
                words[np.minimum(at + place, len(words) - 1)]
                for place in (0, 1, 2, 3, 2 + _HEADER.size // 4)
            )
            self._starting[chunk] = magic == MAGIC
            self._frames[chunk], self._flags[chunk] = frame, flag
            labels[chunk] = np.where(flag > 0, more, label)
        self.labels = labels.view("<f4")

    def contradiction(self, keys: np.ndarray) -> str:
        """What in an index of these keys contradicts the file, or an empty string."""
        bad = np.flatnonzero(~self._starting)
        if len(bad):
            return f"no record starts at the offset of key {keys[bad[0]]}"
        starts, length = self.offsets, len(self._data)
        ends = starts + _FRAME.size + _padded((self._frames & _LENGTH_MASK).astype(np.int64))
        for i in np.flatnonzero((self._frames >> 29 != 0) | (ends > length)).tolist():
            ends[i] = record_end(self._data, int(starts[i]), self.path)
        if starts[0] != 0 or (ends[:-1] != starts[1:]).any() or ends[-1] < length:
            return "it leaves out records of the file"
        return ""

    def measure(self, keys: np.ndarray) -> None:
        """Find ``starts``, ``sizes`` and ``bare``.

        Raises:
            UserError: a record that is too short for what its header declares.
        """
        whole = self._frames >> 29 == 0
        length = (self._frames & _LENGTH_MASK).astype(np.int64)
        short = np.flatnonzero(whole & (length < _HEADER.size))
        if len(short):
            raise UserError(
                f"{self.path}: the record at byte {self.offsets[short[0]]} is too short for a "
                "header"
            )
        # A split record may be split inside its header; those few are joined one by one below.
        labels = 4 * np.where(whole, self._flags, 0).astype(np.int64)
        self.starts = self.offsets + _FRAME.size + _HEADER.size + labels
        self.sizes = length - _HEADER.size - labels
        liars = np.flatnonzero(whole & (self.sizes < 0))
        if len(liars):
            raise UserError(
                f"{self.path}: key {keys[liars[0]]} declares {self._flags[liars[0]]} labels but "
                "holds fewer; copy the set again"
            )
        self.bare = (labels > 0) & (self.sizes == 0)
        for i in np.flatnonzero(~whole).tolist():
            offset = int(self.offsets[i])
            payload = read_payload(self._data, offset, self.path)
            start = _image_start(payload, self.path)
            where = 4 if start == _HEADER.size else _HEADER.size
            self.labels[i] = struct.unpack_from("<f", payload, where)[0]
            self.sizes[i] = offset - record_end(self._data, offset, self.path)

    def images(self, keys: np.ndarray, *, rebuilt: bool) -> np.ndarray:
        """bool (N,): which records are images, by their keys and what the first says.

        Raises:
            UserError: there are not as many as the header promises.
        """
        images = ~self.bare
        # From 2^24 on the header's float32 cannot say N; NaN and infinity say nothing.
        first = int(np.argmin(keys))
        if not (self.bare[first] and abs(self.labels[first]) < _MAX_EXACT_FLOAT):
            return images
        promised = int(self.labels[first]) - 1
        by_key = (keys >= 1) & (keys <= promised)
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
    offsets = array("q")  # a list would take five times the memory
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
        self._index = array("q", [0])
        self._first_keys = array("q")
        self._label = -1

    def add(self, label: int, image: bytes) -> None:
        """Append an image of person ``label``: the label added last, or a larger one."""
        if label < max(self._label, 0):
            raise ValueError(f"label {label} after {self._label}: labels must ascend from 0")
        if label >= _MAX_EXACT_FLOAT:
            raise UserError(f"RecordIO keeps labels as float32: {label} is past 2**24")
        self._first_keys.extend([len(self._index)] * (label - self._label))
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
        with (self.directory / "train.idx").open("w") as lines:
            lines.writelines(f"{key}\t{offset}\n" for key, offset in enumerate(self._index))
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
