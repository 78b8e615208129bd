"""API keys: made at random, shown once, kept as salted hashes.

A key is ``sf2_ID_SECRET``. The id is public: it names the key in the file and in the audit log. The
secret is 256 random bits, so a plain HMAC is the right hash: a slow one protects what people choose
and would only let strangers keep the server busy.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from sphereface2.errors import UserError
from sphereface2.files import atomic_write, changing, check_folder, read_text, writing

_FORMAT = "sphereface2-keys"
_TOKEN = re.compile(r"sf2_([0-9a-f]{8})_([A-Za-z0-9_-]{43})", re.ASCII)


@dataclass(frozen=True)
class Key:
    """What is kept of a key: never the secret."""

    id: str
    name: str
    salt: str
    hash: str
    created: str

    def matches(self, secret: str) -> bool:
        """Whether ``secret`` is this key's, in a time that does not depend on it."""
        return hmac.compare_digest(_hash(self.salt, secret), self.hash)


# Compared against when the id is unknown, so that the answer takes as long as for a known one.
_NOBODY = Key("", "", "00" * 16, "00" * 32, "")


class KeyFile:
    """The keys that are admitted; read again when the file changes."""

    def __init__(self, path: str | Path) -> None:
        """Read ``path``; UserError if the file is missing, damaged or holds no key."""
        self.path = Path(path)
        self._state = _state(self.path)
        self._keys = {key.id: key for key in read(self.path)}
        if not self._keys:
            raise UserError(
                f"{path} holds no key: make one with sphereface2 keys add NAME --file {path}"
            )

    def check(self, token: str) -> Key | None:
        """The key that ``token`` belongs to, or nothing.

        A file that has vanished or cannot be read admits nobody.
        """
        if (state := _state(self.path)) != self._state:
            try:
                self._keys = {key.id: key for key in read(self.path)}
            except UserError:
                self._keys = {}
            self._state = state
        found = _TOKEN.fullmatch(token)
        name, secret = found.groups() if found else ("", "")
        key = self._keys.get(name)
        return key if (key or _NOBODY).matches(secret) and key is not None else None


def read(path: str | Path) -> list[Key]:
    """The keys in a file, oldest first; UserError if it is missing or damaged."""
    if not Path(path).exists():
        raise UserError(
            f"{path} does not exist: make a key with sphereface2 keys add NAME --file {path}"
        )
    text = read_text(path, "a file that sphereface2 keys add made")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a key file: {error}") from error
    try:
        if content["format"] != _FORMAT:
            raise ValueError
        keys = [Key(**entry) for entry in content["keys"]]
        if not all(isinstance(value, str) for key in keys for value in asdict(key).values()):
            raise ValueError
        for key in keys:
            bytes.fromhex(key.salt)
            bytes.fromhex(key.hash)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged or not a key file of sphereface2: make a new one"
        ) from error
    return keys


def add(name: str, path: str | Path) -> str:
    """Add a key called ``name`` to a file, made if it is missing; the key to hand over.

    Raises:
        UserError: the name is taken or the file damaged.
    """
    path = Path(path)
    if not name.strip() or not name.isprintable():
        raise UserError("a key needs a name of printable characters, for example who will use it")
    check_folder(path.parent)
    if path.exists():
        read(path)  # no lock is left beside what is no file of keys
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with changing(path):
        keys = read(path) if path.exists() else []
        if name in {key.name for key in keys}:
            raise UserError(
                f"{path} already holds a key called {name!r}: remove it or choose another"
            )
        secret, salt = secrets.token_urlsafe(32), secrets.token_hex(16)
        key = Key(
            id=secrets.token_hex(4),
            name=name,
            salt=salt,
            hash=_hash(salt, secret),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        _write(path, [*keys, key])
    return f"sf2_{key.id}_{secret}"


def remove(name: str, path: str | Path) -> list[Key]:
    """Remove the keys with this name or id; a running server refuses them from then on."""
    path = Path(path)
    read(path)  # no lock is left where there is no file
    with changing(path):
        keys = read(path)
        left = [key for key in keys if name not in (key.name, key.id)]
        if len(left) == len(keys):
            raise UserError(
                f"{path} holds no key called {name!r}: sphereface2 keys list shows them"
            )
        _write(path, left)
    return [key for key in keys if key not in left]


def _write(path: Path, keys: list[Key]) -> None:
    content = {"format": _FORMAT, "version": 1, "keys": [asdict(key) for key in keys]}
    mask = os.umask(0o077)  # for its owner alone
    try:
        atomic_write(path, (json.dumps(content, indent=2) + "\n").encode())
    finally:
        os.umask(mask)


def _hash(salt: str, secret: str) -> str:
    return hmac.new(bytes.fromhex(salt), secret.encode(), hashlib.sha256).hexdigest()


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
