"""Backbones by name."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from sphereface2.backbones import iresnet, mobilefacenet, sfnet, timm_adaptor
from sphereface2.backbones.base import Backbone
from sphereface2.backbones.preprocessing import Preprocessing, as_size
from sphereface2.errors import UserError, did_you_mean

_BUILDERS: dict[str, Callable[..., Backbone]] = {
    **{name: partial(sfnet.SFNet, units) for name, units in sfnet.UNITS.items()},
    **{name: partial(iresnet.IResNet, units) for name, units in iresnet.UNITS.items()},
    "mobilefacenet": mobilefacenet.MobileFaceNet,
}


def available() -> list[str]:
    """Names of the built-in backbones. Any timm model works too, as ``timm/<its name>``."""
    return list(_BUILDERS)


def create(
    name: str,
    *,
    embedding_dim: int = 512,
    input_size: int | Sequence[int] = 112,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    colour_order: str = "RGB",
    **kwargs: Any,
) -> Backbone:
    """Build a backbone with its preprocessing.

    Args:
        name: one of `available()`, or a timm model as "timm/<name>" or by its bare name.
        embedding_dim: length of the embedding.
        input_size: side, or (height, width), in pixels.
        mean, std: per channel, in 0..255 units and in `colour_order`. None: 127.5 and 128, or
            what the weights of a pretrained timm model were trained with.
        colour_order: "RGB" or "BGR", what the network sees; images outside it are always RGB.
        kwargs: the backbone's own options, e.g. ``width=0.25`` for an SFNet; JSON-able.

    Returns:
        A module from float (B, 3, h, w) to (B, embedding_dim) with `.preprocessing`,
        `.embedding_dim`, `.input_size` and `.config`.

    Raises:
        UserError: unknown name or option, a value out of range, timm missing.
    """
    try:
        options = json.loads(json.dumps(kwargs))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"options of a backbone are stored as JSON and one of these is not: {kwargs!r}"
        ) from error
    size = as_size(input_size if isinstance(input_size, int) else tuple(input_size))
    net = _build(name, embedding_dim=embedding_dim, input_size=size, **options)
    options.pop("pretrained", None)  # the weights travel in the bundle, not by download
    mean = mean or _from_pretrained(net, "mean") or (127.5,) * 3
    std = std or _from_pretrained(net, "std") or (128.0,) * 3
    net.preprocessing = Preprocessing(size, tuple(mean), tuple(std), colour_order)  # type: ignore[arg-type]
    net.config = {
        "name": name,
        "kwargs": {
            "embedding_dim": embedding_dim,
            "input_size": list(size),
            "mean": list(net.preprocessing.mean),
            "std": list(net.preprocessing.std),
            "colour_order": colour_order,
            **options,
        },
    }
    return net


def _build(name: str, **kwargs: Any) -> Backbone:
    builder = _BUILDERS.get(name)
    if builder is not None:
        accepted = [
            parameter.name
            for parameter in inspect.signature(builder).parameters.values()
            if parameter.kind is parameter.KEYWORD_ONLY
        ]
        for option in kwargs:
            if option not in accepted:
                raise UserError(
                    f"{name} has no option {option!r}{did_you_mean(option, accepted)}; "
                    f"it has {', '.join(accepted)}"
                )
        return builder(**kwargs)
    require(name)
    return timm_adaptor.TimmBackbone(name.removeprefix("timm/"), **kwargs)


def require(name: str) -> None:
    """Raise a UserError naming the nearest backbone unless `name` can be created."""
    model = name.removeprefix("timm/")
    if name in _BUILDERS or timm_adaptor.knows(model):
        return
    if model == name:
        known = [*_BUILDERS, *timm_adaptor.names()]
        raise UserError(
            f"there is no backbone {name!r}{did_you_mean(name, known)}; "
            f"built in are {', '.join(_BUILDERS)}, and any timm model as timm/NAME"
        )
    if not timm_adaptor.installed():
        raise UserError(f"{name} needs timm: pip install 'sphereface2[timm]'")
    raise UserError(f"timm has no model {model!r}{did_you_mean(model, timm_adaptor.names())}")


def _from_pretrained(net: Backbone, what: str) -> list[float] | None:
    # timm states them for pixels in 0..1.
    values = getattr(net, "pretrained_cfg", {}).get(what)
    return [255.0 * value for value in values] if values else None
