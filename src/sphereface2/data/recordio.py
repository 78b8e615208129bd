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
import struct
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from sphereface2.data.sources import check_labels, read_names
from sphereface2.errors import UserError
from sphereface2.files import digest

MAGIC = 0xCED7230A
_MAGIC_BYTES = struct.pack("<I", MAGIC)
_LENGTH_MASK = (1 << 29) - 1
_HEADER = struct.Struct("<IfQQ")
_FRAME = struct.Struct("<II")
_WHOLE = struct.Struct("<III")  # the frame and the header's flag
_START = _FRAME.size + _HEADER.size
#: float32 counts whole numbers up to here: labels and the header record's keys end here too.
_MAX_EXACT_FLOAT = 1 << 24


class RecordIOSource:
    """The images of a ``.rec`` file, read through a memory map.

    ``path`` is the ``.rec`` or a folder that holds ``train.rec``. With a header record (key 0,
    flag > 0, no image bytes: labels N+1, N+1+C) the images are keys 1...N; without one every key
    is an image. A missing or damaged ``.idx`` is rebuilt in memory by scanning, with a warning.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.path = path / "train.rec" if path.is_dir() else path
        if not self.path.is_file():
            raise UserError(f"{self.path} does not exist; give a .rec file or the folder of one")
        self._map: mmap.mmap | None = None
        if self.path.stat().st_size == 0:
            raise UserError(f"{self.path} is empty")
        keys, offsets = self._load_index()
        self._keys, self._offsets = self._images(keys, offsets)
        if len(self._keys) == 0:
            raise UserError(f"{self.path} holds no images")
        self.labels = check_labels(self._read_labels(self._offsets), self.path)
        self.num_classes = max(int(self.labels.max()) + 1, self._property_classes())
        self.class_names = read_names(self.path.parent, self.num_classes)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}

    @property
    def _data(self) -> mmap.mmap:
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._map

    def read(self, index: int) -> bytes:
        """The encoded image ``index``, byte for byte as it was packed."""
        data, offset = self._data, self._offsets.item(index)
        # Nearly every record is whole, and this is the loader's inner loop.
        magic, word, flag = _WHOLE.unpack_from(data, offset)
        start, end = offset + _START + 4 * flag, offset + _FRAME.size + word
        if magic == MAGIC and word <= _LENGTH_MASK and start <= end <= len(data):
            return data[start:end]
        payload = read_payload(data, offset, self.path)
        return payload[_image_start(payload, self.path) :]

    def name(self, index: int) -> str:
        return f"{self.path.name} key {self._keys[index]}"

    def fingerprint(self) -> str:
        return digest(
            "recordio", str(self.path.stat().st_size), self._keys, self._offsets, self.labels
        )

    # -- the index ---------------------------------------------------------------------------

    def _load_index(self) -> tuple[np.ndarray, np.ndarray]:
        index_path = self.path.with_suffix(".idx")
        if not index_path.exists():
            problem = f"{index_path} is missing"
        else:
            keys, offsets = _parse_index(index_path)
            problem = self._index_problem(keys, offsets)
            if not problem:
                return keys, offsets
            problem = f"{index_path} is damaged ({problem})"
        offsets = scan(self._data, self.path)
        warnings.warn(
            f"{problem}; index rebuilt by scanning {self.path.name}: {len(offsets)} records",
            stacklevel=3,
        )
        return np.arange(len(offsets), dtype=np.int64), offsets

    def _index_problem(self, keys: np.ndarray, offsets: np.ndarray) -> str:
        """What contradicts the file, or an empty string."""
        if len(keys) == 0:
            return "no whole line"
        size = len(self._data)
        if offsets.min() < 0 or (offsets % 4).any() or int(offsets.max()) + 8 > size:
            return "an offset lies outside the file or between records"
        words = np.frombuffer(self._data, dtype="<u4", count=size // 4)
        bad = np.flatnonzero(words[offsets // 4] != MAGIC)
        if len(bad):
            return f"no record starts at the offset of key {keys[bad[0]]}"
        if record_end(self._data, int(offsets.max()), self.path) < size:
            return "records follow the last one it lists"
        if len(np.unique(keys)) != len(keys) or len(np.unique(offsets)) != len(offsets):
            return "a key or an offset occurs twice"
        return ""

    def _images(self, keys: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keys and offsets of the image records, by ascending key."""
        order = np.argsort(keys, kind="stable")
        keys, offsets = keys[order], offsets[order]
        if keys[0] == 0:
            payload = read_payload(self._data, int(offsets[0]), self.path)
            flag = _HEADER.unpack_from(payload)[0] if len(payload) >= _HEADER.size else 0
            if flag > 0 and len(payload) == _HEADER.size + 4 * flag:
                end = float(np.frombuffer(payload, dtype="<f4", count=1, offset=_HEADER.size)[0])
                if end >= _MAX_EXACT_FLOAT:
                    # The header's float32 can no longer say N; person records hold no image.
                    images = self._image_bytes(offsets) > 0
                else:
                    images = (keys >= 1) & (keys < end)
                    if int(images.sum()) != int(end) - 1:
                        raise UserError(
                            f"{self.path}: the header record promises {int(end) - 1} images but "
                            f"the index lists {int(images.sum())}; copy the set again"
                        )
                return keys[images], offsets[images]
        return keys, offsets

    def _image_bytes(self, offsets: np.ndarray) -> np.ndarray:
        """Bytes that follow the labels of each record (the first part's, if it is split)."""
        words = np.frombuffer(self._data, dtype="<u4", count=len(self._data) // 4)
        length = (words[offsets // 4 + 1] & _LENGTH_MASK).astype(np.int64)
        return length - _HEADER.size - 4 * words[offsets // 4 + 2].astype(np.int64)

    def _read_labels(self, offsets: np.ndarray) -> np.ndarray:
        """float32 (N,) labels straight from the headers, gathered in one sweep of the map."""
        size = len(self._data)
        words = np.frombuffer(self._data, dtype="<u4", count=size // 4)
        floats = words.view("<f4")
        at = offsets // 4
        frame = words[at + 1]
        # A split record may be split inside its header; those few are joined one by one below.
        whole = (frame >> 29) == 0
        short = np.flatnonzero(whole & ((frame & _LENGTH_MASK) < _HEADER.size))
        if len(short):
            raise UserError(
                f"{self.path}: the record at byte {offsets[short[0]]} is too short for a header"
            )
        safe = np.where(whole, at, 0)
        flags = np.where(whole, words[np.minimum(safe + 2, len(words) - 1)], 0)
        labels = floats[np.minimum(safe + 3, len(words) - 1)].copy()
        many = np.flatnonzero(flags > 0)
        length = (frame[many] & _LENGTH_MASK).astype(np.int64)
        short = many[_HEADER.size + 4 * flags[many].astype(np.int64) > length]
        if len(short):
            raise UserError(
                f"{self.path}: key {self._keys[short[0]]} promises {flags[short[0]]} labels but "
                "holds fewer; copy the set again"
            )
        first = at[many] + 2 + _HEADER.size // 4
        labels[many] = floats[np.minimum(first, len(words) - 1)]
        for i in np.flatnonzero(~whole):
            payload = read_payload(self._data, int(offsets[i]), self.path)
            start = _image_start(payload, self.path)
            where = 4 if start == _HEADER.size else _HEADER.size
            labels[i] = struct.unpack_from("<f", payload, where)[0]
        return labels

    def _property_classes(self) -> int:
        path = self.path.parent / "property"
        if not path.exists():
            return 0
        try:
            classes = int(path.read_text().split(",")[0])
        except ValueError:
            raise UserError(
                f"{path} should read 'classes,height,width'; correct it or delete it"
            ) from None
        if classes <= int(self.labels.max()):
            warnings.warn(
                f"{path} says {classes} classes but label {int(self.labels.max())} occurs; "
                "the records are believed",
                stacklevel=3,
            )
        return classes


def _parse_index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Keys and offsets; (empty, empty) if any line is not two whole numbers."""
    none = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    try:
        values = np.array(path.read_bytes().split(), dtype=np.int64)
    except (ValueError, OverflowError):
        return none
    if len(values) == 0 or len(values) % 2:
        return none
    return values[0::2].copy(), values[1::2].copy()


def _image_start(payload: bytes, path: Path) -> int:
    if len(payload) < _HEADER.size:
        raise UserError(f"{path}: a record of {len(payload)} bytes is too short for a header")
    flag = struct.unpack_from("<I", payload)[0]
    start = _HEADER.size + 4 * flag
    if start > len(payload):
        raise UserError(f"{path}: a record promises {flag} labels but holds fewer")
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


def _padded(length: int) -> int:
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
    parts = []
    start = 0
    at = payload.find(_MAGIC_BYTES)
    while at >= 0:
        if at % 4 == 0:
            parts.append(payload[start:at])
            start = at + 4
            at = payload.find(_MAGIC_BYTES, start)
        else:
            at = payload.find(_MAGIC_BYTES, at + 1)
    parts.append(payload[start:])
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
