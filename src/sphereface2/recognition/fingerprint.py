"""What tells one trained network from another."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from sphereface2.backbones import bundle
from sphereface2.backbones.base import Backbone
from sphereface2.backbones.onnx import OnnxNetwork
from sphereface2.data.sources import digest


def fingerprint(net: Backbone) -> str:
    """sha256 (hex) of a network's weights, configuration and preprocessing.

    Two networks with one fingerprint give one image one embedding. It survives saving, loading and
    moving to another device, and does not depend on metadata. An exported network brings its own.
    """
    if isinstance(net, OnnxNetwork):
        return net.fingerprint
    options = {k: v for k, v in net.config["kwargs"].items() if k != "pretrained"}
    described = [net.config["name"], options, net.preprocessing.to_dict()]
    parts: list[str | np.ndarray] = [json.dumps(described, sort_keys=True)]
    for name, tensor in sorted(net.state_dict().items()):
        parts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)}")
        parts.append(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest(*parts)


def fingerprint_of(network: str | Path) -> str:
    """Fingerprint of the network at a path that `bundle.load` takes."""
    return fingerprint(bundle.load(network))
