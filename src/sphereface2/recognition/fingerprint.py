"""What tells one trained network from another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sphereface2.backbones import bundle
from sphereface2.backbones.onnx import OnnxNetwork
from sphereface2.embedder import Embedder

if TYPE_CHECKING:
    from sphereface2.backbones.base import Backbone


def fingerprint(net: Backbone | OnnxNetwork) -> str:
    """sha256 (hex) of what a network computes; see `Embedder.fingerprint`."""
    return net.fingerprint if isinstance(net, OnnxNetwork) else bundle.fingerprint(net)


def fingerprint_of(network: str | Path) -> str:
    """Fingerprint of the network at a path that `Embedder.load` takes."""
    return Embedder.load(network, device="cpu").fingerprint
