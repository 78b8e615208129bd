"""A trained network with all that its use needs: pictures in, embeddings out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from sphereface2.align import Aligner, Face, NoFaceError
from sphereface2.backbones import bundle
from sphereface2.backbones.base import Backbone
from sphereface2.device import resolve
from sphereface2.errors import UserError
from sphereface2.evaluation.embedding import embed
from sphereface2.files import atomic_folder, atomic_write
from sphereface2.images import MAX_PIXELS, ImageLike, read_image
from sphereface2.recognition import calibration as calibrations
from sphereface2.recognition import card, fingerprint

#: All that is ever fetched from a hub: weights without code, JSON and a text.
FILES = (bundle.WEIGHTS, bundle.CONFIG, calibrations.FILE, card.FILE)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_HUB_SCHEME = "hf://"


class FaceEmbedder(ModelHubMixin):
    """A network, its preprocessing, its alignment and its calibrated threshold.

    Args:
        network: a backbone; it is put in evaluation mode.
        calibration: what its similarities are worth, where that is known.
        aligner: finds and crops faces; by default built when first needed.

    Attributes:
        network: the backbone, on the device where embeddings are computed.
        calibration: None where there is none.
    """

    def __init__(
        self,
        network: Backbone,
        calibration: calibrations.Calibration | None = None,
        *,
        aligner: Aligner | None = None,
    ) -> None:
        self.network = network.eval()
        self.calibration = calibration
        if aligner is not None:
            self.aligner = aligner

    @cached_property
    def aligner(self) -> Aligner:
        """What finds and crops the faces of photographs; built on first use."""
        return Aligner()

    @property
    def embedding_dim(self) -> int:
        """Length d of an embedding."""
        return self.network.embedding_dim

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of weights, architecture and preprocessing.

        It is the same after saving, on another machine and on another device. How crops are made
        is not part of it: the same crop has the same embedding whoever cut it, and
        ``aligner.name`` tells who did.
        """
        return fingerprint.fingerprint(self.network)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    def crop(self, image: ImageLike, *, max_pixels: int = MAX_PIXELS) -> tuple[np.ndarray, Face]:
        """The aligned crop, uint8 (112, 112, 3) RGB, that `embed` would use, and its face.

        Raises:
            NoFaceError: the photograph shows no face.
            UserError: it cannot be read, or has more than ``max_pixels``.
        """
        return self.aligner.align(image, max_pixels=max_pixels)

    def embed(
        self,
        images: Iterable[ImageLike],
        *,
        aligned: bool = False,
        flip: bool = True,
        batch_size: int = 64,
    ) -> np.ndarray:
        """Embed pictures: float32 (N, d), rows of length 1, in the order given.

        Args:
            images: each a path, encoded bytes, a PIL image, a uint8 array (H, W, 3) in RGB or
                (H, W) in grey, or a uint8 tensor (3, H, W). A lazy iterable is read a batch at a
                time.
            aligned: the pictures are face crops by the template, of any size; otherwise they are
                photographs, and the largest and most central face of each is cropped.
            flip: add the mirror image's embedding before normalising.
            batch_size: pictures in one forward pass.

        Raises:
            NoFaceError: a photograph shows no face; the message names it.
            UserError: a picture cannot be read, or ``images`` is one picture and not several.
        """
        if _is_one(images):
            raise UserError("embed takes several pictures: put a single one in brackets, [picture]")
        if batch_size < 1:
            raise UserError(f"the batch size must be 1 or more, not {batch_size}")

        def read(numbered: tuple[int, ImageLike]) -> np.ndarray:
            number, image = numbered
            try:
                return writable(read_image(image) if aligned else self.crop(image)[0])
            except UserError as error:
                if isinstance(image, str | Path):  # the message names it already
                    raise
                if isinstance(error, NoFaceError):
                    raise NoFaceError(
                        f"no face found in picture {number}; give a picture that shows one"
                    ) from error
                raise UserError(f"picture {number}: {error}") from error

        return embed(self.network, enumerate(images), read=read, flip=flip, batch_size=batch_size)

    # -- loading and saving --------------------------------------------------------------------

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        path_or_hub_id: str | Path,
        *,
        device: str | torch.device | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> FaceEmbedder:
        """Load a model. Nothing in it is executed: weights are safetensors, the rest is JSON.

        Args:
            path_or_hub_id: a run folder, a model folder, its ``model.safetensors``, or the id
                ``owner/name`` of a model on the Hugging Face hub. What exists on disk is a path,
                and so is anything below a folder that exists; ``hf://owner/name`` is always the
                hub.
            device: cpu, cuda, mps; by default the best there is.
            revision: branch, tag or commit on the hub.
            token: for private models on the hub; by default the one logged in with.
            cache_dir: where models of the hub are kept.
            local_files_only: take the hub's model from the cache and ask no network.

        Raises:
            UserError: there is no such path or model, or a file is damaged or foreign.
        """
        hub_id = _hub_id(path_or_hub_id)
        if hub_id is None:
            if revision is not None:
                raise UserError(
                    f"{path_or_hub_id} is a local path, which has no revision: leave it out"
                )
            folder = bundle.resolve(path_or_hub_id).resolve()
        else:
            folder = _download(
                hub_id,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
        place = device if isinstance(device, torch.device) else resolve(device)
        network = bundle.load(folder)
        facts = network.metadata.get("training") or card.facts_of_run(folder.parent.parent)
        if facts:
            network.metadata = {**network.metadata, "training": facts}
        found = cls(network)
        found.calibration = calibrations.Calibration.load(folder, fingerprint=found.fingerprint)
        network.to(place)
        return found

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        config: Any = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write a model folder in the hub's layout, which `from_pretrained` takes back.

        It holds ``model.safetensors``, ``config.json``, ``calibration.json`` if there is a
        calibration, and a model card, ``README.md``. A new folder appears when it is whole. In a
        folder that exists each file is replaced at once, and a card that was edited is kept.

        Args:
            save_directory: folder to create, or one that holds a model.
            config: not used; what the network is comes from the network.
            repo_id: the hub's id, with ``push_to_hub``; by default the folder's name.
            push_to_hub: upload it as well.
            model_card_kwargs: of `generate_model_card`: ``license``, ``license_name``,
                ``license_link``.
            push_to_hub_kwargs: of `push_to_hub`.

        Returns:
            The commit's address on the hub, if it was uploaded.

        Raises:
            UserError: the folder holds something else.
        """
        folder = Path(save_directory)
        if folder.exists():
            seen = (
                [path.name for path in folder.iterdir() if not path.name.startswith(".")]
                if folder.is_dir()
                else [folder.name]
            )
            if seen and bundle.WEIGHTS not in seen:
                raise UserError(f"{folder} exists and holds no model: give a new folder")
            self._write(folder, model_card_kwargs or {})
        else:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with atomic_folder(folder) as temporary:
                self._write(temporary, model_card_kwargs or {})
        if not push_to_hub:
            return None
        return self.push_to_hub(
            repo_id or folder.resolve().name,
            model_card_kwargs=model_card_kwargs,
            **push_to_hub_kwargs,
        )

    def _write(self, folder: Path, card_options: dict[str, Any]) -> None:
        # First, so that a crash never leaves the calibration of one network beside another.
        (folder / calibrations.FILE).unlink(missing_ok=True)
        bundle.save(self.network, folder)
        if self.calibration is not None:
            self.calibration.save(folder)
        readme = folder / card.FILE
        if not readme.exists() or card.MARK in readme.read_text(encoding="utf-8", errors="replace"):
            atomic_write(readme, f"{self.generate_model_card(**card_options)}\n".encode())

    def generate_model_card(self, **options: Any) -> ModelCard:
        """The model card: data, settings, figures, limits, intended use, licence.

        Args:
            options: ``license`` (the hub's identifier), ``license_name`` and ``license_link``;
                by default the licence is named as that of the training data's terms.
        """
        return card.model_card(self.network, self.fingerprint, self.calibration, **options)


def writable(pixels: np.ndarray) -> np.ndarray:
    """``pixels``, or a copy where they are read-only, which torch warns of."""
    return pixels if pixels.flags.writeable else pixels.copy()


def _is_one(images: Any) -> bool:
    """Whether ``images`` is a single picture."""
    if isinstance(images, torch.Tensor):
        return images.ndim == 3
    if isinstance(images, np.ndarray):
        return images.ndim == 2 or (images.ndim == 3 and images.shape[2] == 3)
    return isinstance(images, str | bytes | bytearray | memoryview | Path) or hasattr(
        images, "getexif"
    )


def _hub_id(path: str | Path) -> str | None:
    """The hub's id that ``path`` is, or None for a local path."""
    if not isinstance(path, str):
        return None
    if path.startswith(_HUB_SCHEME):
        return path.removeprefix(_HUB_SCHEME)
    if Path(path).exists() or not _HUB_ID.fullmatch(path) or path.endswith(".safetensors"):
        return None
    # "runs/nmae" is a slip of the pen where there is a folder "runs", and nothing to ask a hub for.
    return None if Path(path).parent.is_dir() else path


def _download(hub_id: str, *, revision: str | None, **options: Any) -> Path:
    what = f"{hub_id} (revision {revision})" if revision else hub_id
    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=list(FILES),
                library_name="sphereface2",
                **options,
            )
        )
    except HFValidationError as error:
        raise UserError(f"{hub_id!r} is no id of the hub: it should be owner/name") from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"there is neither a folder {hub_id} here, nor that model in the hub's cache, and the "
            "hub cannot be reached: correct the path or the connection"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        told = str(error).strip().splitlines()
        raise UserError(
            f"there is no folder {hub_id} here and the hub does not give the model {what}: "
            f"{told[-1] if told else type(error).__name__}"
        ) from error
