"""Networks from images to embeddings, each with the preprocessing it was trained with."""

from sphereface2.backbones.base import Backbone
from sphereface2.backbones.preprocessing import Preprocessing
from sphereface2.backbones.registry import available, build, parameters, register

__all__ = ["Backbone", "Preprocessing", "available", "build", "parameters", "register"]
