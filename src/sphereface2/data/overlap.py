"""What sets have in common: images, byte for byte, and people, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePath

from sphereface2.data.pairs import Image, PairSet, content
from sphereface2.data.source import Source
from sphereface2.errors import UserError
from sphereface2.files import digest, one_name


def images_of(
    one: PairSet | Source,
) -> tuple[Callable[[int], Image], Sequence[int]]:
    """What gives image ``i`` of a set, encoded or decoded, and the indices of all."""
    if isinstance(one, PairSet):
        return one.images.__getitem__, range(len(one.images))
    return one.read, range(len(one))


def image_digests(
    one: PairSet | Source, *, progress: Callable[[float], None] | None = None
) -> list[str]:
    """sha256 of each image's bytes, encoded or decoded; "" of one that cannot be read.

    Args:
        one: the set.
        progress: called after each image.
    """
    read, indices = images_of(one)
    found = []
    for index in indices:
        try:
            found.append(digest(content(read(index))))
        except (OSError, UserError):
            found.append("")
        if progress is not None:
            progress(1)
    return found


def comparable(name: str) -> str | None:
    """A person's name as it is compared between sets; None for a number, which each set gives anew.

    Examples:
        >>> comparable("lfw/Zoë_Saldana") == comparable("zoë saldana"), comparable("n000012")
        (True, None)
    """
    bare = one_name(PurePath(name).name).replace("_", " ").casefold()
    return None if any(map(str.isdigit, bare)) or not bare else bare


def comparable_names(names: Iterable[str] | None) -> set[str]:
    """Those of ``names`` that can be compared between sets."""
    return {bare for name in names or () if (bare := comparable(name)) is not None}
