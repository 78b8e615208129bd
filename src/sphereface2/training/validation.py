"""Periodic validation: held-out people (all pairs) and verification sets, shared by all ranks."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from sphereface2.backbones.base import Backbone
from sphereface2.data.hardening import Hardening, hardenings
from sphereface2.data.pairs import PairSet
from sphereface2.data.source import Source
from sphereface2.embedder import Embedder
from sphereface2.errors import UserError
from sphereface2.evaluation.all_pairs import evaluate_all_pairs
from sphereface2.evaluation.results import far_key
from sphereface2.evaluation.verification import kfold_accuracy, pair_scores
from sphereface2.images import read_image
from sphereface2.training.config import ValidationConfig
from sphereface2.training.distributed import World


class Validation:
    """Figures of a network on people it was not trained on; every rank calls it.

    The first figure, TAR at the smallest of ``fars`` that the held-out people can resolve but not
    below 1e-3, is the one by which the best checkpoint is chosen. Without held-out people it is
    the first verification set's accuracy, which then is no longer an independent test of it.
    """

    def __init__(
        self,
        config: ValidationConfig,
        world: World,
        source: Source,
        held_out: np.ndarray,
        pairs: Sequence[PairSet],
    ) -> None:
        self.config, self.world = config, world
        self.source, self.held_out, self.pairs = source, held_out, pairs

    def __call__(
        self, network: Backbone, stopping: Callable[[], bool]
    ) -> tuple[dict[str, float], list[str]] | None:
        """Figures in [0, 1] by name and the names of unreadable images, the same on every rank.

        Args:
            network: to evaluate.
            stopping: asked after each batch whether to stop.

        Returns:
            None if it is to stop on any rank.

        Raises:
            UserError: alike on all ranks: an image of a verification set is unreadable.
        """
        figures: dict[str, float] = {}
        unreadable: list[str] = []
        try:
            with Embedder(network, flip=self.config.flip, device=self.world.device) as embedder:
                if len(self.held_out):
                    for harden in (None, *hardenings(self.config.conditions)):
                        found, unreadable = self._held_out(embedder, harden, stopping)
                        figures |= found
                for pair_set in self.pairs:
                    images = pair_set.images
                    embeddings, _ = embed_together(
                        embedder,
                        self.world,
                        len(images),
                        partial(_read, images),
                        name=pair_set.image_name,
                        stopping=stopping,
                    )
                    scores = pair_scores(embeddings, pair_set.pairs)
                    folds = kfold_accuracy(scores, pair_set.same, pair_set.folds)
                    figures[f"{pair_set.name} accuracy"] = folds.accuracy
        except _StopError:
            return None
        return figures, unreadable

    def _held_out(
        self, embedder: Embedder, harden: Hardening | None, stopping: Callable[[], bool]
    ) -> tuple[dict[str, float], list[str]]:
        """Figures of the held-out people under a condition; the names of unreadable images."""

        def read(position: int) -> np.ndarray:
            index = int(self.held_out[position])
            image = read_image(self.source.read(index))
            return image if harden is None else harden(image, index)

        labels = self.source.labels[self.held_out]
        embeddings, readable = embed_together(
            embedder, self.world, len(labels), read, stopping=stopping
        )
        lost = np.flatnonzero(~readable)
        found = evaluate_all_pairs(embeddings[readable], labels[readable], self.config.fars)
        resolved = {p.at: p.value for p in found.tar if p.value is not None}
        what = "held-out" if harden is None else f"held-out {harden.name}"
        figures = {
            f"{what} TAR@{far:g}": resolved[far]
            for far in sorted(resolved, key=lambda far: (far < 1e-3, far))
        }
        return figures, [self.source.name(int(self.held_out[i])) for i in lost]


def embed_together(
    embedder: Embedder,
    world: World,
    count: int,
    read: Callable[[int], np.ndarray],
    *,
    name: Callable[[int], str] | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> tuple[np.ndarray, np.ndarray]:
    """Embed images on all ranks, each its share: float32 (count, d), bool (count,): readable ones.

    Every rank receives all. With ``name`` an unreadable image is an error, alike on all ranks.
    """
    mine = range(world.rank, count, world.size)
    lost: list[int] = []
    part: np.ndarray | None = None
    failure: str | None = None

    def go_on(_count: int) -> None:
        if stopping():
            raise _StopError

    try:
        part = embedder.embed(
            mine,
            read=read,
            name=(lambda k: name(mine[k])) if name else None,
            unreadable=None if name else lost,
            progress=go_on,
        )
    except _StopError:
        pass
    except UserError as error:
        failure = str(error)
    shares = world.gather((part, lost, failure))
    if failures := [failure for *_, failure in shares if failure is not None]:
        raise UserError(failures[0])
    if any(part is None for part, *_ in shares):
        raise _StopError
    embeddings = np.zeros((count, embedder.embedding_dim), np.float32)
    readable = np.ones(count, bool)
    for rank, (rows, lost, _) in enumerate(shares):
        readable[rank :: world.size][lost] = False
        theirs = np.arange(rank, count, world.size)
        embeddings[theirs[readable[theirs]]] = rows
    return embeddings, readable


def _read(images: Sequence[bytes | np.ndarray], index: int) -> np.ndarray:
    return read_image(images[index])


def shown(figure: str) -> str:
    """The name of a figure for people, its FAR as in all tables.

    Examples:
        >>> shown("held-out yaw TAR@0.001"), shown("lfw accuracy")
        ('held-out yaw TAR@1e-3', 'lfw accuracy')
    """
    found = re.fullmatch(r"(held-out (?:\w+ )?TAR@)([\d.e-]+)", figure)  # no verification set's
    return found[1] + far_key(float(found[2])) if found else figure


class _StopError(Exception):
    """The caller of a validation does not want to wait for its end."""
