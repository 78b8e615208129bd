"""The audit log: who did what to whom, and no more.

One JSON object a line: time, request id, client, key id, action, person, images, status, outcome.
No image, embedding, similarity, landmark or file name is ever written.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime
from io import TextIOWrapper
from logging.handlers import WatchedFileHandler
from pathlib import Path

from sphereface2.errors import UserError


class _PrivateFile(WatchedFileHandler):
    """For its owner alone, also when it is made anew after logrotate."""

    def _open(self) -> TextIOWrapper:
        return open(
            self.baseFilename,
            "a",
            encoding=self.encoding,
            opener=lambda path, flags: os.open(path, flags, 0o600),
        )


class Audit:
    """Appends to a file (which logrotate may move away), or to standard output."""

    def __init__(self, path: str | Path | None = None) -> None:
        """Open the log; UserError if the file cannot be written."""
        self._handler: logging.Handler
        if path is None:
            self._handler = logging.StreamHandler(sys.stdout)
        else:
            try:
                self._handler = _PrivateFile(path, encoding="utf-8")
            except OSError as error:
                raise UserError(f"the audit log {path} cannot be written: {error}") from error

    def write(self, **fields: str | int | None) -> None:
        """Append one line; empty fields are left out."""
        present = {name: value for name, value in fields.items() if value is not None}
        text = json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **present})
        self._handler.handle(logging.makeLogRecord({"msg": text, "levelno": logging.INFO}))

    def close(self) -> None:
        """Flush and close."""
        self._handler.close()
