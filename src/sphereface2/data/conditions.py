"""Conditions put on training data for a study: fewer people or images, wrong labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from sphereface2.errors import UserError

_Seed = Annotated[int, Field(ge=0, lt=2**32)]


@dataclass
class Subset:
    """Which people and how many of their images to train on; all by default."""

    people: Annotated[int, Field(ge=2)] | None = None
    """People kept, drawn at random; ``null``: all."""
    images_per_person: Annotated[int, Field(ge=1)] | None = None
    """The most images kept of a person, drawn at random; ``null``: all."""
    tail: Annotated[float, Field(ge=0)] = 0.0
    """A long tail: of the k-th person, k = 0, 1, …, by number of images, at most
    max(1, round(most · (k + 1)^-tail)) images are kept, where ``most`` is ``images_per_person``,
    or the largest number there is. 0: no tail."""
    seed: _Seed = 0
    """Of the choice; the same people and images for every ``seed`` of the run."""


@dataclass
class LabelNoise:
    """Training labels replaced by wrong ones; never those of held-out people."""

    share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the training images, in [0, 1)."""
    kind: Literal["uniform", "pairs"] = "uniform"
    """``uniform``: another person, each alike. ``pairs``: people are paired off at random, and a
    wrong label is always the partner's, as when two people are mixed up."""
    seed: _Seed = 0
    """Of the choice of wrong labels."""


def choose(labels: np.ndarray, subset: Subset) -> np.ndarray:
    """Ascending int64 positions in ``labels`` (n,) that ``subset`` keeps.

    With one seed the choices are nested: the people kept by a smaller ``people`` are among those
    kept by a larger one, and likewise the images of a person.

    Raises:
        UserError: more people asked for than there are.
    """
    if subset == Subset(seed=subset.seed):
        return np.arange(len(labels))
    people, of = np.unique(labels, return_inverse=True)
    most = subset.images_per_person
    if subset.people is not None and subset.people > len(people):
        raise UserError(
            f"data.subset.people must be ≤ {len(people)}, the people there are to train on, "
            f"got {subset.people}"
        )
    rng = np.random.default_rng(subset.seed)
    draw = rng.permutation(len(people))  # place -> person
    shuffled = rng.permutation(len(labels))
    sizes = np.bincount(of)
    kept = draw[: subset.people]
    limit = np.zeros(len(people), np.int64)
    # Those with most images lead the tail; a stable sort leaves equals in their random order.
    ranked = kept[np.argsort(-sizes[kept], kind="stable")]
    head = int(sizes.max()) if most is None else most
    if subset.tail:
        falling = head * np.arange(1, len(ranked) + 1, dtype=np.float64) ** -subset.tail
        limit[ranked] = np.maximum(1, np.rint(falling).astype(np.int64))
    else:
        limit[ranked] = head
    by_person = shuffled[np.argsort(of[shuffled], kind="stable")]
    place = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(by_person[place < np.repeat(limit, sizes)])


def corrupt(classes: np.ndarray, noise: LabelNoise) -> np.ndarray:
    """``classes`` int64 (n,), in [0, C), with ``round(share · n)`` of them replaced by wrong ones.

    With ``pairs`` and an odd C one person has no partner and keeps all labels.

    Raises:
        UserError: noise among fewer than two people, or more than those with a partner have images.
    """
    if not noise.share:
        return classes
    count = int(classes.max()) + 1 if len(classes) else 0
    if count < 2:
        raise UserError("data.label_noise needs at least two people to train on")
    rng = np.random.default_rng(noise.seed)
    partner = np.arange(count)
    if noise.kind == "pairs":
        order = rng.permutation(count)[: count // 2 * 2].reshape(-1, 2)
        partner[order[:, 0]], partner[order[:, 1]] = order[:, 1], order[:, 0]
        candidates = np.flatnonzero(partner[classes] != classes)
    else:
        candidates = np.arange(len(classes))
    wanted = round(noise.share * len(classes))
    if wanted > len(candidates):
        raise UserError(
            f"data.label_noise.share = {noise.share:g} asks for {wanted:,} wrong labels, but only "
            f"{len(candidates):,} images show people with a partner: give a smaller share"
        )
    wrong = rng.permutation(candidates)[:wanted]
    noisy = classes.copy()
    if noise.kind == "pairs":
        noisy[wrong] = partner[classes[wrong]]
    else:
        noisy[wrong] = (classes[wrong] + rng.integers(1, count, size=len(wrong))) % count
    return noisy
