"""Files that are whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import csv
import errno
import functools
import hashlib
import inspect
import os
import platform
import re
import secrets
import shutil
import sys
import tempfile
import time
import unicodedata
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ParamSpec, TypeVar

import yaml

from sphereface2.errors import UserError

if TYPE_CHECKING:
    import numpy as np

P = ParamSpec("P")
R = TypeVar("R")

#: What the temporary names match that a process which was killed leaves behind.
TEMPORARY = ".*.tmp"


def _temporary(path: Path) -> Path:
    """A name beside ``path`` that nobody else has, and short: a long one may be at its limit."""
    return path.with_name(f".{secrets.token_hex(8)}.tmp")


def atomic_write(path: Path, content: bytes | memoryview) -> None:
    """Write ``content`` to ``path``; a crash leaves the old file or the new, never a part."""
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        _name(error, temporary, path)
        raise


def _name(error: BaseException, temporary: Path, path: Path) -> None:
    """Let an error of the system name the file that was wanted, not the temporary one or none."""
    if isinstance(error, OSError) and error.errno and error.filename in (None, str(temporary)):
        error.filename = str(path)
        del error.filename2  # not None, which the error's text would name


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path`` that becomes ``path`` when the block succeeds.

    ``path`` must not exist. On an exception the temporary folder is removed.
    """
    temporary = _temporary(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        _name(error, temporary, path)
        raise


def point(link: Path, name: str) -> None:
    """Make ``link`` lead to ``name``, which lies beside it, replacing an older one at once.

    It is a symbolic link, or, where the file system has none, a text file that holds the name.
    """
    temporary = _temporary(link)
    try:
        temporary.symlink_to(name)
    except (OSError, NotImplementedError):
        temporary.write_text(f"{name}\n", encoding="utf-8")
    temporary.replace(link)


def pointed(link: Path) -> Path | None:
    """What ``link``, made by `point`, leads to; None if it is not there or leads nowhere."""
    try:
        if link.is_symlink() or not link.is_file():
            target = link
        else:
            name = link.read_text("utf-8").strip()
            target = link.with_name(name) if name and Path(name).name == name else link
        return target if target.is_dir() else None
    except (OSError, ValueError):
        return None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make an OSError of the block a UserError: ``path``, which it writes, cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def check_folder(path: Path) -> None:
    """UserError unless ``path`` is a folder to write in or can become one, before any work."""
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{path} cannot be a folder, as {place} is a file: name another place")
    if not os.access(place, os.W_OK):
        with writing(path), tempfile.TemporaryFile(dir=place):  # the system says why
            pass


def lock(file: IO[Any], busy: str) -> None:
    """Keep an open file to this process until it is closed; UserError ``busy`` if another has it.

    The lock ends with the process, however it ends, and is not passed on to processes that it
    forks. Windows, and file systems without locks, know no such lock; there it does nothing.
    """
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(busy) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        _locked.add(file)


_locked: weakref.WeakSet[IO[Any]] = weakref.WeakSet()


def _let_go() -> None:
    """In a forked child, which would keep its parent's locks alive after the parent's death."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for file in list(_locked):
        if not file.closed:
            os.dup2(nothing, file.fileno(), inheritable=False)
    os.close(nothing)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def owned(folder: Path, *, patience: float = 5.0) -> Iterator[None]:
    """Make ``folder``, and make it this process's alone; one that died keeps nothing.

    Args:
        folder: a file ``.lock`` in it says who has it.
        patience: seconds to wait for an owner that is about to end.

    Raises:
        UserError: another process has it; the message says which.
    """
    path = folder / ".lock"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with writing(path):
        file = path.open("a+", encoding="utf-8", errors="replace")
    with file:
        if not _locked_within(file, patience):
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(f"{folder} is in use by {holder}; wait until it ends, or end it")
        with writing(path):
            file.truncate(0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"process {os.getpid()} on {platform.node()} since {since}\n")
            file.flush()
        yield


def _locked_within(file: IO[Any], patience: float) -> bool:
    """Whether an open file can be kept to this process, as by `lock`, within so many seconds."""
    until = time.monotonic() + patience
    while True:
        try:
            lock(file, "")
            return True
        except UserError:
            if time.monotonic() >= until:
                return False
            time.sleep(0.02)


@contextmanager
def changing(path: Path, *, patience: float = 30.0) -> Iterator[None]:
    """Let only one process at a time read ``path``, change it and write it again.

    The lock is a file beside it, ``.NAME.lock``, for its owner alone: what is renamed over ``path``
    would not be locked.

    Raises:
        UserError: the folder cannot be written, or others change the file for ``patience`` seconds.
    """
    with writing(path):
        beside = path.with_name(f".{path.name}.lock")
        file = os.fdopen(os.open(beside, os.O_RDWR | os.O_CREAT, 0o600), "r+")
    with file:
        if not _locked_within(file, patience):
            raise UserError(f"{path} is being changed by another process; try again when it ends")
        yield


MOST_BYTES = 255
"""Longest name of a file or folder, on the file systems in use."""


def printable(name: str) -> str:
    """A file's name as it can be printed and stored: bytes that are not UTF-8 become escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def one_name(name: str) -> str:
    """A person's name in the form by which people are told apart, however it was typed.

    Unicode's composed form (NFC), in which "é" is one letter and not two, without blanks at the
    ends.
    """
    return unicodedata.normalize("NFC", name).strip()


_TURNS = frozenset("LRE RLE LRO RLO PDF LRI RLI FSI PDI".split())  # noqa: SIM905


def visible(text: str) -> str:
    """A text of unknown origin as it can stand in a line of a terminal.

    Ends of lines, controls, what turns the direction of letters round, and bytes that are not UTF-8
    become escapes.

    Examples:
        >>> visible("Zoë\\x1b[2J")
        'Zoë\\\\x1b[2J'
    """
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in ("Cc", "Zl", "Zp")
        or unicodedata.bidirectional(character) in _TURNS
        else character
        for character in printable(text)
    )


