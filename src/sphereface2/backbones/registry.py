"""Backbones by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from sphereface2.backbones import dlib, iresnet, mobilefacenet, sfnet, timm_adaptor
from sphereface2.backbones.base import Backbone
from sphereface2.backbones.preprocessing import Preprocessing, as_size
from sphereface2.errors import UserError, did_you_mean
from sphereface2.extras import require
from sphereface2.registry import Registry, keyword_defaults

_BACKBONES: Registry[Callable[..., Backbone]] = Registry("backbone")
register = _BACKBONES.register
available = _BACKBONES.available
for _name, _units in sfnet.UNITS.items():
    register(_name)(partial(sfnet.SFNet, _units))
for _name, _units in iresnet.UNITS.items():
    register(_name)(partial(iresnet.IResNet, _units))
register("mobilefacenet")(mobilefacenet.MobileFaceNet)
register("dlib")(dlib.DlibNetwork)

_PREPROCESSING = ("mean", "std", "colour_order")


def parameters(name: str) -> list[str]:
    """Keywords that `build` takes for a backbone; a timm model takes timm's own besides.

    Raises:
        UserError: unknown name.

    Example:
        >>> parameters("mobilefacenet")
        ['embedding_dim', 'input_size', 'activation', 'width', 'mean', 'std', 'colour_order']
    """
    return [*keyword_defaults(_find(name)), *_PREPROCESSING]


def build(
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

    Example:
        >>> import torch
        >>> network = build("mobilefacenet", embedding_dim=128).eval()
        >>> images = torch.zeros(2, 3, 112, 112, dtype=torch.uint8)
        >>> network(network.preprocessing(images)).shape
        torch.Size([2, 128])
    """
    try:
        options = json.loads(json.dumps(kwargs))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"options of a backbone are stored as JSON and one of these is not: {kwargs!r}"
        ) from error
    size = as_size(input_size)
    builder = _find(name)
    if name in _BACKBONES:
        _BACKBONES.check_options(name, options, keyword_defaults(builder))
    net = builder(embedding_dim=embedding_dim, input_size=size, **options)
    options.pop("pretrained", None)  # the weights travel in the bundle, not by download
    if mean is None:
        mean = _from_pretrained(net, "mean") or (127.5,) * 3
    if std is None:
        std = _from_pretrained(net, "std") or (128.0,) * 3
    net.preprocessing = Preprocessing(size, mean, std, colour_order)  # type: ignore[arg-type]
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


def _find(name: str) -> Callable[..., Backbone]:
    """The builder of a name, a timm model's included."""
    if name in _BACKBONES or not isinstance(name, str):
        return _BACKBONES.find(name)
    model = name.removeprefix("timm/")
    if timm_adaptor.knows(model):
        return partial(timm_adaptor.TimmBackbone, model)
    if model == name:
        known = [*available(), *timm_adaptor.names()]
        raise UserError(
            f"there is no backbone {name!r}{did_you_mean(name, known)}; "
            f"available: {', '.join(available())}, and any timm model as timm/NAME"
        )
    require(f"backbones such as {name}", "timm")
    raise UserError(f"timm has no model {model!r}{did_you_mean(model, timm_adaptor.names())}")


def _from_pretrained(net: Backbone, what: str) -> list[float] | None:
    # timm states them for pixels in 0..1.
    values = getattr(net, "pretrained_cfg", {}).get(what)
    return [255.0 * value for value in values] if values else None
