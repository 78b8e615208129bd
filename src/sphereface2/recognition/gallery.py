"""People and their pictures' embeddings, searched one to many, with strangers among the probes.

Three collections. *pictures* holds one embedding a row. *people* holds one row a person: name,
metadata, which pictures count, and the person's template, the normalised mean of them. *meta*
holds the stamp, which names the model and the collections in force, and a note of the change under
way.

A person's row is what makes it true: it is written after the pictures, in one message, so that a
change is seen as a whole or not at all, and pictures that no person's row names count for nothing.
The notes say where to look for such pictures after a crash.

On a server several processes share a gallery. Whoever moves it to other collections first writes a
lease and then waits until no note is open; whoever changes it first writes a note and then looks
for a lease. Reads of a server see all that was written before them, so that one of two always sees
the other. The stamp is read again before each operation.

Keys are hashes and random numbers and texts are ASCII JSON; no filter expression is ever built
from what a user gave.
"""

from __future__ import annotations

import hashlib
import json
import random
import secrets
import threading
import time
import unicodedata
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sphereface2.errors import UserError, did_you_mean
from sphereface2.recognition.store import INDEXES, MOST_ROWS, SCHEMES, Row, Store
from sphereface2.version import __version__

FORMAT_VERSION = 1
PREFIX = "sphereface2_"
META = PREFIX + "meta"
STAMP = "stamp"
REMOVED = "removed"  # the key of the number of pictures that files may still hold
NOTE, LEASE = "note-", "lease-"  # what keys of notes and leases begin with
NAME_LENGTH = 200
METADATA_BYTES = 16_384
SOURCE_BYTES = 8_192
PICTURES = 1_000  # a person's, at most: their keys must fit in the person's row
# Pictures that one change writes at a time: their keys must fit in the change's note.
CHANGE_PICTURES = 1_500
PROBES = 256  # in one call: Milvus Lite holds all their products with the gallery
# A note in a shared gallery this old was left by a process that died, not by one at work.
NOTE_SECONDS = 3_600
# A lease this old is void. Its holder renews it ten times as often and trusts it half as long.
LEASE_SECONDS = 600
PATIENCE_SECONDS = 10  # to wait for another process's lease or note
# A local gallery is compacted once as many pictures went as are there, but for no fewer than these.
COMPACT_FROM = 1_000

_Found = TypeVar("_Found")


class NoGalleryError(UserError):
    """There is no gallery, and none was to be made."""


@dataclass(frozen=True)
class Person:
    """Somebody in a gallery: the name, the number of pictures, the metadata, the pictures' ids."""

    name: str
    pictures: int
    metadata: dict[str, Any]
    ids: tuple[str, ...] = field(default=(), repr=False, compare=False)  # oldest first


@dataclass(frozen=True)
class Match:
    """One answer of a search: who, with which cosine (-1 to 1), and the person's metadata and
    pictures' ids."""

    person: str
    score: float
    metadata: dict[str, Any]
    ids: tuple[str, ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True)
class Enrolment:
    """What `Gallery.add_many` takes: a person's name, embeddings (k, d) and, if any, the rest."""

    person: str
    embeddings: np.ndarray
    metadata: dict[str, Any] | None = None
    sources: Sequence[str | None] | None = None

    def check(self, dim: int) -> None:
        """UserError if no gallery of embeddings of ``dim`` numbers would take it."""
        _checked(self, dim)


@dataclass
class _Record:
    """The text of a person's row."""

    name: str
    metadata: dict[str, Any]
    pictures: list[str]

    def dump(self) -> str:
        return _json({"name": self.name, "metadata": self.metadata, "pictures": self.pictures})

    def ids(self, key: str) -> tuple[str, ...]:
        return tuple(f"{key}.{token}" for token in self.pictures)

    @classmethod
    def load(cls, text: str) -> _Record:
        return cls(**json.loads(text))


@dataclass
class _Gate:
    """Many readers or one writer; a writer who waits goes before readers who come later."""

    condition: threading.Condition = field(default_factory=threading.Condition)
    readers: int = 0
    waiting: int = 0
    writing: bool = False

    @contextmanager
    def read(self) -> Iterator[None]:
        with self.condition:
            self.condition.wait_for(lambda: not self.writing and not self.waiting)
            self.readers += 1
        try:
            yield
        finally:
            with self.condition:
                self.readers -= 1
                self.condition.notify_all()

    @contextmanager
    def write(self) -> Iterator[None]:
        with self.condition:
            self.waiting += 1
            self.condition.wait_for(lambda: not self.writing and not self.readers)
            self.waiting -= 1
            self.writing = True
        try:
            yield
        finally:
            with self.condition:
                self.writing = False
                self.condition.notify_all()


