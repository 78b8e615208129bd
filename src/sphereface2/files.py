"""Files that are whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from sphereface2.errors import UserError

#: What the temporary names match that a process which was killed leaves behind.
TEMPORARY = ".*.tmp"


def _temporary(path: Path) -> Path:
    """A name beside ``path`` that nobody else has, and short: a long one may be at its limit."""
    return path.with_name(f".{secrets.token_hex(8)}.tmp")


def atomic_write(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``; a crash leaves the old file or the new, never a part."""
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path`` that becomes ``path`` when the block succeeds.

    ``path`` must not exist. On an exception the temporary folder is removed.
    """
    temporary = _temporary(path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def atomic_symlink(link: Path, target: str) -> None:
    """Point ``link`` at ``target`` (relative to its folder), replacing an older one at once."""
    temporary = _temporary(link)
    temporary.symlink_to(target)
    temporary.replace(link)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make an OSError of the block a UserError: ``path``, which it writes, cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def lock(file: IO[Any], busy: str) -> None:
    """Keep an open file to this process until it is closed; UserError ``busy`` if another has it.

    Windows knows no such lock; there it does nothing.
    """
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(busy) from None


def printable(name: str) -> str:
    """A file's name as it can be printed and stored: bytes that are not UTF-8 become escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def digest(*parts: bytes | str | np.ndarray) -> str:
    """sha256 of the parts, each preceded by its length so that no two lists collide."""
    hasher = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            data = part.tobytes()
        else:
            # Names of files come from the system with bytes that are not UTF-8 as surrogates.
            data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        hasher.update(len(data).to_bytes(8, "little"))
        hasher.update(data)
    return hasher.hexdigest()
