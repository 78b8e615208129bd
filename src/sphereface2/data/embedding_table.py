"""A table of embeddings by the names of images: Parquet as ``sphereface2 embed`` writes, or npz."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sphereface2.data.source import Source
from sphereface2.errors import UserError
from sphereface2.files import atomic_write, digest, printable, writing

SUFFIXES = (".parquet", ".npz")
METADATA = b"sphereface2"
"""Key of a Parquet file's metadata, a JSON object; of the npz array that holds the same text."""
_NAMED = 3  # images in a message


@dataclass(frozen=True)
class EmbeddingTable:
    """Embeddings (n, d), one of each image, whoever made them.

    Attributes:
        path: the file.
        names: (n,) of the images, as `Source.name` gives them.
        embeddings: float16 or float32 (n, d), of any length.
        metadata: what is known of them: ``input``, the fingerprint of the set, and ``model``, that
            of the network.
    """

    path: Path
    names: np.ndarray
    embeddings: np.ndarray
    metadata: dict[str, Any]

    def rows(
        self, source: Source, indices: np.ndarray, max_missing: float
    ) -> tuple[np.ndarray, list[str]]:
        """The embeddings of images of a set, with length 1, and the names of those without one.

        Args:
            source: the set.
            indices: int64 (m,) of the images wanted.
            max_missing: share of them that the table may lack.

        Returns:
            float32 (m, d); rows of 0 stand for images that the table lacks.

        Raises:
            UserError: the table is of another set, names an image twice or lacks too many.
        """
        made_of = self.metadata.get("input")
        if made_of is not None and made_of != source.fingerprint():
            raise UserError(
                f"{self.path} holds the embeddings of another set than the one that is trained on "
                "(its fingerprint differs): embed this set"
            )
        place = {name: row for row, name in enumerate(self.names.tolist())}
        if len(place) != len(self.names):
            raise UserError(f"{self.path} names an image twice; give each image one embedding")
        names = [printable(source.name(int(index))) for index in indices]
        found = np.array([place.get(name, -1) for name in names], np.int64)
        missing = [names[i] for i in np.flatnonzero(found < 0)]
        if len(missing) > max_missing * len(names):
            raise UserError(
                f"{self.path} has no embedding of {len(missing):,} of the {len(names):,} training "
                f"images ({', '.join(missing[:_NAMED])}, …), more than the allowed share of "
                f"{max_missing:g}: embed this set, or raise data.max_unreadable"
            )
        return unit(self.embeddings[found] * (found >= 0)[:, None]), missing


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows as float32 of length 1; rows of 0 stay."""
    rows = rows.astype(np.float32)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)


def read(path: Path) -> EmbeddingTable:
    """Read a table.

    A Parquet file has the columns ``name`` and ``embedding``, an npz file the arrays ``name`` (n,)
    and ``embedding`` (n, d).

    Raises:
        UserError: there is no such file, it is damaged or of another layout, or it holds
            embeddings that are not finite or of length 0.
    """
    if not path.is_file():
        raise UserError(
            f"there is no table of embeddings {path}: give a file that sphereface2 embed wrote, or "
            "an .npz"
        )
    try:
        names, embeddings, text = _parquet(path) if path.suffix == ".parquet" else _npz(path)
        metadata = json.loads(text) if text else {}
        if not isinstance(metadata, dict):
            raise ValueError("its metadata is no JSON object")
    except (OSError, ValueError, KeyError, NotImplementedError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is damaged or no table of embeddings, with 'name' and 'embedding': {error}"
        ) from error
    shapes = embeddings.shape, names.shape
    if embeddings.ndim != 2 or shapes[1] != shapes[0][:1] or embeddings.dtype.kind != "f":
        raise UserError(
            f"{path} must hold floating-point embeddings (n, d) and names (n,), not "
            f"{embeddings.dtype} {shapes[0]} and {shapes[1]}"
        )
    if not np.isfinite(embeddings).all():
        raise UserError(f"{path} holds embeddings that are not finite")
    none = np.flatnonzero(np.linalg.norm(embeddings.astype(np.float32, copy=False), axis=1) == 0)
    if len(none):
        raise UserError(
            f"{path} holds {len(none):,} embeddings of length 0, which have no direction "
            f"({names[none[0]]} first): embed these images again, or leave them out of it"
        )
    return EmbeddingTable(path, names, embeddings, metadata)


def write_npz(
    path: Path, names: Sequence[str], embeddings: np.ndarray, metadata: dict[str, Any]
) -> None:
    """Write a table that `read` takes back; it appears when it is complete."""
    arrays: dict[str, Any] = {
        "name": np.array([printable(name) for name in names]),
        "embedding": embeddings,
        METADATA.decode(): np.array(json.dumps(metadata)),
    }
    content = io.BytesIO()
    np.savez(content, **arrays)
    with writing(path):
        atomic_write(path, content.getbuffer())


def fingerprint(rows: np.ndarray) -> str:
    """sha256 (hex) of embeddings."""
    return digest(str(rows.shape), np.ascontiguousarray(rows))


def _parquet(path: Path) -> tuple[np.ndarray, np.ndarray, str]:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=["name", "embedding"])
    column = table.column("embedding").combine_chunks()
    if any(one.null_count for one in table.columns):
        raise ValueError("it has empty entries")
    if len(pc.unique(pc.list_value_length(column))) != 1:
        raise ValueError("its embeddings are not of one length")
    values = column.flatten().to_numpy(zero_copy_only=False)
    text = (table.schema.metadata or {}).get(METADATA, b"").decode()
    return table.column("name").to_numpy(), values.reshape(len(column), -1), text


def _npz(path: Path) -> tuple[np.ndarray, np.ndarray, str]:
    with np.load(path) as arrays:
        key = METADATA.decode()
        return arrays["name"], arrays["embedding"], str(arrays[key]) if key in arrays else ""
