"""Models on the Hugging Face hub; its client is imported when a model of the hub is asked for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sphereface2.backbones import bundle
from sphereface2.errors import UserError
from sphereface2.extras import require

#: All that is ever fetched: weights without code, JSON and a text.
FILES = (bundle.WEIGHTS, bundle.CONFIG, "calibration.json", "README.md")
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_SCHEME = "hf://"


def hub_id(path: str | Path) -> str | None:
    """The hub's id that ``path`` is, or None for a local path."""
    if not isinstance(path, str):
        return None
    if path.startswith(_SCHEME):
        return path.removeprefix(_SCHEME)
    if Path(path).exists() or not _ID.fullmatch(path) or path.endswith(".safetensors"):
        return None
    # "runs/nmae" is a slip of the pen where there is a folder "runs", and nothing to ask a hub for.
    return None if Path(path).parent.is_dir() else path


def model_folder(path: str | Path, *, revision: str | None = None, **options: Any) -> Path:
    """The folder (or ``.onnx`` file) of a model, which is fetched if it lies on the hub.

    Args:
        path: as of `FaceEmbedder.from_pretrained`.
        revision: branch, tag or commit on the hub.
        options: of ``huggingface_hub.snapshot_download``.

    Raises:
        UserError: there is no such path or model, or the hub cannot be reached.
    """
    repo_id = hub_id(path)
    if repo_id is None:
        if revision is not None:
            raise UserError(f"{path} is a local path, which has no revision: leave it out")
        return bundle.resolve(path).resolve()
    require("models on the hub", "huggingface_hub")
    import huggingface_hub
    from huggingface_hub import errors

    options |= {"revision": revision, "allow_patterns": list(FILES), "library_name": "sphereface2"}
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, **options))
    except errors.HFValidationError as error:
        raise UserError(
            f"{repo_id!r} is not the name of a model on the hub: expected owner/name"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"there is neither a folder {repo_id} here, nor that model in the hub's cache, and the "
            "hub cannot be reached: correct the path or the connection"
        ) from error
    except (errors.HfHubHTTPError, OSError) as error:
        what = f"{repo_id} (revision {revision})" if revision else repo_id
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise UserError(
            f"there is no folder {repo_id} here and the hub does not give the model {what}: "
            f"{reason}"
        ) from error


def upload(
    folder: Path, repo_id: str, *, private: bool | None, token: str | None, **options: Any
) -> str:
    """Upload a model folder as one commit, creating the repository; returns its address."""
    require("models on the hub", "huggingface_hub")
    import huggingface_hub

    api = huggingface_hub.HfApi(token=token)
    repo_id = api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
    return api.upload_folder(repo_id=repo_id, folder_path=folder, **options)
