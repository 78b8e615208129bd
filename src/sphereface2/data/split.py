"""Who is trained on and who is set aside."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sphereface2.data.source import Source
from sphereface2.errors import UserError


class Split(NamedTuple):
    """Image indices of a source, int64, ascending; no person is in two of them."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def default_validation_people(source: Source) -> int:
    """How many people to set aside where no number is given: a tenth of those with two images or
    more, from 2 to 400; 0 where there are fewer than four."""
    eligible = int(np.count_nonzero(np.bincount(np.asarray(source.labels)) >= 2))
    return min(400, max(2, eligible // 10)) if eligible >= 4 else 0


def split_people(
    source: Source,
    validation_people: int,
    seed: int,
    *,
    test_people: int = 0,
    max_images: int | None = None,
) -> Split:
    """Set whole people aside for validation and for test.

    They are drawn among those with two images or more (a person with one image makes no genuine
    pair). The draw depends on the source's labels, the numbers and ``seed`` alone; who is a
    validation person does not depend on ``test_people``.

    With ``max_images``, the images of people set aside that have more of them than that are in none
    of the three parts: the others' places, and the people trained on, stay as they are.

    Raises:
        UserError: more people asked for than there are, or nobody left to train on.
    """
    labels = np.asarray(source.labels)
    counts = np.bincount(labels, minlength=source.num_classes)
    eligible = np.flatnonzero(counts >= 2)
    present = int((counts > 0).sum())
    aside = validation_people + test_people
    if min(validation_people, test_people) < 0:
        raise UserError(
            "the numbers of held-out people must be 0 or more, got "
            f"{validation_people, test_people}"
        )
    if aside > len(eligible) or (aside and aside >= present):
        raise UserError(
            f"data.validation_people + data.test_people = {aside} must leave people to train on: "
            f"the set has {present} people, {len(eligible)} of them with two images or more"
        )
    rng = np.random.default_rng(seed)
    role = np.zeros(source.num_classes, np.int8)
    asked_for = {1: validation_people, 2: test_people}
    role[rng.choice(eligible, size=validation_people, replace=False)] = 1
    role[rng.choice(eligible[role[eligible] == 0], size=test_people, replace=False)] = 2
    if max_images is not None:
        role[(role > 0) & (counts > max_images)] = -1
        if any(asked and not (role == which).any() for which, asked in asked_for.items()):
            raise UserError(
                f"all held-out people have more than {max_images} images; raise "
                "data.held_out_max_images"
            )
    of_image = role[labels]
    return Split(*(np.flatnonzero(of_image == which) for which in range(3)))
