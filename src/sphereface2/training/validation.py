"""Periodic validation: held-out people (all pairs) and verification sets, shared by all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import nn

from sphereface2.data.sources import Source
from sphereface2.data.verification import PairSet
from sphereface2.evaluation.all_pairs import all_pairs_tar
from sphereface2.evaluation.embedding import embed
from sphereface2.evaluation.evaluate import score_pairs
from sphereface2.evaluation.verification import pair_scores
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

    def __call__(self, network: nn.Module) -> dict[str, float]:
        """Figures in [0, 1] by name, the same on every rank."""
        figures: dict[str, float] = {}
        if len(self.held_out):
            embeddings = self._embed(
                network,
                len(self.held_out),
                lambda i: self.source.read(int(self.held_out[i])),
                lambda i: self.source.name(int(self.held_out[i])),
            )
            labels = self.source.labels[self.held_out]
            tars = all_pairs_tar(embeddings, labels, self.config.fars).tars
            resolved = {t.far: t.tar for t in tars if t.tar is not None}
            for far in sorted(resolved, key=lambda far: (far < 1e-3, far)):
                figures[f"held-out TAR@{far:g}"] = resolved[far]
        for pair_set in self.pairs:
            embeddings = self._embed(
                network,
                len(pair_set.images),
                pair_set.images.__getitem__,
                pair_set.image_name,
            )
            scores = pair_scores(embeddings, pair_set.pairs)
            figures[f"{pair_set.name} accuracy"] = score_pairs(scores, pair_set)["accuracy"]
        return figures

    def _embed(
        self,
        network: nn.Module,
        count: int,
        read: Callable[[int], bytes | np.ndarray],
        name: Callable[[int], str],
    ) -> np.ndarray:
        """float32 (count, d); each rank embeds its share and receives the others'."""
        mine = range(self.world.rank, count, self.world.size)
        part = embed(
            network,
            (read(i) for i in mine),
            flip=self.config.flip,
            device=self.world.device,
            name=lambda k: name(mine[k]),
        )
        embeddings = np.empty((count, part.shape[1]), np.float32)
        for rank, rows in enumerate(self.world.gather(part)):
            embeddings[rank :: self.world.size] = rows
        return embeddings
