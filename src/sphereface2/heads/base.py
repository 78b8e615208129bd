"""What all heads share: the prototypes, the checks of a batch, and the registry of names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sphereface2.errors import did_you_mean

_REGISTRY: dict[str, type[Head]] = {}
H = TypeVar("H", bound="type[Head]")

SMALLEST_NORM = 1e-12
"""An embedding shorter than this has no direction: its cosines are 0 and it gets no gradient."""


class Head(nn.Module):
    """A loss over classes: embeddings and labels in, one number out.

    Args:
        embedding_dim: d, the length of an embedding, ≥ 1.
        num_classes: C, the number of people, ≥ 2.

    Attributes:
        weight: (C, d) parameter, one prototype a person, xavier-normal at the start. Its rows are
            renormalised in place before every forward pass, so that the gradient reaches unit rows
            and weight decay cannot change a direction.

    Calling a head with embeddings (B, d) of any floating type and labels (B,) of an integer type
    returns the batch's loss, a scalar of at least float32. Autocast does not reach inside.

    Raises:
        ValueError: in the constructor, a value out of its range; in a call, shapes that do not fit,
            an empty batch, or a label outside 0 … C - 1.
    """

    def __init__(self, embedding_dim: int, num_classes: int) -> None:
        super().__init__()
        check_count("embedding_dim", embedding_dim, 1)
        check_count("num_classes", num_classes, 2)
        self.embedding_dim = embedding_dim
        self.num_classes = num_classes
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_dim))
        nn.init.xavier_normal_(self.weight)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        labels = self.check_batch(embeddings, labels)
        dtype = torch.promote_types(embeddings.dtype, self.weight.dtype)
        dtype = torch.promote_types(dtype, torch.float32)
        with torch.autocast(embeddings.device.type, enabled=False):
            return self.loss(embeddings.to(dtype), labels)

    def loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Scalar loss of a checked batch: embeddings (B, d) in float32 or 64, labels (B,) int64."""
        raise NotImplementedError

    def unit_weight(self, dtype: torch.dtype) -> Tensor:
        """Renormalise the rows of `weight` in place and return it, (C, d), as `dtype`."""
        # Through .data, unseen by autograd: a backward pass still waiting for these rows may go
        # ahead unless an optimiser step came between. Rows of length 1 up to rounding stay as they
        # are, so that a forward pass for evaluation changes nothing.
        rows = self.weight.data
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=dtype)
        norms.masked_fill_((norms - 1).abs() < 8 * torch.finfo(dtype).eps, 1)
        rows.div_(norms.clamp_min_(SMALLEST_NORM))
        return self.weight.to(dtype)

    def check_batch(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Raise a ValueError for a batch that does not fit; return the labels as int64."""
        if embeddings.ndim != 2 or embeddings.shape[1] != self.embedding_dim:
            raise ValueError(
                f"embeddings must have shape (B, {self.embedding_dim}), "
                f"got {tuple(embeddings.shape)}"
            )
        if not embeddings.is_floating_point():
            raise ValueError(f"embeddings must be floating point, got {embeddings.dtype}")
        if labels.shape != embeddings.shape[:1]:
            raise ValueError(
                f"labels must have shape ({embeddings.shape[0]},), one for each embedding, "
                f"got {tuple(labels.shape)}"
            )
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise ValueError(f"labels must be integers (int64), got {labels.dtype}")
        if len(labels) == 0:
            raise ValueError("the batch is empty: embeddings must hold at least one row")
        labels = labels.long()
        lowest, highest = (int(bound) for bound in torch.stack(torch.aminmax(labels)).tolist())
        if lowest < 0 or highest >= self.num_classes:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"label {wrong} is outside 0 … {self.num_classes - 1}")
        return labels

    def extra_repr(self) -> str:
        return f"embedding_dim={self.embedding_dim}, num_classes={self.num_classes}"


def unit_rows(x: Tensor) -> Tensor:
    """Rows of (B, d) scaled to length 1, with gradient.

    Any magnitude is safe: nothing overflows or underflows on the way, and a row shorter than
    `SMALLEST_NORM` becomes 0 and gets gradient 0 rather than an immense one.
    """
    # The result does not depend on a row's scale, so dividing by a constant of its size is exact.
    size = x.detach().abs().amax(1, keepdim=True)
    x = x / size.masked_fill(size < SMALLEST_NORM, torch.inf)
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / norm.masked_fill(norm == 0, torch.inf)


def register(name: str) -> Callable[[H], H]:
    """Class decorator that makes a head available under `name`."""

    def add(head: H) -> H:
        if name in _REGISTRY:
            raise ValueError(f"there are two heads named {name!r}")
        _REGISTRY[name] = head
        return head

    return add


def available() -> list[str]:
    """Names that `build` knows."""
    return sorted(_REGISTRY)


def parameters(name: str) -> list[str]:
    """Keywords that a head takes besides embedding_dim and num_classes.

    Raises:
        ValueError: unknown name.
    """
    return [
        parameter.name
        for parameter in inspect.signature(_find(name)).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]


def build(name: str, embedding_dim: int, num_classes: int, **kwargs: Any) -> Head:
    """Build a head by its name.

    Args:
        name: one of `available()`.
        embedding_dim: d, the length of an embedding.
        num_classes: C, the number of people.
        kwargs: the head's own hyper-parameters, those of `parameters(name)`.

    Raises:
        ValueError: unknown name or keyword (the message names the nearest), or a value out of
            range.
    """
    head = _find(name)
    known = parameters(name)
    for keyword in kwargs:
        if keyword not in known:
            raise ValueError(
                f"the head {name} has no parameter {keyword!r}{did_you_mean(keyword, known)}; "
                f"it has {', '.join(known) or 'none'}"
            )
    return head(embedding_dim, num_classes, **kwargs)


def check_count(name: str, value: object, least: int) -> None:
    """Raise a ValueError unless `value` is an integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer ≥ {least}, got {value!r}")


def _find(name: str) -> type[Head]:
    if name not in _REGISTRY:
        raise ValueError(
            f"there is no head {name!r}{did_you_mean(name, _REGISTRY)}; "
            f"there are {', '.join(available())}"
        )
    return _REGISTRY[name]
