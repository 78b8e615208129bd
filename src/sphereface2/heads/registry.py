"""Heads by name."""

from __future__ import annotations

from typing import Any, get_type_hints

from sphereface2.heads.base import Head, Scaling
from sphereface2.registry import Registry, keyword_defaults

_HEADS: Registry[type[Head]] = Registry("head")
register = _HEADS.register
available = _HEADS.available


def parameters(name: str) -> list[str]:
    """Keywords that `build` takes for a head besides embedding_dim and num_classes.

    Raises:
        UserError: unknown name.

    Example:
        >>> parameters("cosface")
        ['s', 'm', 'streaming', 'chunk_size']
    """
    head = _HEADS.find(name)
    scaling = [keyword for keyword in get_type_hints(Scaling) if keyword in head.scaling]
    return [*keyword_defaults(head), *scaling]


def defaults(name: str) -> dict[str, Any]:
    """Values of a head's own parameters (those of `Scaling` aside) where they are left out.

    Raises:
        UserError: unknown name.

    Example:
        >>> defaults("cosface")
        {'s': 64.0, 'm': 0.35}
    """
    return keyword_defaults(_HEADS.find(name))


def check_settings(name: str, **given: Any) -> None:
    """Refuse what a configuration cannot give a head, which says ``sharded`` for a process group.

    Raises:
        UserError: unknown name or option (the message suggests the nearest).
    """
    known = ["sharded" if key == "process_group" else key for key in parameters(name)]
    _HEADS.check_options(name, given, known)


def build(name: str, embedding_dim: int, num_classes: int, **kwargs: Any) -> Head:
    """Build a head by its name.

    Args:
        name: one of `available()`.
        embedding_dim: d, the length of an embedding.
        num_classes: C, the number of people.
        kwargs: the head's own hyper-parameters, those of `parameters(name)`.

    Raises:
        UserError: unknown name or keyword (the message suggests the nearest), or a value out of
            range.

    Example:
        >>> build("cosface", embedding_dim=512, num_classes=1000, m=0.4)
        CosFace(embedding_dim=512, num_classes=1000)
    """
    head = _HEADS.find(name)
    _HEADS.check_options(name, kwargs, parameters(name))
    return head(embedding_dim, num_classes, **kwargs)