class Gallery:
    """People to search among. Make one with `Gallery.open`; safe to use from several threads."""

    def __init__(self, store: Store, stamp: dict[str, Any]) -> None:
        self._store = store
        self._stamp = stamp
        self._changing = threading.Lock()  # held by whoever changes the gallery, start to end
        self._gate = _Gate()  # and its writing side while searches must not look
        self._closed = False
        # Processes that share a gallery must not clear each other's notes.
        self._notes = NOTE if store.local else _note_keys()
        self._compact_at = COMPACT_FROM

    # -- opening and closing ---------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        uri: str | Path,
        *,
        fingerprint: str | None,
        dim: int | None,
        index: str | None = None,
        create: bool = True,
        token: str = "",
    ) -> Gallery:
        """Open a gallery, or make an empty one.

        Args:
            uri: a folder (Milvus Lite, in this process), or a Milvus server's address:
                ``http://host:19530``, with ``/database`` to keep several galleries on one server.
            fingerprint: of the model whose embeddings it holds; None takes what is there.
            dim: numbers in an embedding; None takes what is there.
            index: ``flat`` (exact; the default of a new gallery), ``ivf`` or ``hnsw``
                (approximate, for large galleries on a server). Only when the gallery is made.
            create: whether a gallery that is not there is made.
            token: ``user:password`` or an API key, for a server that asks for one.

        Raises:
            NoGalleryError: it is not there and not to be made.
            UserError: the gallery is of another model, open in another process, damaged, or made
                by a later version.
        """
        if index is not None and index not in INDEXES:
            raise UserError(
                f"there is no index {index!r}{did_you_mean(index, INDEXES)}; "
                f"choose from {', '.join(INDEXES)}"
            )
        local = not str(uri).startswith(SCHEMES)
        missing = NoGalleryError(
            f"there is no gallery at {uri}; `sphereface2 gallery add` makes one"
        )
        if (
            local
            and "://" not in str(uri)
            and not create
            and not (Path(uri) / "collections").is_dir()
        ):
            raise missing
        store = Store(uri, token=token)

        def stamped() -> dict[str, Any]:
            if (stamp := _read_stamp(store)) is not None:
                return stamp
            if not create or fingerprint is None or dim is None:
                raise missing
            return _create(store, fingerprint, dim, index or "flat")

        try:
            stamp = _patiently(store, stamped)
            _check_stamp(stamp, str(uri), fingerprint, dim, index)
            gallery = cls(store, stamp)
            for name in (gallery._people, gallery._pictures):
                store.load(name)
            if store.local:  # on a server another process may be writing the next ones
                gallery._drop_generations(store.collections())
            gallery._recover()
        except BaseException as error:
            store.close()
            if store.refused(error):
                raise UserError(
                    f"the gallery {uri} cannot be read; if its files are damaged, put back a copy "
                    f"or enrol anew ({error})"
                ) from error
            raise
        return gallery

    def close(self) -> None:
        """Let go of the gallery; everything acknowledged is already stored. May be called twice."""
        with self._changing, self._gate.write():
            self._closed = True
            self._store.close()

    def __enter__(self) -> Gallery:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def fingerprint(self) -> str:
        """Of the model whose embeddings the gallery holds."""
        return str(self._stamp["fingerprint"])

    @property
    def dim(self) -> int:
        """Numbers in an embedding."""
        return int(self._stamp["dim"])

    @property
    def local(self) -> bool:
        """Whether it lies in a folder, not on a server."""
        return self._store.local

    @property
    def index(self) -> str:
        """The kind of index: flat, ivf or hnsw."""
        return str(self._stamp["index"])

    @property
    def _people(self) -> str:
        return f"{PREFIX}people_{self._stamp['generation']}"

    @property
    def _pictures(self) -> str:
        return f"{PREFIX}pictures_{self._stamp['generation']}"

    # -- changing --------------------------------------------------------------------------------

    def add(
        self,
        person: str,
        embeddings: np.ndarray,
        *,
        metadata: dict[str, Any] | None = None,
        sources: Sequence[str | None] | None = None,
        replace: bool = False,
    ) -> list[str]:
        """Add pictures of a person, who may be new.

        When it returns, the pictures survive the death of the process; until then none of them
        is found.

        Args:
            person: any text of 1 to 200 characters. Names that Unicode calls equivalent (é as one
                character or two) are the same person.
            embeddings: (k, d) or (d,), brought to length 1.
            metadata: JSON-able, up to 16 KB; replaces what the person had. None leaves it.
            sources: where each picture came from, for re-embedding; up to 8 KB each.
            replace: the person's older pictures go.

        Returns:
            The pictures' ids.

        Raises:
            UserError: a bad name, metadata that is not JSON or too long, embeddings that are not
                finite or of another dimension, more than 1,000 pictures of one person.
        """
        item = Enrolment(person, embeddings, metadata, sources)
        with self._change_begun():
            return self._change([_checked(item, self.dim)], replace)

    def add_many(
        self,
        people: Iterable[Enrolment],
        *,
        refused: Callable[[Enrolment, UserError], None] | None = None,
    ) -> Iterator[list[Person]]:
        """Add many people, many in one call to the database: yields those stored since last time.

        Each person is whole in one call, so whoever was yielded is stored and a crash leaves
        nobody half there. One person may come several times.

        Args:
            people: whom to add.
            refused: is told whom `add` would not take, and why; the others are added.

        Raises:
            UserError: as `add`, without ``refused``; what was yielded before stays.
        """
        waiting: dict[str, _Checked] = {}
        for item in people:
            try:
                checked = _checked(item, self.dim)
            except UserError as error:
                if refused is None:
                    raise
                refused(item, error)
                continue
            total = sum(len(c.vectors) for c in waiting.values())
            if waiting and (
                total + len(checked.vectors) > CHANGE_PICTURES or checked.key in waiting
            ):
                yield self._add_batch(waiting, refused)
                waiting = {}
            waiting[checked.key] = checked
        if waiting:
            yield self._add_batch(waiting, refused)

    def _add_batch(
        self,
        batch: dict[str, _Checked],
        refused: Callable[[Enrolment, UserError], None] | None,
    ) -> list[Person]:
        with self._change_begun():
            pictures = self._change(list(batch.values()), replace=False, refused=refused)
            stored = dict.fromkeys(picture.split(".")[0] for picture in pictures)
            rows = self._store.get(self._people, stored)
        return [_person(_Record.load(rows[key].text)) for key in stored]

    def _change(
        self,
        items: list[_Checked],
        replace: bool,
        refused: Callable[[Enrolment, UserError], None] | None = None,
    ) -> list[str]:
        """Write people's pictures, then the people; the caller holds the lock."""
        generation = self._stamp["generation"]
        old = self._store.get(self._people, [item.key for item in items])
        people, pictures, superseded = [], [], []
        for item in items:
            record = _Record.load(old[item.key].text) if item.key in old else None
            kept = [] if record is None or replace else record.pictures
            try:
                _check_count(item.name, len(kept) + len(item.vectors))
            except UserError as error:
                if refused is None:
                    raise
                refused(item.enrolment, error)
                continue
            taken = set(record.pictures) if record else set()
            tokens = _tokens(len(item.vectors), taken)
            total = item.vectors.sum(0)
            if kept:
                # Of the pictures themselves, so that it does not drift however often it changes.
                before = self._store.get(
                    self._pictures, [f"{item.key}.{t}" for t in kept], vectors=True
                )
                total = total + np.sum([row.vector for row in before.values()], axis=0)
            if record is not None and replace:
                superseded += [f"{item.key}.{token}" for token in record.pictures]
            metadata = (
                item.metadata if item.metadata is not None else (record.metadata if record else {})
            )
            text = _Record(item.name, metadata, kept + tokens).dump()
            people.append(Row(item.key, text, _template(total, item.vectors[0])))
            pictures += [
                Row(f"{item.key}.{token}", source, vector)
                for token, source, vector in zip(tokens, item.texts, item.vectors, strict=True)
            ]
        touched = [row.key for row in pictures] + superseded
        with self._gate.write(), self._note(touched, generation):
            self._store.put(self._pictures, pictures)
            self._store.put(self._people, people)
            self._store.delete(self._pictures, superseded)
            removed = self._count_removed(len(superseded))
        self._compact_if_due(removed)
        return [row.key for row in pictures]

    def set_metadata(self, person: str, metadata: dict[str, Any]) -> Person | None:
        """Put other metadata in the place of a person's; the pictures stay as they are.

        Args:
            person: as in `add`.
            metadata: as in `add`; ``{}`` takes away what was there.

        Returns:
            The person as they are now, or None if nobody of that name is there.

        Raises:
            UserError: as `add`.
        """
        name = _name(person)
        key, about = _key(name), _metadata(name, metadata) or {}
        with self._change_begun():
            generation = self._stamp["generation"]
            row = self._store.get(self._people, [key], vectors=True).get(key)
            if row is None:
                return None
            record = replace(_Record.load(row.text), metadata=about)
            with self._gate.write(), self._note(list(record.ids(key)), generation):
                self._store.put(self._people, [replace(row, text=record.dump())])
            return _person(record)

    def remove(self, person: str) -> int:
        """Remove a person: nothing finds them from here on.

        The files of a local gallery hold the embeddings until `compact` rewrites them, which
        happens by itself once as many pictures were removed as are left, 1,000 at least.

        Returns:
            How many pictures went; 0 if nobody of that name was there.
        """
        key = _key(_name(person))
        with self._change_begun():
            generation = self._stamp["generation"]
            row = self._store.get(self._people, [key]).get(key)
            if row is None:
                return 0
            pictures = list(_Record.load(row.text).ids(key))
            with self._gate.write(), self._note(pictures, generation):
                self._store.delete(self._people, [key])
                self._store.delete(self._pictures, pictures)
                removed = self._count_removed(len(pictures))
            self._compact_if_due(removed)
            return len(pictures)

    @contextmanager
    def _change_begun(self) -> Iterator[None]:
        """One change at a time, to the collections now in force."""
        with self._changing:
            self._check_open()
            self._refresh()
            yield

    def _removed(self) -> int:
        row = self._store.get(META, [REMOVED]).get(REMOVED)
        return 0 if row is None else int(row.text)

    def _count_removed(self, pictures: int) -> int:
        """Add to the number of pictures removed since the last `compact`; that number."""
        if not pictures:
            return 0
        total = self._removed() + pictures
        self._store.put(META, [Row(REMOVED, str(total), _META_VECTOR)])
        return total

    def _compact_if_due(self, removed: int) -> None:
        """Compact a local gallery of much that was removed: its database keeps it all in memory."""
        if not self._store.local or removed < self._compact_at:
            return
        self._compact_at = max(COMPACT_FROM, self._store.count(self._pictures))
        if removed >= self._compact_at:
            self._rewrite(self._stored(), self.fingerprint, self.dim)

    @contextmanager
    def _note(self, pictures: list[str], generation: int) -> Iterator[None]:
        """Keep a note of the pictures that a change touches, for whoever opens after a crash and
        whoever would move the gallery meanwhile.

        Not undone by an exception: a change that failed midway is a crash too, and later notes
        take other keys. A note is cleared by writing it empty: Milvus Lite remembers each key that
        was ever deleted while an older row is there, as the stamp always is.

        Args:
            pictures: their keys.
            generation: of the collections that the change was made for.

        Raises:
            UserError: the gallery is being moved, or was.
        """
        notes = [
            pictures[i : i + CHANGE_PICTURES] for i in range(0, len(pictures), CHANGE_PICTURES)
        ]

        def write(notes: list[list[str]]) -> None:
            rows = [
                Row(
                    f"{self._notes}{i}",
                    _json({"time": time.time(), "pictures": note}),
                    _META_VECTOR,
                )
                for i, note in enumerate(notes)
            ]
            self._store.put(META, rows)

        try:
            write(notes)
            free = not _leases(self._store) and self._is_in_force(generation)
            if free:
                yield
                # A process that slept longer than notes count was not waited for.
                if not self._is_in_force(generation):
                    raise UserError(
                        f"the gallery {self._store.uri} was moved to another model meanwhile; "
                        "look whether the change is in it"
                    )
            write([[] for _ in notes])
        except BaseException:
            self._notes = _note_keys()
            raise
        if not free:
            raise UserError(
                f"the gallery {self._store.uri} is being moved to another model by another "
                "process, or was; try again afterwards"
            )

    def _is_in_force(self, generation: int) -> bool:
        if self._store.local:
            return True
        stamp = _stamp(self._store)
        return stamp is not None and stamp["generation"] == generation

    def _refresh(self) -> bool:
        """Take up the stamp if another process wrote another; whether it did."""
        if self._store.local or (stamp := _stamp(self._store)) == self._stamp:
            return False
        if stamp is None or stamp["fingerprint"] != self.fingerprint:
            raise UserError(
                f"the gallery {self._store.uri} was moved to another model meanwhile; open it "
                "anew, with that one"
            )
        with self._gate.write():  # no search may see collections of both
            self._stamp = stamp
        return True

    def _recover(self) -> None:
        """Delete the pictures that changes cut short left behind without a person's row."""
        for note in list(self._store.scan(META)):
            if note.key.startswith(LEASE) and not _is_fresh(note, LEASE_SECONDS):
                self._store.delete(META, [note.key])
            if not note.key.startswith(NOTE):
                continue
            content = json.loads(note.text)
            touched = content["pictures"]
            if self._store.local:
                if not touched:
                    continue
            elif _is_fresh(note, NOTE_SECONDS):
                continue
            people = self._store.get(self._people, [key.split(".")[0] for key in touched])
            named = {
                f"{key}.{token}"
                for key, row in people.items()
                for token in _Record.load(row.text).pictures
            }
            self._store.delete(self._pictures, [key for key in touched if key not in named])
            self._store.delete(META, [note.key])

    # -- searching -------------------------------------------------------------------------------

    def search(
        self,
        embeddings: np.ndarray,
        *,
        k: int = 5,
        fusion: str = "max",
        exact: bool = False,
        effort: int | None = None,
    ) -> list[list[Match]]:
        """The k people most like each probe, best first.

        The answer does not say whether the best is the right one: compare its score with a
        calibrated threshold (see `decide`).

        Args:
            embeddings: (q, d) or (d,), brought to length 1.
            k: people to name, 1 to 1,000; fewer come back if there are fewer.
            fusion: a person's score is that of the picture most like the probe (``max``) or that
                of the template, the normalised mean of the pictures (``mean``).
            exact: look at everything even where the index is approximate.
            effort: how hard an approximate index searches: cells looked into of 256 (ivf) or
                candidates (hnsw); more is slower and closer to exact.

        Returns:
            For each probe up to k matches.

        Raises:
            UserError: embeddings that are not finite or of another dimension, a bad k or fusion.
        """
        if not 1 <= k <= 1_000:
            raise UserError(f"k is {k}; it must be from 1 to 1000")
        if fusion not in ("max", "mean"):
            raise UserError(f"there is no fusion {fusion!r}; choose max or mean")
        queries = self._unit(embeddings)
        if not len(queries):
            return []

        def look() -> list[list[Match]]:
            answers: list[list[Match]] = []
            for i in range(0, len(queries), PROBES):
                answers += self._search(queries[i : i + PROBES], k, fusion, exact, effort)
            return answers

        return self._read(look)

    def _search(
        self, queries: np.ndarray, k: int, fusion: str, exact: bool, effort: int | None
    ) -> list[list[Match]]:
        name = self._people if fusion == "mean" else self._pictures
        answers: list[list[Match]] = [[] for _ in queries]
        records: dict[str, _Record] = {}
        todo = list(range(len(queries)))
        # Several of the nearest pictures may show one person, so that k people need more than k.
        limit = k if fusion == "mean" else min(MOST_ROWS, max(16, 4 * k))
        while todo:
            found = self._store.search(
                name, queries[todo], limit, self.index, effort=effort, exact=exact
            )
            keys = {key.split(".")[0] for hits in found for key, _ in hits} - records.keys()
            rows = self._store.get(self._people, keys)
            records |= {key: _Record.load(row.text) for key, row in rows.items()}
            unfinished = []
            for query, hits in zip(todo, found, strict=True):
                best: dict[str, float] = {}
                for key, score in hits:
                    person, _, token = key.partition(".")
                    # A picture that its person's row does not name is not, or no longer, theirs.
                    if person in records and (not token or token in records[person].pictures):
                        best.setdefault(person, score)
                answers[query] = [
                    Match(
                        records[p].name,
                        min(1.0, max(-1.0, s)),
                        records[p].metadata,
                        records[p].ids(p),
                    )
                    for p, s in list(best.items())[:k]
                ]
                if len(best) < k and len(hits) == limit < MOST_ROWS:
                    unfinished.append(query)
            todo, limit = unfinished, min(MOST_ROWS, 4 * limit)
        return answers

    def get(self, person: str) -> Person | None:
        """The person of this name, or None."""
        key = _key(_name(person))
        row = self._read(lambda: self._store.get(self._people, [key]).get(key))
        return None if row is None else _person(_Record.load(row.text))

    def people(self) -> list[Person]:
        """Everybody, by name."""
        rows = self._read(lambda: list(self._store.scan(self._people)))
        people = [_person(_Record.load(row.text)) for row in rows]
        return sorted(people, key=lambda person: person.name)

    def stats(self) -> dict[str, Any]:
        """Facts: ``people``, ``pictures``, ``removed`` (pictures that went since the last
        `compact`, whose embeddings the files may still hold), ``dim``, ``fingerprint``,
        ``index``, ``uri``, ``package_version``."""
        people, pictures, removed = self._read(
            lambda: (
                self._store.count(self._people),
                self._store.count(self._pictures),
                self._removed(),
            )
        )
        return {
            "people": people,
            "pictures": pictures,
            "removed": removed,
            "dim": self.dim,
            "fingerprint": self.fingerprint,
            "index": self.index,
            "uri": self._store.uri,
            "package_version": self._stamp["package_version"],
        }

    def sources(self, names: Container[str] | None = None) -> list[tuple[Person, list[str | None]]]:
        """Everybody, or those of these names (NFC), with where each of their pictures came from,
        None where nobody said."""
        found = self._read(lambda: list(self._stored(names, vectors=False)))
        return [
            (
                _person(_Record.load(row.text)),
                [json.loads(picture.text) if picture.text else None for picture in pictures],
            )
            for row, pictures in found
        ]

    def _read(self, look: Callable[[], _Found]) -> _Found:
        """What `look` finds, while nothing changes in this process."""

        def try_it() -> _Found:
            with self._gate.read():
                self._check_open()
                return look()

        self._check_open()
        self._refresh()
        try:
            return try_it()
        except Exception as error:
            # The collections may have been dropped by a process that moved the gallery to others.
            if not self._store.refused(error) or not self._refresh():
                raise
        return try_it()

    # -- the whole gallery at once ---------------------------------------------------------------

    def compact(self) -> None:
        """Rewrite the gallery without what was removed.

        The new files hold nobody who was removed, and the old ones are deleted: afterwards no
        file of a local gallery holds a removed embedding. Searches go on meanwhile; changes wait.
        A crash leaves the gallery as it was before or after.

        A server is asked to rewrite its files, and does so and deletes the old ones in its own
        time.
        """
        with self._change_begun():
            if self._store.local:
                self._rewrite(self._stored(), self.fingerprint, self.dim)
                return
            # What a process left that died while it moved the gallery. In this order: one at work
            # leased before it made collections, and writes the stamp before it ends the lease.
            collections, leased = self._store.collections(), _leases(self._store)
            self._refresh()
            if not leased:
                self._drop_generations(collections)
            for name in (self._people, self._pictures):
                self._store.compact(name)
            self._store.put(META, [Row(REMOVED, "0", _META_VECTOR)])

    def reembed(
        self,
        embed: Callable[[list[tuple[Person, list[str | None]]]], Iterable[Enrolment]],
        *,
        fingerprint: str,
        dim: int,
    ) -> None:
        """Replace everything by embeddings of another model, at once and at the end.

        Meanwhile nobody changes the gallery: other threads wait and other processes are refused.

        Args:
            embed: gives everybody, once each, embedded by the new model, for everybody who is
                there with the sources of their pictures.
            fingerprint: of the new model.
            dim: numbers in its embeddings.

        Raises:
            UserError: another process is changing the gallery, or what ``embed`` raises; the
                gallery is then as it was.
        """
        with self._change_begun(), _lease(self._store) as check:
            self._wait_for_notes()
            self._refresh()
            people = embed(self.sources())

            def rows() -> Iterator[tuple[Row, list[Row]]]:
                for item in people:
                    vectors = _unit(item.embeddings, dim)
                    key, name = _key(_name(item.person)), _name(item.person)
                    tokens = _tokens(len(vectors), set())
                    sources = item.sources or [None] * len(vectors)
                    record = _Record(name, item.metadata or {}, tokens)
                    yield (
                        Row(key, record.dump(), _template(vectors.sum(0), vectors[0])),
                        [
                            Row(f"{key}.{token}", "" if source is None else _json(source), vector)
                            for token, source, vector in zip(tokens, sources, vectors, strict=True)
                        ],
                    )

            self._rewrite(rows(), fingerprint, dim, check)

    def _wait_for_notes(self) -> None:
        """Wait until the changes are done that were begun before this process leased."""
        if self._store.local:
            return

        def notes() -> set[tuple[str, str]]:
            return {
                (row.key, row.text)
                for row in self._store.scan(META)
                if row.key.startswith(NOTE)
                and json.loads(row.text)["pictures"]
                and _is_fresh(row, NOTE_SECONDS)
            }

        # Not those that come later, without end perhaps: who writes them sees the lease.
        until, begun = time.time() + PATIENCE_SECONDS, notes()
        while begun & notes():
            if time.time() > until:
                raise UserError(
                    f"the gallery {self._store.uri} is being changed by another process, or was "
                    f"when that died less than {NOTE_SECONDS // 60} minutes ago; try again later"
                )
            time.sleep(0.1)

    def _stored(
        self, names: Container[str] | None = None, *, vectors: bool = True
    ) -> Iterator[tuple[Row, list[Row]]]:
        """Everybody's row, or those of these names, with their pictures' rows."""
        waiting: dict[str, tuple[Row, list[str]]] = {}

        def fetch() -> Iterator[tuple[Row, list[Row]]]:
            keys = [key for _, keys in waiting.values() for key in keys]
            found = self._store.get(self._pictures, keys, vectors=vectors)
            for row, theirs in waiting.values():
                yield row, [found[key] for key in theirs if key in found]
            waiting.clear()

        for row in self._store.scan(self._people, vectors=vectors):
            record = _Record.load(row.text)
            if names is not None and record.name not in names:
                continue
            waiting[row.key] = row, list(record.ids(row.key))
            if sum(len(keys) for _, keys in waiting.values()) >= CHANGE_PICTURES:
                yield from fetch()
        yield from fetch()

    def _rewrite(
        self,
        rows: Iterable[tuple[Row, list[Row]]],
        fingerprint: str,
        dim: int,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Write another generation of the collections, point the stamp at it, drop this one.

        Args:
            rows: everybody.
            fingerprint, dim: of the stamp.
            check: raises if this process may no longer change the stamp.
        """
        self._drop_generations(self._store.collections())
        stamp = {
            **self._stamp,
            "fingerprint": fingerprint,
            "dim": dim,
            "package_version": __version__,
            "generation": _generation(),
        }
        new = Gallery(self._store, stamp)
        try:
            new._fill(rows)
            for name in (new._people, new._pictures):
                self._store.flush(name)
            check()
        except BaseException:
            with suppress(Exception):  # who next rewrites or opens drops them too
                self._drop_generations([new._people, new._pictures])
            raise
        with self._gate.write():
            self._store.put(META, [_stamp_row(stamp)])
            self._stamp = stamp
            self._drop_generations(self._store.collections())
            self._store.put(META, [Row(REMOVED, "0", _META_VECTOR)])
        self._compact_at = COMPACT_FROM

    def _fill(self, rows: Iterable[tuple[Row, list[Row]]]) -> None:
        """Make the collections, of these people."""
        for name in (self._people, self._pictures):
            self._store.create(name, self.dim, self.index)
        people: list[Row] = []
        pictures: list[Row] = []

        def put() -> None:
            self._store.put(self._pictures, pictures)
            self._store.put(self._people, people)
            people.clear()
            pictures.clear()

        for person, theirs in rows:
            people.append(person)
            pictures += theirs
            if len(pictures) >= CHANGE_PICTURES:
                put()
        put()

    def _drop_generations(self, collections: Iterable[str]) -> None:
        """Drop those of these collections that the stamp does not name."""
        for name in collections:
            if name.startswith(PREFIX) and name not in (META, self._people, self._pictures):
                self._store.drop(name)

    # -- checks ----------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise UserError(f"the gallery {self._store.uri} was closed; open it again")

    def _unit(self, embeddings: np.ndarray) -> np.ndarray:
        return _unit(embeddings, self.dim)


@dataclass(frozen=True)
class _Checked:
    """An enrolment that was found right: unit vectors, texts to store."""

    enrolment: Enrolment
    key: str
    name: str
    vectors: np.ndarray
    texts: list[str]
    metadata: dict[str, Any] | None


def _checked(item: Enrolment, dim: int) -> _Checked:
    name = _name(item.person)
    vectors = _unit(item.embeddings, dim)
    if not len(vectors):
        raise UserError(f"{name!r} comes without a picture; give at least one")
    _check_count(name, len(vectors))
    sources = list(item.sources) if item.sources is not None else [None] * len(vectors)
    if len(sources) != len(vectors):
        raise UserError(f"{name!r} has {len(vectors)} pictures and {len(sources)} sources")
    texts = ["" if source is None else _json(str(source)) for source in sources]
    if (longest := max(map(len, texts))) > SOURCE_BYTES:
        raise UserError(f"a source of {name!r} has {longest} bytes; {SOURCE_BYTES} is the most")
    return _Checked(item, _key(name), name, vectors, texts, _metadata(name, item.metadata))


def _check_count(name: str, pictures: int) -> None:
    if pictures > PICTURES:
        raise UserError(
            f"{name!r} would have {pictures} pictures; {PICTURES} is the most: leave some out"
        )


def decide(matches: Sequence[Match], threshold: float) -> Match | None:
    """The best match if it reaches the threshold, else None: an unknown person."""
    return matches[0] if matches and matches[0].score >= threshold else None


_META_VECTOR = np.array([1, 0], np.float32)  # Milvus wants a vector in every row


def _json(value: object) -> str:
    return json.dumps(value, allow_nan=False)


def checked_json(value: object) -> str:
    """JSON in ASCII of what any reader can take back.

    Raises:
        ValueError, TypeError, RecursionError: a NaN, an infinity, half of a surrogate pair (which
            JSON can escape and UTF-8 cannot hold), or what JSON does not know.
    """
    json.dumps(value, ensure_ascii=False).encode()
    return _json(value)


def _person(record: _Record) -> Person:
    ids = record.ids(_key(record.name))
    return Person(record.name, len(ids), record.metadata, ids)


def _name(person: str) -> str:
    name = unicodedata.normalize("NFC", person) if isinstance(person, str) else ""
    if not 1 <= len(name) <= NAME_LENGTH or not name.strip():
        raise UserError(
            f"a person's name has 1 to {NAME_LENGTH} characters, not only spaces; "
            f"{str(person)[:40]!r} will not do"
        )
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the name {name!r} is not valid Unicode") from error
    return name


def _key(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:24]


def _tokens(count: int, taken: set[str]) -> list[str]:
    tokens: list[str] = []
    while len(tokens) < count:
        token = secrets.token_hex(4)
        if token not in taken:
            taken.add(token)
            tokens.append(token)
    return tokens


def _metadata(name: str, metadata: dict[str, Any] | None) -> dict[str, Any] | None:
    if metadata is None:
        return None
    if not isinstance(metadata, dict):
        raise UserError(f"the metadata of {name!r} is no JSON object; give names with values")
    try:
        text = checked_json(metadata)
    except UnicodeEncodeError as error:
        raise UserError(f"the metadata of {name!r} is not valid Unicode") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"the metadata of {name!r} is not JSON: {error}") from error
    if len(text) > METADATA_BYTES:
        raise UserError(
            f"the metadata of {name!r} has {len(text):,} bytes; {METADATA_BYTES:,} is the most"
        )
    return dict(json.loads(text))


def _unit(embeddings: np.ndarray, dim: int) -> np.ndarray:
    vectors = np.atleast_2d(np.asarray(embeddings, np.float64))
    if vectors.ndim != 2 or (vectors.size and vectors.shape[1] != dim):
        raise UserError(
            f"the embeddings have the shape {np.shape(embeddings)}; the gallery takes (n, {dim})"
        )
    if not vectors.size:
        return np.zeros((0, dim), np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not np.isfinite(lengths).all() or (lengths == 0).any():
        raise UserError("an embedding is zero, infinite or not a number; its picture is unusable")
    return np.asarray(vectors / lengths, np.float32)


def _template(total: np.ndarray, instead: np.ndarray) -> np.ndarray:
    """The sum brought to length 1; `instead` if the pictures cancel out."""
    length = float(np.linalg.norm(total))
    return np.asarray(total / length, np.float32) if length > 1e-6 else instead


def _note_keys() -> str:
    return f"{NOTE}{secrets.token_hex(8)}-"


def _is_fresh(row: Row, seconds: float) -> bool:
    """Whether a note or a lease was written less than so long ago."""
    return bool(time.time() - json.loads(row.text)["time"] < seconds)


def _leases(store: Store) -> set[str]:
    """The keys of the leases in force: who holds one makes or replaces the collections."""
    if store.local:
        return set()
    rows = [row for row in store.scan(META) if row.key.startswith(LEASE)]
    return {row.key for row in rows if _is_fresh(row, LEASE_SECONDS)}


@contextmanager
def _lease(store: Store) -> Iterator[Callable[[], None]]:
    """Be the only process that makes or replaces the collections of a gallery on a server.

    Yields what raises UserError once this process slept so long that others went on without it.
    """
    if store.local:  # the folder is this process's alone
        yield lambda: None
        return
    key, over, renewed = f"{LEASE}{secrets.token_hex(8)}", threading.Event(), time.time()

    def check() -> None:
        if time.time() - renewed > LEASE_SECONDS / 2:
            raise UserError(f"the Milvus server at {store.uri} did not answer for long; try again")

    def renew() -> None:
        nonlocal renewed
        now = time.time()
        store.put(META, [Row(key, _json({"time": now}), _META_VECTOR)])
        renewed = now

    def keep() -> None:
        while not over.wait(LEASE_SECONDS / 10):
            with suppress(Exception):
                check()
                renew()

    keeper = threading.Thread(target=keep, daemon=True)
    until = time.time() + PATIENCE_SECONDS
    try:
        renew()
        while _leases(store) != {key}:
            store.delete(META, [key])
            if time.time() > until:
                raise UserError(
                    f"the gallery {store.uri} is being made or moved to another model by another "
                    f"process, or was when that died less than {LEASE_SECONDS // 60} minutes ago; "
                    "try again later"
                )
            time.sleep(random.uniform(0.1, 1))  # not in step with another who waits
            renew()
        keeper.start()
        yield check
    finally:
        over.set()
        if keeper.is_alive():
            keeper.join()
        with suppress(Exception):  # it becomes void by itself
            store.delete(META, [key])


def _generation() -> int:
    """A number that no other process gives its collections."""
    return secrets.randbits(48)


def _stamp_row(stamp: dict[str, Any]) -> Row:
    return Row(STAMP, _json(stamp), _META_VECTOR)


def _read_stamp(store: Store) -> dict[str, Any] | None:
    """The stamp, or None where there is no gallery or its making was cut short."""
    if META not in store.collections():
        return None
    store.load(META)
    return _stamp(store)


def _stamp(store: Store) -> dict[str, Any] | None:
    row = store.get(META, [STAMP]).get(STAMP)
    return None if row is None else dict(json.loads(row.text))


def _patiently(store: Store, make: Callable[[], _Found]) -> _Found:
    """`make`, tried again on a server, where another process may be making the same just now."""
    until = time.time() + PATIENCE_SECONDS
    while True:
        try:
            return make()
        except Exception as error:
            if store.local or not store.refused(error) or time.time() > until:
                raise
        time.sleep(0.1)


def _create(store: Store, fingerprint: str, dim: int, index: str) -> dict[str, Any]:
    """Make the collections, and the stamp last: what has none is a making that was cut short."""
    stamp = {
        "format_version": FORMAT_VERSION,
        "package_version": __version__,
        "fingerprint": fingerprint,
        "dim": dim,
        "index": index,
        "generation": _generation(),
    }
    if store.local and META in store.collections():
        store.drop(META)
    if META not in store.collections():
        store.create(META, 2)
    with _lease(store) as check:
        if (others := _read_stamp(store)) is not None:
            return others
        new = Gallery(store, stamp)
        new._drop_generations(store.collections())
        new._fill([])
        check()
        store.put(META, [_stamp_row(stamp)])
    return stamp


def _check_stamp(
    stamp: dict[str, Any], uri: str, fingerprint: str | None, dim: int | None, index: str | None
) -> None:
    if stamp["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"the gallery {uri} has format version {stamp['format_version']} and this package "
            f"reads {FORMAT_VERSION}: use the package version that wrote it "
            f"({stamp['package_version']})"
        )
    if fingerprint is not None and stamp["fingerprint"] != fingerprint:
        raise UserError(
            f"the gallery {uri} holds embeddings of the model {stamp['fingerprint'][:12]} and the "
            f"model given is {fingerprint[:12]}: use the former, or move the gallery to the "
            "latter with `sphereface2 gallery reembed`"
        )
    if dim is not None and stamp["dim"] != dim:
        raise UserError(
            f"the gallery {uri} holds embeddings of {stamp['dim']} numbers and the model gives "
            f"{dim}: use the model it was made with"
        )
    if index is not None and stamp["index"] != index:
        raise UserError(
            f"the gallery {uri} was made with the index {stamp['index']}, not {index}: leave the "
            "option out, or make another gallery"
        )
