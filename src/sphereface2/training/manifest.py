"""Whether a checkpoint is whole: sizes and SHA-256 of its files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from sphereface2.backbones import bundle
from sphereface2.errors import UserError
from sphereface2.version import __version__

FORMAT = "sphereface2-checkpoint"
FORMAT_VERSION = 2
"""1, of package version 0.1.0, has no manifest and no ``run.json``."""
MANIFEST, PROGRESS, RUN = "manifest.json", "progress.json", "run.json"


def entries(folder: Path, pattern: str, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """Size and SHA-256 by name of the files that match and are not ``known``."""
    entries = {}
    for path in sorted(folder.glob(pattern)):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in (known or {}):
            entries[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    return entries


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text())
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} holds no object")
    return found


def problem_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is whole.

    Raises:
        UserError: a newer version of the package wrote it.
    """
    try:
        if not (folder / MANIFEST).exists():
            return _problem_of_old(folder)
        manifest = read_json(folder / MANIFEST)
        version = manifest["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(
                f"{folder} has format version {version!r}, of sphereface2 "
                f"{manifest['package_version']}; this is {__version__}, which reads "
                f"{FORMAT_VERSION}: use the version that wrote it"
            )
        needed = {PROGRESS, RUN, bundle.CONFIG, bundle.WEIGHTS, "state/.metadata"}
        if manifest["format"] != FORMAT or needed - manifest["files"].keys():
            return f"{MANIFEST} is not that of a whole checkpoint"
        for name, entry in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
            if _sha256(path) != entry["sha256"]:
                return f"{name} has changed (its SHA-256 is another)"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError):
        return f"{MANIFEST} or {PROGRESS} cannot be understood"
    return None


def _problem_of_old(folder: Path) -> str | None:
    """The same of a checkpoint of 0.1.0, which has no checksums: whether all of it is there."""
    if (folder / RUN).exists():
        return f"{MANIFEST} is missing"
    for name in (PROGRESS, bundle.CONFIG, bundle.WEIGHTS, "state/.metadata"):
        if not (folder / name).is_file():
            return f"{name} is missing"
    read_json(folder / PROGRESS)["step"]
    try:
        bundle.load(folder)
        stored = dcp.FileSystemReader(folder / "state").read_metadata().storage_data
    except Exception as error:  # a pickle that was cut fails in any way
        return f"it cannot be read ({why_of(error)})"
    for part in stored.values():
        path = folder / "state" / part.relative_path
        if not path.is_file():
            return f"state/{part.relative_path} is missing"
        if path.stat().st_size < part.offset + part.length:
            return f"state/{part.relative_path} has been cut"
    return None


def why_of(error: BaseException) -> str:
    """One line that says what went wrong."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if "inline_container" in str(error):  # torch's archives hide what the system said
        return "the system refuses to write: no room, a quota or a limit on the size of files"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
