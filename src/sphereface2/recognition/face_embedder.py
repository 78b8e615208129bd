"""A trained network with all that its use needs: photographs in, embeddings and decisions out."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sphereface2.align import Aligner, Face, NoFaceError
from sphereface2.backbones import bundle, hub
from sphereface2.backbones.onnx import OnnxNetwork
from sphereface2.embedder import Embedder
from sphereface2.errors import UserError
from sphereface2.evaluation import calibration as calibrations
from sphereface2.evaluation.results import far_key
from sphereface2.evaluation.verification import pair_scores
from sphereface2.files import atomic_folder, atomic_write
from sphereface2.images import ImageLike, is_one, read_image
from sphereface2.recognition import box, card

if TYPE_CHECKING:
    import torch

    from sphereface2.backbones.base import Backbone


@dataclass(frozen=True)
class Verification:
    """How alike two faces are and, with a calibration, what that means.

    Attributes:
        similarity: cosine of the two embeddings, in [-1, 1].
        threshold: at and above it the decision is "same"; None without a calibration.
        far: the FAR that the threshold was chosen for; None for a threshold of the caller's.
        llr: natural logarithm of the likelihood ratio; None without a calibration.
        probability: that the pair is genuine, at ``prior``; None without a calibration.
        prior: the share of genuine pairs that was assumed.
        faces: the face found in each image, None where the image is an aligned crop.
    """

    similarity: float
    threshold: float | None
    far: float | None
    llr: float | None
    probability: float | None
    prior: float
    faces: tuple[Face | None, Face | None]

    @property
    def same(self) -> bool | None:
        """The decision; None without a threshold."""
        return None if self.threshold is None else self.similarity >= self.threshold

    @property
    def verdict(self) -> str:
        """The decision in words."""
        return {True: "same person", False: "different people", None: "no decision"}[self.same]

    def to_dict(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        faces = [face and face.to_dict() for face in self.faces]
        decision = {True: "same", False: "different", None: None}[self.same]
        return {**self.__dict__, "decision": decision, "faces": faces}


class FaceEmbedder:
    """A network, its preprocessing, its alignment and its calibrated threshold.

    Args:
        network: a backbone, an exported network, or an `Embedder` of either.
        calibration: what its similarities are worth, where that is known.
        aligner: finds and crops faces; by default built when first needed.

    Attributes:
        embedder: turns aligned crops into embeddings.
        network: the backbone, on the device where embeddings are computed, or the exported one.
        embedding_dim: length d of an embedding.
        calibration: None where there is none.

    Example:
        A model is loaded with ``FaceEmbedder.from_pretrained("runs/NAME")``; then

        - ``embed("a.jpg")`` gives an embedding (d,), ``embed(["a.jpg", "b.jpg"])`` two, (2, d);
        - ``verify("a.jpg", "b.jpg").same`` says whether they show one person.
    """

    def __init__(
        self,
        network: Backbone | OnnxNetwork | Embedder,
        calibration: calibrations.Calibration | None = None,
        *,
        aligner: Aligner | None = None,
    ) -> None:
        self.embedder = network if isinstance(network, Embedder) else Embedder(network)
        self.network: Backbone | OnnxNetwork = self.embedder.network
        self.embedding_dim = self.embedder.embedding_dim
        self.calibration = calibration
        if aligner is not None:
            self.aligner = aligner

    @cached_property
    def aligner(self) -> Aligner:
        """What finds and crops the faces of photographs; built on first use."""
        return Aligner()

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of weights, architecture and preprocessing.

        It is the same after saving, on another machine and on another device. How crops are made
        is not part of it: the same crop has the same embedding whoever cut it, and
        ``aligner.name`` says who did.
        """
        return self.embedder.fingerprint

    @property
    def device(self) -> str:
        """Where the network computes, for instance ``cpu`` or ``cuda:0``."""
        return self.embedder.device

    def __repr__(self) -> str:
        calibration = "not calibrated"
        if self.calibration is not None:
            far = far_key(self.calibration.far_default)
            calibration = f"threshold {self.calibration.threshold():.4f} at FAR {far}"
        return f"FaceEmbedder({self.embedder!r}, {calibration})"

    def crop(self, image: ImageLike) -> tuple[np.ndarray, Face]:
        """The aligned crop, uint8 (112, 112, 3) RGB, that `embed` would use, and its face.

        Raises:
            NoFaceError: the photograph shows no face.
            UserError: it cannot be read.
        """
        return self.aligner.align(image)

    def crops(self, image: ImageLike) -> list[tuple[np.ndarray, Face]]:
        """As `crop`, of every face of the photograph, the largest and most central first."""
        if found := self.aligner.align_all(image):
            return found
        name = image if isinstance(image, str | Path) else "the image"
        raise NoFaceError(f"no face found in {name}; give an image that shows one")

    def embed(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        aligned: bool = False,
        skipped: dict[int, str] | None = None,
    ) -> np.ndarray:
        """Embed one image or many: float32 (d,) or (N, d), of length 1, in the order given.

        Args:
            images: one image or an iterable of images. An image is a path, encoded bytes, a PIL
                image, a uint8 array (H, W, 3) in RGB or (H, W) in grey, or a uint8 tensor
                (3, H, W). Many may be one array or tensor of four dimensions; several grey images
                are a list. A lazy iterable is read a batch at a time.
            aligned: the images are face crops by the template, of any size; otherwise they are
                photographs, and the largest and most central face of each is cropped.
            skipped: without it an image that cannot be read or shows no face is an error; with it
                such an image, one of many, is left out of the result, and the reason stands here
                by its index.

        Raises:
            NoFaceError: a photograph shows no face; the message names it.
            UserError: an image cannot be read.
        """
        if is_one(images):
            return self.embedder.embed([images], read=lambda one: self._read(one, aligned))[0]
        several: Iterable[Any] = images  # type: ignore[assignment]

        def read(numbered: tuple[int, ImageLike]) -> np.ndarray:
            number, image = numbered
            try:
                return self._read(image, aligned)
            except UserError as error:
                named = error
                if not isinstance(image, str | Path):  # whose message names the file already
                    named = type(error)(f"image {number}: {error}")
                if skipped is not None:
                    skipped[number] = str(named)
                raise named from error

        lost: list[int] | None = None if skipped is None else []
        return self.embedder.embed(enumerate(several), read=read, unreadable=lost)

    def _read(self, image: ImageLike, aligned: bool) -> np.ndarray:
        return read_image(image) if aligned else self.crop(image)[0]

    def verify(
        self,
        first: ImageLike,
        second: ImageLike,
        *,
        far: float | None = None,
        threshold: float | None = None,
        prior: float = 0.5,
        aligned: bool = False,
    ) -> Verification:
        """Decide whether two images show one person.

        Args:
            first, second: images, as `embed` takes them.
            far: decide with the calibration's threshold for this FAR; by default its own default.
            threshold: decide at this similarity, in [-1, 1], instead.
            prior: the share of genuine pairs that is expected, in (0, 1), for the probability.
            aligned: the images are face crops by the template.

        Raises:
            NoFaceError: a photograph shows no face.
            UserError: an image cannot be read, there is no threshold for ``far``, or the
                calibration was fitted on whole photographs.
        """
        if self.calibration is not None and not aligned:
            self.calibration.check_for_crops()
        limit, far = _threshold(self.calibration, far, threshold)
        faces: tuple[Face | None, Face | None] = (None, None)
        crops: list[Any] = [first, second]
        if not aligned:
            found = [self.crop(image) for image in crops]
            for image, (_, face) in zip(crops, found, strict=True):
                if face.others:
                    name = image if isinstance(image, str | Path) else "an image"
                    warnings.warn(
                        f"{name} shows {face.others + 1} faces, of which the largest and most "
                        "central one is compared: crop the image if another one is meant",
                        stacklevel=2,
                    )
            crops, faces = [crop for crop, _ in found], (found[0][1], found[1][1])
        similarity = float(
            pair_scores(self.embed(crops, aligned=True), np.array([[0, 1]])).clip(-1, 1)[0]
        )
        llr = probability = None
        if self.calibration is not None:
            llr = float(self.calibration.llr(similarity))
            probability = float(self.calibration.probability(similarity, prior))
        return Verification(similarity, limit, far, llr, probability, prior, faces)

    # -- loading and saving --------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path | None = None,
        *,
        device: str | torch.device | None = None,
        flip: bool = True,
        batch_size: int = 64,
        threads: int | None = None,
        revision: str | None = None,
        **hub_options: Any,
    ) -> FaceEmbedder:
        """Load a model. Nothing in it is executed: weights are safetensors, the rest is JSON.

        Args:
            path_or_hub_id: a run folder, a model folder, its ``model.safetensors``, an exported
                ``.onnx`` file, or the id ``owner/name`` of a model on the Hugging Face hub. What
                exists on disk is a path, and so is anything below a folder that exists;
                ``hf://owner/name`` is always the hub. None: `box.MODEL`, which comes with the
                package.
            device: cpu, cuda, mps; by default the best there is.
            flip: add the embedding of the mirror image before normalising.
            batch_size: images in one forward pass.
            threads: that read images and find faces; by default one a core, at most 8.
            revision: branch, tag or commit on the hub.
            hub_options: of ``huggingface_hub.snapshot_download``: ``token``, ``cache_dir``,
                ``local_files_only`` and so on.

        Raises:
            UserError: there is no such path or model, or a file is damaged or foreign.
        """
        given = box.MODEL if path_or_hub_id is None else path_or_hub_id
        if given in (box.MODEL, str(box.MODEL)) and str(device) not in ("None", "auto", "cpu"):
            given = box.MODEL.parent  # torch's weights, for what ONNX Runtime does not compute on
        folder = hub.model_folder(given, revision=revision, **hub_options)
        embedder = Embedder.load(
            folder, device=device, flip=flip, batch_size=batch_size, threads=threads
        )
        facts = embedder.metadata.get("training") or card.facts_of_run(folder.parent.parent)
        if facts:
            embedder.network.metadata = {**embedder.metadata, "training": facts}
        calibration = calibrations.Calibration.load(folder, fingerprint=embedder.fingerprint)
        return cls(embedder, calibration)

    def save_pretrained(
        self, save_directory: str | Path, *, model_card_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Write a model folder in the hub's layout, which `from_pretrained` takes back.

        It holds ``model.safetensors``, ``config.json``, ``calibration.json`` if there is a
        calibration, and a model card, ``README.md``. A new folder appears when it is whole. In a
        folder that exists each file is replaced at once, and a card that was edited is kept.

        Args:
            save_directory: folder to create, or one that holds a model.
            model_card_kwargs: of `generate_model_card`: ``license``, ``license_name``,
                ``license_link``.

        Raises:
            UserError: the folder holds something else, or the network is an exported one.
        """
        network = self._torch_network()
        folder = Path(save_directory)
        if folder.exists():
            seen = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
            if bundle.WEIGHTS not in seen and any(not name.startswith(".") for name in seen):
                raise UserError(f"{folder} exists and holds no model: give a new folder")
            self._write(network, folder, model_card_kwargs or {})
        else:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with atomic_folder(folder) as temporary:
                self._write(network, temporary, model_card_kwargs or {})

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        model_card_kwargs: dict[str, Any] | None = None,
        **upload_options: Any,
    ) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face hub.

        Args:
            repo_id: ``owner/name``; created if it does not exist.
            private: whether a new repository is private.
            token: by default the one logged in with.
            model_card_kwargs: of `generate_model_card`.
            upload_options: of ``huggingface_hub.HfApi.upload_folder``: ``commit_message``,
                ``revision``, ``create_pr`` and so on.

        Returns:
            The commit's address.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model"
            self.save_pretrained(path, model_card_kwargs=model_card_kwargs)
            return hub.upload(path, repo_id, private=private, token=token, **upload_options)

    def _write(self, network: Backbone, folder: Path, card_options: dict[str, Any]) -> None:
        # First, so that a crash never leaves the calibration of one network beside another.
        (folder / calibrations.FILE).unlink(missing_ok=True)
        bundle.save(network, folder)
        if self.calibration is not None:
            self.calibration.save(folder)
        readme = folder / card.FILE
        if not readme.exists() or card.MARK in readme.read_text(encoding="utf-8", errors="replace"):
            atomic_write(readme, f"{self.generate_model_card(**card_options)}\n".encode())

    def generate_model_card(self, **options: Any) -> str:
        """The model card, Markdown: data, settings, figures, limits, intended use, licence.

        Args:
            options: ``license`` (the hub's identifier), ``license_name`` and ``license_link``;
                by default the licence is named as that of the training data's terms.
        """
        return card.model_card(self._torch_network(), self.fingerprint, self.calibration, **options)

    def _torch_network(self) -> Backbone:
        if isinstance(self.network, OnnxNetwork):
            raise UserError(
                "an exported network cannot be saved as a model: save the one that it was "
                "exported from"
            )
        return self.network


def _threshold(
    calibration: calibrations.Calibration | None, far: float | None, threshold: float | None
) -> tuple[float | None, float | None]:
    """The similarity to decide at and the FAR it was chosen for; None where nothing tells them."""
    if threshold is not None:
        if far is not None:
            raise UserError("give a threshold or a FAR, not both")
        if not -1 <= threshold <= 1:
            raise UserError(f"a threshold is a cosine in [-1, 1], not {threshold:g}")
        return threshold, None
    if calibration is not None:
        return calibration.threshold(far), calibration.far_default if far is None else far
    if far is not None:
        raise UserError("a FAR needs a calibration: run sphereface2 calibrate on the model first")
    return None, None
