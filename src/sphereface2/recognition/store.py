"""The vector database under a gallery: a few operations of Milvus, on a local folder or a cluster.

`sphereface2.recognition.gallery` says what the rows mean; here they are keys, texts and vectors.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from sphereface2.errors import UserError

SCHEMES = ("http://", "https://", "tcp://", "unix:")
# Milvus answers at most this many rows to one search or query.
MOST_ROWS = 16_384
# Rows in one call: 4,000 of 512 numbers are 8 MB, below a cluster's limit of 64 MB a message.
CALL_ROWS = 4_000
# Milvus Lite keeps every write in memory as an object of its own, some 3 KB each whatever it holds,
# and moves them to files only when what they hold is 128 MB.
FLUSH_WRITES = 500
KEY_BYTES = 64
TEXT_BYTES = 65_535

# Kinds of index: what Milvus calls it, how it is built, and the name, default and most of the
# number that says how hard to search.
INDEXES: dict[str, tuple[str, dict[str, int], str, int]] = {
    "flat": ("FLAT", {}, "", 0),
    "ivf": ("IVF_FLAT", {"nlist": 256}, "nprobe", 16),
    "hnsw": ("HNSW", {"M": 16, "efConstruction": 200}, "ef", 128),
}


@dataclass(frozen=True)
class Row:
    """One row: a key of ASCII characters, an ASCII text, a vector (d,) float32."""

    key: str
    text: str
    vector: np.ndarray


class Store:
    """Collections of (key, text, vector) rows in Milvus.

    Each call that writes is one message to the database. In the embedded Milvus Lite it is also one
    record of the write-ahead log, which survives the death of the process whole or not at all.
    """

    def __init__(self, uri: str | Path, *, token: str = "") -> None:
        """Connect.

        Args:
            uri: a folder, created if missing, for Milvus Lite in this process; or the address of a
                Milvus server, ``http://host:19530`` or ``http://host:19530/database``.
            token: ``user:password`` or an API key, for a server that asks for one.

        Raises:
            UserError: pymilvus is missing, the folder is open elsewhere or no gallery, the server
                does not answer.
        """
        try:
            from pymilvus import MilvusClient
        except ImportError as error:
            raise UserError(
                "a gallery needs pymilvus: pip install 'sphereface2[gallery]'"
            ) from error
        # What these log is raised too, or is a warning in every scan of a local database of a time
        # stamp that is not needed there.
        for noisy in ("client.iterator.query_iterator", "decorators"):
            logging.getLogger(f"pymilvus.{noisy}").setLevel(logging.CRITICAL)
        logging.getLogger("milvus_lite.adapter").setLevel(logging.CRITICAL)
        self.uri = str(uri)
        self.local = not self.uri.startswith(SCHEMES)
        if self.local and "://" in self.uri:
            raise UserError(
                f"{self.uri} is no address of a Milvus server; give http://host:19530, or a folder"
            )
        self._server: Any = None
        self._writes: Counter[str] = Counter()  # of each collection, since its last flush
        address = self._serve(Path(uri)) if self.local else self.uri
        try:
            self._client = MilvusClient(uri=address, token=token)
        except Exception as error:
            self._stop()
            raise UserError(
                f"the Milvus server at {self.uri} does not answer; is it running? ({error})"
            ) from error

    def _serve(self, folder: Path) -> str:
        """Start Milvus Lite over `folder`; the address of its socket."""
        try:
            from milvus_lite.adapter.grpc.server import start_server_in_thread
            from milvus_lite.exceptions import DataDirLockedError
        except ImportError as error:
            raise UserError(
                "a gallery in a folder needs milvus-lite 3.2 or later: "
                "pip install 'sphereface2[gallery]'"
            ) from error
        if folder.is_file():
            raise UserError(f"{folder} is a file; a gallery is a folder of its own")
        try:
            if folder.is_dir() and any(folder.iterdir()) and not (folder / "collections").is_dir():
                raise UserError(
                    f"{folder} holds other files and no gallery; give a folder of its own"
                )
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise UserError(f"the gallery {folder} cannot be opened: {error}") from error
        # A socket that only this user can reach: the TCP port that pymilvus would open asks nobody
        # for a password. Outside the gallery, whose path may be longer than a socket's may.
        self._socket = tempfile.mkdtemp(prefix="sphereface2-")
        try:
            server, database, _ = start_server_in_thread(
                str(folder), host="unix", port=f"{self._socket}/milvus"
            )
        except DataDirLockedError as error:
            shutil.rmtree(self._socket, ignore_errors=True)
            raise UserError(
                f"the gallery {folder} is open elsewhere, in another process or twice in this "
                "one: close it there, or keep it on a Milvus server, which many may use at once"
            ) from error
        except OSError as error:
            shutil.rmtree(self._socket, ignore_errors=True)
            raise UserError(f"the gallery {folder} cannot be opened: {error}") from error
        self._server = (server, database)
        return f"unix:{self._socket}/milvus"

    def _stop(self) -> None:
        if self._server is not None:
            server, database = self._server
            server.stop(grace=5).wait()
            database.close()
            self._server = None
            shutil.rmtree(self._socket, ignore_errors=True)

    def close(self) -> None:
        """Write what is in memory to the files, and let go of them. May be called twice."""
        with suppress(Exception):
            self._client.close()
        self._stop()

    @staticmethod
    def refused(error: BaseException) -> bool:
        """Whether an exception is the database's own: it could not do what was asked."""
        from pymilvus import MilvusException

        return isinstance(error, MilvusException)

    def collections(self) -> list[str]:
        """The names of the collections there are."""
        return list(self._client.list_collections())

    def create(self, name: str, dim: int, index: str = "flat") -> None:
        """Make an empty collection, loaded."""
        from pymilvus import DataType, MilvusClient

        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("key", DataType.VARCHAR, is_primary=True, max_length=KEY_BYTES)
        schema.add_field("text", DataType.VARCHAR, max_length=TEXT_BYTES)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dim)
        kind, build, _, _ = INDEXES[index]
        params = self._client.prepare_index_params()
        # Vectors have length 1, so the inner product is the cosine; Milvus Lite would normalise
        # all of them again in every search by COSINE.
        # pymilvus spreads `params` over the request, as servers want it; Milvus Lite 3.2 reads what
        # is under a key of that name, and builds with its defaults where there is none.
        spread = {"params": build} if self.local else build
        params.add_index("vector", index_type=kind, metric_type="IP", params=spread)
        self._client.create_collection(
            name,
            schema=schema,
            # One shard, so that one call is one message; and whoever was told, sees.
            num_shards=1,
            consistency_level="Strong",
        )
        # To wait takes pymilvus half a second at least, and Milvus Lite is done when it answers.
        self._client.create_index(name, params, sync=not self.local)
        self._client.load_collection(name)

    def load(self, name: str) -> None:
        """Make a collection that was there searchable."""
        from pymilvus import MilvusException

        try:
            self._client.load_collection(name)
        except MilvusException:
            # Milvus Lite writes an index in place, so that a process killed meanwhile leaves a
            # torn one; they are made from the data and can be made again.
            torn = list(Path(self.uri).glob(f"collections/{name}/partitions/*/indexes/*.idx"))
            if not self.local or not torn:
                raise
            for file in torn:
                file.unlink()
            self._client.load_collection(name)

    def drop(self, name: str) -> None:
        """Delete a collection, with its files if they are local."""
        self._client.drop_collection(name)
        del self._writes[name]

    def put(self, name: str, rows: Sequence[Row]) -> None:
        """Insert rows, or replace those with the same keys: in one call, so all or none."""
        if rows:
            self._client.upsert(
                name, [{"key": r.key, "text": r.text, "vector": r.vector} for r in rows]
            )
            self._count_write(name)

    def delete(self, name: str, keys: Iterable[str]) -> None:
        """Delete rows; keys that are not there are no error."""
        for some in _chunks(list(keys)):
            self._client.delete(name, ids=some)
            self._count_write(name)

    def _count_write(self, name: str) -> None:
        self._writes[name] += 1
        if self.local and self._writes[name] >= FLUSH_WRITES:
            self.flush(name)

    def get(self, name: str, keys: Iterable[str], *, vectors: bool = False) -> dict[str, Row]:
        """The rows of these keys, by key; what is not there is left out."""
        fields = ["key", "text", "vector"] if vectors else ["key", "text"]
        found = {}
        for some in _chunks(list(dict.fromkeys(keys))):
            for row in self._client.get(name, ids=some, output_fields=fields):
                found[row["key"]] = _row(row)
        return found

    def scan(self, name: str, *, vectors: bool = False) -> Iterator[Row]:
        """All rows, in the order of their keys."""
        fields = ["key", "text", "vector"] if vectors else ["key", "text"]
        iterator = self._client.query_iterator(name, batch_size=CALL_ROWS, output_fields=fields)
        try:
            while batch := iterator.next():
                yield from map(_row, batch)
        finally:
            iterator.close()

    def search(
        self,
        name: str,
        queries: np.ndarray,
        limit: int,
        index: str,
        *,
        effort: int | None = None,
        exact: bool = False,
    ) -> list[list[tuple[str, float]]]:
        """The `limit` rows of greatest inner product with each query: (key, product), best first.

        Args:
            queries: (q, d) float32.
            index: the kind the collection was made with.
            effort: how hard an approximate index searches: the number of its cells that are
                looked into (ivf) or of its candidates (hnsw).
            exact: look at all rows, whatever the index.
        """
        if exact and index == "ivf":
            effort = INDEXES["ivf"][1]["nlist"]
        elif exact and index == "hnsw":
            return self._search_all(name, queries, limit)
        parameter, default = INDEXES[index][2:]
        # HNSW keeps `ef` candidates and gives back no more than that.
        value = max(effort or default, limit if index == "hnsw" else 1)
        answers = self._client.search(
            name,
            data=list(queries),
            limit=limit,
            output_fields=["key"],
            search_params={"metric_type": "IP", "params": {parameter: value} if parameter else {}},
        )
        return [[(hit["key"], float(hit["distance"])) for hit in hits] for hits in answers]

    def _search_all(
        self, name: str, queries: np.ndarray, limit: int
    ) -> list[list[tuple[str, float]]]:
        """`search` without the index, which for HNSW cannot be told to look at everything."""
        best: list[list[tuple[str, float]]] = [[] for _ in queries]
        rows = self.scan(name, vectors=True)
        while some := list(islice(rows, CALL_ROWS)):
            products = queries @ np.stack([row.vector for row in some]).T
            for hits, scores in zip(best, products, strict=True):
                hits += [(some[i].key, float(scores[i])) for i in np.argsort(-scores)[:limit]]
                hits.sort(key=lambda hit: -hit[1])
                del hits[limit:]
        return best

    def count(self, name: str) -> int:
        """Rows that are there."""
        return int(self._client.query(name, output_fields=["count(*)"])[0]["count(*)"])

    def flush(self, name: str) -> None:
        """Move what is in memory to the collection's files."""
        self._client.flush(name)
        self._writes[name] = 0

    def compact(self, name: str) -> None:
        """Ask a server to rewrite a collection's files without deleted rows, in its own time."""
        self.flush(name)
        self._client.compact(name)


def _row(row: dict[str, Any]) -> Row:
    return Row(row["key"], row["text"], np.asarray(row.get("vector", ()), np.float32))


def _chunks(keys: list[str]) -> Iterator[list[str]]:
    return (keys[i : i + CALL_ROWS] for i in range(0, len(keys), CALL_ROWS))
