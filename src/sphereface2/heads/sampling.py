"""Which negatives a step visits when there are too many people to visit all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sphereface2.heads.base import renormalise_
from sphereface2.heads.blocks import Block, chosen_rows
from sphereface2.machine import using_faiss


def uniform(labels: Tensor, rows: int, share: float, chunk: int) -> Iterator[Block]:
    """The batch's own classes, and a random sample of the others weighted by its rarity.

    Own classes are always visited and weigh 1. Of all ``rows`` rows of W, k = ``share``·rows are
    drawn, each with probability k/rows: one of each of k equally long ranges, which begin at a
    random row and go round the end. Those that are nobody's own weigh rows/k. So the expectation
    of the loss and of its gradient is that of all rows. Time and memory are those of the sample,
    and nothing waits for a device: rows that came twice are skipped, not taken out.

    Args:
        labels: (B,) int64 rows of the local W; those outside it never match.
    """
    if not rows:
        return
    beyond = labels.new_full((), rows)  # sorts last
    own = torch.where((labels >= 0) & (labels < rows), labels, beyond).sort().values
    again = own == torch.cat([own.new_full((1,), -1), own[:-1]])
    places = torch.searchsorted(own, labels).where((labels >= 0) & (labels < rows), -1)
    yield from chosen_rows(places, own.clamp_max(rows - 1), chunk, skip=again | (own == beyond))
    count = max(1, round(share * rows))
    length = rows // count
    start = torch.randint(rows, (1,), device=labels.device)
    within = torch.randint(length, (count,), device=labels.device)
    drawn = (torch.arange(0, count * length, length, device=labels.device) + within + start) % rows
    nearest = own[torch.searchsorted(own, drawn).clamp_max_(len(own) - 1)]
    nowhere = torch.full_like(labels, -1)
    yield from chosen_rows(nowhere, drawn, chunk, rows / count, skip=nearest == drawn)


class HardNegatives:
    """The batch's own classes and the prototypes nearest to its embeddings.

    The neighbours come from an approximate index over W (faiss, inverted lists) that is rebuilt
    every ``rebuild_every`` steps, so that it knows the prototypes as they were. The loss is biased
    by design: easy negatives are left out and nothing makes up for them, which lowers the loss and
    moves the balance that the bias settles at. The index is no part of a checkpoint: a resumed run
    builds it anew and therefore repeats an uninterrupted one only until then.
    """

    def __init__(self, share: float, rebuild_every: int = 100) -> None:
        self.share, self.rebuild_every = share, rebuild_every
        self.index: Any = None
        self.age = 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"index": None}  # a copy builds its own

    def blocks(self, x: Tensor, labels: Tensor, weight: Tensor, chunk: int) -> Iterator[Block]:
        """Blocks for unit embeddings ``x`` (B, d) over ``weight`` (c, d)."""
        if not len(weight):
            return
        if self.index is None or self.age >= self.rebuild_every:
            self._build(weight)
        self.age += 1
        each = max(1, round(self.share * len(weight) / len(x)))
        probes = x.detach().float().cpu().numpy()
        with using_faiss():
            _, found = self.index.search(probes, min(each, len(weight)))
        near = torch.from_numpy(found).flatten()
        present = labels[(labels >= 0) & (labels < len(weight))]
        rows = torch.cat([near[near >= 0].to(labels.device), present]).unique()
        places = torch.searchsorted(rows, labels).clamp_max_(len(rows) - 1)
        yield from chosen_rows(places.where(rows[places] == labels, -1), rows, chunk)

    def _build(self, weight: Tensor) -> None:
        rows = renormalise_(weight.detach().float().clone()).cpu().numpy()
        lists = max(1, int(len(rows) ** 0.5))
        dim = rows.shape[1]
        with using_faiss() as faiss:
            quantizer = faiss.IndexFlatIP(dim)
            self.index = faiss.IndexIVFFlat(quantizer, dim, lists, faiss.METRIC_INNER_PRODUCT)
            # k-means on a sample is what faiss advises; few points a list is fine for this purpose.
            self.index.cp.min_points_per_centroid = 1
            self.index.train(rows)
            self.index.add(rows)
        self.index.nprobe = max(1, lists // 16)
        self.age = 0
