"""Any timm model as a backbone: its classifier becomes the embedding layer."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import Tensor

from sphereface2.backbones.base import Backbone
from sphereface2.errors import UserError

# Options that would change what the module returns, or read files and addresses of their own.
_RESERVED = frozenset(
    {
        "num_classes",
        "in_chans",
        "img_size",
        "features_only",
        "checkpoint_path",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "pretrained_strict",
        "cache_dir",
    }
)


def installed() -> bool:
    """Whether timm can be imported."""
    return importlib.util.find_spec("timm") is not None


def names() -> list[str]:
    """Every model name timm knows; empty without timm."""
    if not installed():
        return []
    import timm

    return timm.list_models()


def knows(name: str) -> bool:
    """Whether timm is there and registers `name` (with or without a pretrained tag)."""
    if not installed():
        return False
    import timm

    return timm.is_model(name)


class TimmBackbone(Backbone):
    """A timm model whose classifier yields the embedding.

    Args:
        model: timm's name, e.g. "resnet18" or "vit_tiny_patch16_224".
        embedding_dim: length of the embedding.
        input_size: side, or (height, width), in pixels; models of fixed input are built for it.
        pretrained: start from timm's weights (fetched by timm), the embedding layer untrained.
        options: given to ``timm.create_model``, e.g. ``drop_path_rate=0.1``.
    """

    def __init__(
        self,
        model: str,
        *,
        embedding_dim: int = 512,
        input_size: int | tuple[int, int] = 112,
        pretrained: bool = False,
        **options: Any,
    ):
        super().__init__(embedding_dim, input_size, stride=1)
        if reserved := sorted(_RESERVED & options.keys()):
            raise UserError(
                f"the option {reserved[0]!r} of timm models is set by embedding_dim and "
                "input_size or not supported"
            )
        import timm

        description = timm.models.get_pretrained_cfg(model)
        if description is not None and description.fixed_input_size:
            options["img_size"] = self.input_size
        try:
            self.net = timm.create_model(
                model, pretrained=pretrained, num_classes=embedding_dim, **options
            )
        except (TypeError, ValueError, AssertionError) as error:
            raise UserError(f"timm cannot build {model}: {error}") from error
        self.pretrained_cfg = description.to_dict() if pretrained and description else {}

    def embed(self, images: Tensor) -> Tensor:
        return self.net(images)
