"""Which negatives a step visits when there are too many people to visit all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sphereface2.extras import require
from sphereface2.heads.base import renormalise_
from sphereface2.heads.blocks import Block, chosen_rows


def uniform(labels: Tensor, rows: int, share: float, chunk: int) -> Iterator[Block]:
    """The batch's own classes, and a uniform sample of the others weighted by its rarity.

    Of the ``rows`` rows of W about ``share`` are visited, at least one besides the own classes. The
    expectation of the loss and of its gradient is that of all rows: own classes are always there
    and weigh 1, each other is drawn with probability k/n, without replacement, and weighs n/k.

    How many own classes there are decides how many others are drawn: with labels on a GPU a plan
    waits for it once.

    Args:
        labels: (B,) int64 rows of the local W; those outside it never match.
    """
    present = _present(labels, rows)
    others = rows - len(present)
    drawn = min(others, max(1, round(share * rows) - len(present)))
    if len(present):
        yield from chosen_rows(labels, present.to(labels.device), chunk)
    if drawn:
        chosen = _distinct(drawn, others)
        # The k-th row that is not present: present[i] - i rows below present[i] are not.
        gaps = present - torch.arange(len(present))
        chosen += torch.searchsorted(gaps, chosen, right=True)
        yield from chosen_rows(labels, chosen.to(labels.device), chunk, others / drawn)


def _present(labels: Tensor, rows: int) -> Tensor:
    """Ascending rows below ``rows`` that are some sample's own class, each once; on the CPU."""
    labels = labels.cpu()
    return labels[(labels >= 0) & (labels < rows)].unique()


def _distinct(count: int, below: int) -> Tensor:
    """``count`` distinct numbers below ``below``, ascending, every set as likely as any other."""
    if 4 * count > below:
        return torch.randperm(below)[:count].sort().values
    # Drawing again what came twice treats all numbers alike, and costs nothing of size ``below``.
    chosen = torch.randint(below, (count,)).unique()
    while len(chosen) < count:
        chosen = torch.cat([chosen, torch.randint(below, (count - len(chosen),))]).unique()
    return chosen


class HardNegatives:
    """The batch's own classes and the prototypes nearest to its embeddings.

    The neighbours come from an approximate index over W (faiss, inverted lists) that is rebuilt
    every ``rebuild_every`` steps, so that it knows the prototypes as they were. The loss is biased
    by design: easy negatives are left out and nothing makes up for them, which lowers the loss and
    moves the balance that the bias settles at. The index is no part of a checkpoint: a resumed run
    builds it anew and therefore repeats an uninterrupted one only until then.
    """

    def __init__(self, share: float, rebuild_every: int = 100) -> None:
        require("hard negatives", "faiss")
        import faiss

        self.faiss: Any = faiss
        self.share, self.rebuild_every = share, rebuild_every
        self.index: Any = None
        self.age = 0

    def blocks(self, x: Tensor, labels: Tensor, weight: Tensor, chunk: int) -> Iterator[Block]:
        """Blocks for unit embeddings ``x`` (B, d) over ``weight`` (c, d)."""
        if not len(weight):
            return
        if self.index is None or self.age >= self.rebuild_every:
            self._build(weight)
        self.age += 1
        each = max(1, round(self.share * len(weight) / len(x)))
        _, found = self.index.search(x.detach().float().cpu().numpy(), min(each, len(weight)))
        near = torch.from_numpy(found).flatten()
        rows = torch.cat([near[near >= 0], _present(labels, len(weight))]).unique()
        yield from chosen_rows(labels, rows.to(labels.device), chunk)

    def _build(self, weight: Tensor) -> None:
        rows = renormalise_(weight.detach().float().clone()).cpu().numpy()
        lists = max(1, int(len(rows) ** 0.5))
        quantizer = self.faiss.IndexFlatIP(rows.shape[1])
        self.index = self.faiss.IndexIVFFlat(
            quantizer, rows.shape[1], lists, self.faiss.METRIC_INNER_PRODUCT
        )
        # k-means on a sample is what faiss advises; few points a list is fine for this purpose.
        self.index.cp.min_points_per_centroid = 1
        self.index.train(rows)
        self.index.add(rows)
        self.index.nprobe = max(1, lists // 16)
        self.age = 0
