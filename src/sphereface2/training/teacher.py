"""Distillation: the embeddings of a run follow those of a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sphereface2 import console
from sphereface2.data import embedding_table
from sphereface2.data.embedding_table import EmbeddingTable
from sphereface2.data.source import Source
from sphereface2.embedder import Embedder
from sphereface2.errors import UserError
from sphereface2.files import digest
from sphereface2.heads import Head
from sphereface2.heads.base import unit_rows
from sphereface2.heads.sharding import local
from sphereface2.images import read_image
from sphereface2.training.config import RunConfig, TeacherConfig
from sphereface2.training.distributed import World
from sphereface2.training.validation import embed_together

FILE = "teacher.npz"
"""In a run's folder, the table that a model given as teacher has made."""


class Teacher(nn.Module):
    """Loss of a batch against a teacher: the mean of 1 - cos(Wx + b, t).

    x are the batch's embeddings (B, d), t the teacher's (B, k) of the same images, both of length
    1. The map W, b is learned; where d = k it is left out and x itself follows. An image of which
    the teacher knows nothing counts nothing.

    Args:
        targets: float32 (n, k), the teacher's embedding of each training image, of length 1 or 0.
        labels: int64 (n,), the class of each.
        embedding_dim: d.
        config: the section of settings.
        seed: of the map's start.

    Attributes:
        fingerprint: sha256 (hex) of ``targets``.

    Source: Hinton et al., "Distilling the knowledge in a neural network", 2015, with the embedding
    in the place of the logits.

    Example:
        >>> import numpy as np
        >>> from sphereface2.training.config import TeacherConfig
        >>> teacher = Teacher(np.eye(2, dtype=np.float32), np.arange(2), 2, TeacherConfig())
        >>> embeddings = torch.tensor([[0.0, 3.0], [0.0, 1.0]])
        >>> float(teacher(embeddings, teacher.of(torch.tensor([0, 1]))))
        0.5
    """

    def __init__(
        self,
        targets: np.ndarray,
        labels: np.ndarray,
        embedding_dim: int,
        config: TeacherConfig,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        self.fingerprint = embedding_table.fingerprint(targets)
        self._targets, self._labels = torch.from_numpy(targets), torch.from_numpy(labels)
        width = targets.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.map = nn.Identity() if width == embedding_dim else nn.Linear(embedding_dim, width)

    def of(self, positions: Tensor) -> Tensor:
        """The teacher's embeddings (B, k) of the training images at ``positions``, int64 (B,)."""
        return self._targets[positions]

    def keep_on(self, device: torch.device) -> None:
        """Keep the teacher's embeddings, n × k × 4 bytes, where the positions will be."""
        self._targets = self._targets.to(device)

    def forward(self, embeddings: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(embeddings.device.type, enabled=False):
            cosines = (unit_rows(self.map(embeddings.float())) * targets).sum(1)
            return (targets.square().sum(1) - cosines).mean()

    @torch.no_grad()
    def place_prototypes(self, head: Head) -> None:
        """Put the prototypes of ``head`` at the class means, of length 1, if that is wanted.

        Raises:
            UserError: prototypes have another dimension.
        """
        if self.config.prototypes == "random":
            return
        width = self._targets.shape[1]
        if width != head.embedding_dim:
            raise UserError(
                f"teacher.prototypes must be random, as the teacher's embeddings have {width} "
                f"dimensions and the prototypes {head.embedding_dim}; or set "
                f"backbone.embedding_dim to {width}"
            )
        means = torch.zeros(head.num_classes, width)
        means.index_add_(0, self._labels, self._targets)
        rows = unit_rows(means)[head.shard.start : head.shard.stop]
        local(head.weight.data).copy_(rows)
        head.weight.requires_grad_(self.config.prototypes == "start")


def open_teacher(
    settings: RunConfig,
    run: Path,
    place: World,
    source: Source,
    indices: np.ndarray,
    labels: np.ndarray,
) -> Teacher | None:
    """The teacher that the settings name; every rank calls it.

    A model embeds the training images once, all ranks together, and leaves the table in the run.

    Args:
        settings: of the run.
        run: its folder.
        place: of this process.
        source, indices: the training images.
        labels: int64 (n,), their classes.

    Raises:
        UserError: there is no such table or model, or the table does not fit the set.
    """
    config = settings.teacher
    if config.path is None:
        if config != TeacherConfig():
            raise UserError("the other settings of teacher need teacher.path: give --teacher")
        return None
    path = Path(config.path)
    if path.suffix in embedding_table.SUFFIXES:
        table = embedding_table.read(path)
    else:
        table = _table_of_model(path, run / FILE, settings, place, source, indices)
    rows, missing = table.rows(source, indices, settings.data.max_unreadable)
    if missing and place.is_main:
        names = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        console.show(f"{table.path} has no embedding of {len(missing)} images: {names}")
    dim = settings.backbone.get("embedding_dim", 512)
    return Teacher(rows, labels, dim, config, settings.seed)


def _table_of_model(
    path: Path,
    file: Path,
    settings: RunConfig,
    place: World,
    source: Source,
    indices: np.ndarray,
) -> EmbeddingTable:
    with Embedder.load(
        path, device=place.device, batch_size=settings.training.batch_size or 128
    ) as model:
        about: dict[str, Any] = {
            "input": source.fingerprint(),
            "model": model.fingerprint,
            "images": digest(np.asarray(indices, np.int64)),  # unreadable ones have no row
        }

        if not place.on_main(
            lambda: file.exists() and embedding_table.read(file).metadata == about
        ):
            if place.is_main:
                console.show(f"the teacher {path} embeds {len(indices):,} images")
            embeddings, readable = embed_together(
                model,
                place,
                len(indices),
                lambda i: read_image(source.read(int(indices[i]))),
            )

            def write() -> None:
                names = [source.name(int(index)) for index in indices[readable]]
                rows = embeddings[readable].astype(np.float16)
                file.parent.mkdir(parents=True, exist_ok=True)  # the run's, which starts later
                embedding_table.write_npz(file, names, rows, about)

            place.on_main(write)
    return embedding_table.read(file)