def digest(*parts: bytes | str | np.ndarray) -> str:
    """sha256 of the parts, each preceded by its length so that no two lists collide."""
    hasher = hashlib.sha256()
    for part in parts:
        if not isinstance(part, bytes | str):
            data = part.tobytes()
        else:
            # Names of files come from the system with bytes that are not UTF-8 as surrogates.
            data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        hasher.update(len(data).to_bytes(8, "little"))
        hasher.update(data)
    return hasher.hexdigest()


_PICTURE = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r|GIF8[79]a|RIFF.{4}WEBP|.{4}ftyp|II\*\0|MM\0\*", re.DOTALL
)
"""How the files of pictures begin that somebody may give in the place of a text."""


def takes_paths(function: Callable[P, R]) -> Callable[P, R]:
    """Let what a function declares as ``Path`` be given as a string too, as callers do.

    The command line takes its types from the declaration, which therefore stays ``Path``; it is
    read as text, as ``from __future__ import annotations`` leaves it. One path will do for a
    sequence of them.

    Examples:
        >>> @takes_paths
        ... def names(folder: Path, *, more: Sequence[Path] = ()) -> list[str]:
        ...     return [folder.name, *(one.name for one in more)]
        >>> names("a/b", more=["c/d"]), names(Path("a/b"), more="c/d")
        (['b', 'd'], ['b', 'd'])
    """
    signature = inspect.signature(function)

    def made(name: str, value: Any) -> Any:
        declared = str(signature.parameters[name].annotation).removesuffix(" | None")
        if declared == "Path" and isinstance(value, str):
            return Path(value)
        if declared == "Sequence[Path]" and value is not None:
            return [Path(one) for one in ((value,) if isinstance(value, str | Path) else value)]
        return value

    @functools.wraps(function)
    def taking(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # its error names the function
        for name, value in given.arguments.items():
            given.arguments[name] = made(name, value)
        return function(*given.args, **given.kwargs)

    return taking


def read_text(path: str | Path, wanted: str = "") -> str:
    """The text of a file that a user gives: UTF-8, with or without a byte order mark.

    Never in the locale's encoding, so that a file means the same on every machine.

    Args:
        path: the file.
        wanted: what to give, for the message where the file is missing or something else.

    Raises:
        UserError: the file cannot be read, is UTF-16, or is no text.
    """
    remedy = wanted and f"; give {wanted}"
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise UserError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}{remedy}"
        ) from error
    start = data[:64]
    if _PICTURE.match(start) and not data.isascii():
        raise UserError(f"{path} is a picture and not a text file{remedy}")
    halves = (start[::2], start[1::2]) if len(start) >= 4 else ()
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or any(not any(half) for half in halves):
        raise UserError(f"{path} is UTF-16 text; save it as UTF-8")
    if b"\0" in data:
        raise UserError(f"{path} is not a text file: byte {data.index(0)} is NUL{remedy}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error


def read_lines(path: str | Path, wanted: str = "") -> list[tuple[int, str]]:
    """The lines of a text file and their numbers from 1, without those empty or begun by "#".

    ``wanted`` is as of `read_text`.
    """
    # Not splitlines(), which also cuts at characters that names of files may hold.
    lines = enumerate(re.split(r"\r\n|\r|\n", read_text(path, wanted)), 1)
    stripped = ((number, line.strip(" \t")) for number, line in lines)
    return [(number, line) for number, line in stripped if line and not line.startswith("#")]


def csv_fields(line: str) -> list[str]:
    """The fields of a line of CSV, without the blanks around them.

    Examples:
        >>> csv_fields('"King, M/1.jpg", 3')
        ['King, M/1.jpg', '3']
    """
    try:
        fields = next(csv.reader([line], skipinitialspace=True))
    except csv.Error:  # a field of more than 128 KiB, such as an image as text
        fields = line.split(",")
    return [field.strip() for field in fields]


def read_yaml(
    path: str | Path, loader: type[yaml.SafeLoader] | None = None, wanted: str = ""
) -> Any:
    """The value of a YAML file that a user gives, read as plain data.

    Args:
        path: the file.
        loader: a subclass of PyYAML's safe loader, which is the default.
        wanted: as of `read_text`.

    Raises:
        UserError: the file cannot be read or is no YAML, a key is given twice, or its anchors and
            aliases repeat so much that it stands for more than a million nodes.
    """
    try:
        reader = (loader or yaml.SafeLoader)(read_text(path, wanted))
        node = reader.get_single_node()
        if node is None:
            return None
        if _nodes(node, {}) > _MOST_NODES:
            raise UserError(f"{path}: its aliases repeat parts of it too often; write them out")
        return reader.construct_document(node)
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f" line {place.line + 1}" if place is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{path}{where} is not valid YAML: {problem}") from error
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply or holds itself; write it flatter") from error
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} holds a value that cannot be read: {error}") from error


_MOST_NODES = 1_000_000


def _check_keys(mapping: yaml.MappingNode) -> None:
    """Refuse a key that stands twice, of which PyYAML would take the last."""
    known = set()
    for key, _ in mapping.value:
        if isinstance(key, yaml.ScalarNode) and key.value in known:
            problem = f"the key {key.value!r} is given twice"
            raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        known.add(str(key.value))


def _nodes(node: Any, known: dict[int, int]) -> int:
    """The number of nodes that a YAML node stands for once its aliases are written out."""
    if id(node) not in known:
        parts = node.value if isinstance(node.value, list) else ()
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
        flat = [p for part in parts for p in (part if isinstance(part, tuple) else (part,))]
        known[id(node)] = 1 + sum(_nodes(part, known) for part in flat)
    return known[id(node)]
