"""Training: configuration, the loop, checkpoints, schedules, logs."""

from sphereface2.training.config import RunConfig, load
from sphereface2.training.fit import fit
from sphereface2.training.trainer import Trainer

__all__ = ["RunConfig", "Trainer", "fit", "load"]
