"""Backbones by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from sphereface2.backbones import sfnet
from sphereface2.backbones.base import Backbone
from sphereface2.backbones.preprocessing import Preprocessing, as_size
from sphereface2.errors import UserError

_BUILDERS: dict[str, Callable[..., Backbone]] = {
    **{name: partial(sfnet.SFNet, units) for name, units in sfnet.UNITS.items()},
}


def available() -> list[str]:
    """Names of the built-in backbones. Any timm model works too, as ``timm/<its name>``."""
    return list(_BUILDERS)


def nearest(name: str, candidates: Iterable[str]) -> str:
    """' (did you mean …?)' with the closest candidate, or an empty string."""
    match = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""


def create(
    name: str,
    *,
    embedding_dim: int = 512,
    input_size: int | Sequence[int] = 112,
    mean: Sequence[float] = (127.5, 127.5, 127.5),
    std: Sequence[float] = (128.0, 128.0, 128.0),
    colour_order: str = "RGB",
    **kwargs: Any,
) -> Backbone:
    """Build an untrained backbone with its preprocessing.

    Args:
        name: one of `available()`.
        embedding_dim: length of the embedding.
        input_size: side, or (height, width), in pixels.
        mean, std: per channel, in 0..255 units and in `colour_order`.
        colour_order: "RGB" or "BGR", what the network sees; images outside it are always RGB.
        kwargs: the backbone's own options, e.g. ``width=0.25`` for an SFNet.

    Returns:
        A module from float (B, 3, h, w) to (B, embedding_dim) with `.preprocessing`,
        `.embedding_dim`, `.input_size` and `.config`.

    Raises:
        UserError: unknown name or option, or a value out of range.
    """
    size = as_size(input_size if isinstance(input_size, int) else tuple(input_size))
    preprocessing = Preprocessing(size, tuple(mean), tuple(std), colour_order)  # type: ignore[arg-type]
    if name not in _BUILDERS:
        raise UserError(
            f"there is no backbone {name!r}{nearest(name, _BUILDERS)}; "
            f"the built-in ones are {', '.join(_BUILDERS)}"
        )
    builder = _BUILDERS[name]
    options = [
        parameter.name
        for parameter in inspect.signature(builder).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    for option in kwargs:
        if option not in options:
            raise UserError(
                f"{name} has no option {option!r}{nearest(option, options)}; "
                f"it has {', '.join(options)}"
            )
    net = builder(embedding_dim=embedding_dim, input_size=size, **kwargs)
    net.preprocessing = preprocessing
    net.config = {
        "name": name,
        "kwargs": {
            "embedding_dim": embedding_dim,
            "input_size": list(size),
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "colour_order": colour_order,
            **kwargs,
        },
    }
    return net
