"""From a set's embeddings and measures to findings."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from sphereface2.evaluation.label_errors import AlikeLabels, LabelScores, alike_labels, score_labels
from sphereface2.files import printable
from sphereface2.recognition.audit.duplicates import Duplicate, find_duplicates
from sphereface2.recognition.audit.faces import Faces
from sphereface2.recognition.audit.findings import Finding, firsts
from sphereface2.recognition.quality import MIN_SHARPNESS

Steps = Callable[[str], Callable[[float], None]]
"""Adds a bar of this title and returns what takes the share done since the last call."""
_DARK, _BRIGHT, _FLAT = 35.0, 225.0, 12.0  # mean and standard deviation of grey values


def judge(
    faces: Faces, *, wrong: float, false_pairs: float, move: float | None, steps: Steps
) -> tuple[list[Finding], float | None]:
    """Find what is wrong with a set.

    Args:
        wrong: probability from which an image is taken for one of another person.
        false_pairs: share of false ones that is accepted among the pairs of labels of one person.
        move: probability from which an image is moved to another label; None: none is.

    Returns:
        What was found, and the estimated share of wrong labels, None of fewer than two labels.
    """
    duplicates = find_duplicates(
        faces.rows, faces.thumbnails, faces.pixels, progress=steps("duplicates")
    )
    people, labels = np.unique(faces.labels, return_inverse=True)
    findings = list(_left_out(faces))
    scores = None
    merged: set[tuple[int, int]] = set()
    if len(people) > 1:
        # A photograph and its copy vouch for each other, whoever they show.
        copies = np.zeros(len(labels), bool)
        for one in duplicates:
            copies[one.second] |= labels[one.first] == labels[one.second]
        scores = score_labels(faces.rows, labels, copies=copies, progress=steps("labels"))
        alike = alike_labels(
            faces.rows, labels, 1 - scores.wrong, progress=steps("pairs of labels")
        )
        findings += _wrong(faces, people, scores, wrong, move)
        same = list(_same_people(faces, people, labels, scores, alike, duplicates, false_pairs))
        merged = {(f.index, f.other) for f in same if f.action == "merge"}
        findings += same
    findings += _duplicates(faces, duplicates, scores, merged)
    findings += _quality(faces)
    return findings, None if scores is None else scores.share


def _name(faces: Faces, row: int | np.integer) -> str:
    return printable(faces.source.name(int(faces.index[row])))


def _image(faces: Faces, row: int | np.integer) -> tuple[int, str, str]:
    """An image as a `Finding` has it: index, name and label."""
    return int(faces.index[row]), _name(faces, row), faces.whose(row)


def _left_out(faces: Faces) -> Iterator[Finding]:
    labels = faces.source.labels
    for index, name, reason in faces.left_out:
        label = faces.person(int(labels[index])) if len(labels) else ""
        yield Finding("unreadable", index, name, label, -1, reason, 0.0, "remove")


def _wrong(
    faces: Faces, people: np.ndarray, scores: LabelScores, wrong: float, move: float | None
) -> Iterator[Finding]:
    for row in sorted(np.flatnonzero(scores.wrong >= wrong), key=lambda i: -scores.wrong[i]):
        other, about = -1, "looks like nobody else here"
        if scores.moves[row] >= scores.wrong[row] / 2:
            other = int(people[scores.nearest[row]])
            about = faces.person(other)
        moves = move is not None and other >= 0 and scores.moves[row] >= move
        action = "move" if moves else "remove"
        score = float(scores.wrong[row])
        yield Finding("wrong label", *_image(faces, row), other, about, score, action)


def _same_people(
    faces: Faces,
    people: np.ndarray,
    labels: np.ndarray,
    scores: LabelScores,
    alike: AlikeLabels,
    duplicates: list[Duplicate],
    false_pairs: float,
) -> Iterator[Finding]:
    """Labels that are alike beyond what lookalikes explain.

    A photograph in common alone proves nothing: most often one of its copies lies with the wrong
    label. It settles the matter where the labels are alike, too.
    """
    shared: dict[tuple[int, int], int] = {}
    for found in duplicates:
        a, b = sorted((int(labels[found.first]), int(labels[found.second])))
        if a != b and max(scores.wrong[[found.first, found.second]]) < 0.5:
            shared[a, b] = shared.get((a, b), 0) + 1
    named = alike.rate <= false_pairs
    for (a, b), score, rate in zip(
        alike.pairs[named].tolist(), alike.scores[named], alike.rate[named], strict=True
    ):
        first, second = int(people[a]), int(people[b])
        number = shared.get((a, b), 0)
        about = f"probably one person: of 100 such pairs about {100 * rate:.0f} are not"
        if number:
            about = f"photographs in common: {number}"
        yield Finding(
            "same person",
            first,
            "",
            faces.person(first),
            second,
            f"{faces.person(second)}, {about}",
            float(score),
            "merge" if number else "keep",
        )


def _duplicates(
    faces: Faces,
    duplicates: list[Duplicate],
    scores: LabelScores | None,
    merged: set[tuple[int, int]],
) -> Iterator[Finding]:
    """Of the copies of a photograph one stays, and each other one is named beside it.

    It is of the label that they fit best, the first there.
    """
    labels = faces.labels
    score: dict[int, float] = {}
    for found in duplicates:
        for row in (found.first, found.second):
            score[row] = max(score.get(row, 0), found.score)
    photograph = firsts(len(labels), [(found.first, found.second) for found in duplicates])
    person = firsts(int(labels.max()) + 1, list(merged))[labels]
    groups: dict[int, list[int]] = {}
    for row in sorted(score):
        groups.setdefault(photograph[row], []).append(row)
    for rows in groups.values():
        # A copy beside its original fits by that alone: the first of a label speaks for all of it.
        first: dict[int, int] = {}
        for row in rows:
            first.setdefault(person[row], row)
        keep = max(first.values(), key=lambda row: (_fit(scores, row), -row))
        for drop in rows:
            if drop == keep:
                continue
            kind, about = "duplicate", _name(faces, keep)
            if labels[keep] != labels[drop]:
                kind, about = "duplicate across labels", f"{about} of {faces.whose(keep)}"
            other = int(faces.index[keep])
            yield Finding(kind, *_image(faces, drop), other, about, score[drop], "remove")


def _fit(scores: LabelScores | None, row: int) -> float:
    """How well an image fits its label; that of one alone is unknown, but not taken for wrong."""
    if scores is None:
        return 0.0
    return -2.0 if scores.wrong[row] >= 0.5 else float(np.nan_to_num(scores.own[row], nan=-1.0))


def _quality(faces: Faces) -> Iterator[Finding]:
    for what, values, bad in (
        ("dark", faces.brightness, faces.brightness < _DARK),
        ("bright", faces.brightness, faces.brightness > _BRIGHT),
        ("without contrast", faces.contrast, faces.contrast < _FLAT),
        ("blurred", faces.sharpness, faces.sharpness < MIN_SHARPNESS),
    ):
        for row in np.flatnonzero(bad):
            yield Finding("quality", *_image(faces, row), -1, what, float(values[row]), "keep")
