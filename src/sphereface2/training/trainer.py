"""The training loop, the same for one process on a laptop and for torchrun on many.

record -> image -> batch -> embedding -> loss -> update. The loop knows no file format and no
metric: it is given batches, and a function that validates.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from sphereface2 import backbones, heads
from sphereface2.data.dataset import Batch, FaceDataset
from sphereface2.data.sampler import BatchSampler
from sphereface2.errors import UserError
from sphereface2.training import checkpoint as ckpt
from sphereface2.training.config import RunConfig, head_options
from sphereface2.training.distributed import World
from sphereface2.training.logging import RunLog
from sphereface2.training.optim import (
    MovingAverage,
    build_optimizers,
    clip_gradients,
    learning_rate_factor,
    set_learning_rate,
)

AUTOCAST = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}

Validate = Callable[[nn.Module], dict[str, float]]
"""Network -> figures in [0, 1]; the first is the one by which the best checkpoint is chosen."""


@dataclass
class Progress:
    """Where a run stands; stored as ``progress.json``."""

    step: int = 0
    """Optimiser steps done."""
    best: float = -math.inf
    """Best first figure of a validation so far."""
    first_loss: float = math.nan
    smoothed_loss: float = math.nan
    images: int = 0
    """Images trained on, over all ranks."""
    seconds: float = 0.0
    """Wall time inside training steps, over all resumptions."""
    unreadable: list[str] = field(default_factory=list)
    """Names of images met that cannot be read, over all ranks; as of the last checkpoint."""
    world_size: int = 1


class Trainer:
    """Builds a run's parts from its configuration and trains.

    Args:
        config: the whole configuration.
        run: the run's folder, existing.
        world: this process's place.
        dataset: training images; its labels are 0 … ``num_classes`` - 1.
        sampler: the batches of an epoch for this rank.
        validate: called on every rank with the network to evaluate (in eval mode).
    """

    def __init__(
        self,
        config: RunConfig,
        run: Path,
        world: World,
        dataset: FaceDataset,
        sampler: BatchSampler,
        num_classes: int,
        validate: Validate,
    ) -> None:
        self.config, self.world, self.validate = config, world, validate
        self.dataset, self.sampler = dataset, sampler
        settings = config.training
        device = world.device

        torch.manual_seed(config.seed)
        network = backbones.build(**config.backbone)
        options, sharded = head_options(config)
        if sharded and world.size > 1:
            options["process_group"] = world.group
        with device:
            head = heads.build(
                **options, embedding_dim=network.embedding_dim, num_classes=num_classes
            )
        # From here on ranks draw differently (dropout); the parameters above are equal.
        torch.manual_seed(config.seed * 1_000_003 + world.rank + 1)
        self.memory_format = (
            torch.channels_last if settings.channels_last else torch.contiguous_format
        )
        self.network = network.to(device).to(memory_format=self.memory_format)
        self.head = head.to(device)
        self.optimizers = build_optimizers(settings, self.network, self.head)
        self.average = MovingAverage(self.network, settings.ema) if settings.ema else None
        self.dtype = AUTOCAST[settings.autocast]
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.autocast == "fp16")

        forward: nn.Module = self.network
        if settings.compile:
            forward = torch.compile(forward)  # type: ignore[assignment]
        self.forward = self._replicate(forward)
        # A sharded head does its own communication.
        self.loss = self.head if self.head.shard.group else self._replicate(self.head)
        if settings.fused_head and isinstance(self.loss, DistributedDataParallel):
            raise UserError(
                "training.fused_head on several ranks needs head.sharded true: replicas of the "
                "prototypes would take different steps"
            )

        workers = config.data.workers
        if workers is None:
            workers = 4 if device.type == "cuda" else 0
        self.loader = DataLoader(
            dataset,
            sampler=sampler,
            batch_size=None,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            # Its own generator: starting an epoch must not draw from the one that dropout uses.
            generator=torch.Generator(),
        )
        self.epoch_steps = len(sampler) // settings.accumulate
        if self.epoch_steps == 0:
            raise UserError(
                f"{len(dataset)} training images make no batch of "
                f"{settings.batch_size}; lower training.batch_size"
            )
        self.total_steps = max(1, round(settings.epochs * self.epoch_steps))
        self.progress = Progress(world_size=world.size)
        self.checkpointer = ckpt.Checkpointer(run, world)
        self.run = run

    def _replicate(self, module: nn.Module) -> nn.Module:
        trainable = any(p.requires_grad for p in module.parameters())
        if self.world.size == 1 or not trainable:
            return module
        ids = [self.world.device] if self.world.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)

    def resume(self) -> None:
        """Restore the last checkpoint of the run folder."""
        told = self.checkpointer.last_progress()
        self.progress = Progress(**told)
        state = self._state()
        same_ranks = self.progress.world_size == self.world.size
        if not same_ranks:
            state.pop(f"rng.{self.world.rank}")
        self.checkpointer.load(state)
        ckpt.restore_training_state(state, self.network, self.head, self.optimizers)
        if self.average is not None:
            self.average.average = state["average"]
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        if same_ranks:
            ckpt.set_rng_state(state[f"rng.{self.world.rank}"], self.world.device)
        self.progress.world_size = self.world.size

    def train(self) -> Progress:
        """Train to the end of the schedule, from wherever ``progress`` stands."""
        settings, progress = self.config.training, self.progress
        log = RunLog(
            self.run,
            main=self.world.is_main,
            total_steps=self.total_steps,
            start_step=progress.step,
        )
        every = round(self.config.validation.every * self.epoch_steps)
        batches = self.batches(progress.step * settings.accumulate)
        logged = copy.copy(progress)
        since = time.perf_counter()
        self.forward.train()
        self.loss.train()
        with log:
            while progress.step < self.total_steps:
                factor = learning_rate_factor(settings, progress.step, self.total_steps)
                set_learning_rate(self.optimizers, factor)
                micro = [next(batches) for _ in range(settings.accumulate)]
                loss, norm = self.step(micro)
                self._check_loss(loss)
                if self.average is not None:
                    self.average.update(self.network, progress.step)
                progress.step += 1
                progress.images += sum(len(batch.labels) for batch in micro) * self.world.size
                for batch in micro:
                    if batch.unreadable:
                        self.dataset.note_unreadable(batch.unreadable)
                now = time.perf_counter()
                progress.seconds += now - since
                since = now
                done = progress.step == self.total_steps

                if progress.step % settings.log_every == 0 or done:
                    seconds = progress.seconds - logged.seconds
                    values = {
                        "seconds": progress.seconds,
                        "loss": self.world.mean(loss),
                        "lr": self.optimizers[0].param_groups[0]["lr"],
                        "gradient_norm": norm,
                        "images_per_second": (progress.images - logged.images) / seconds,
                        "seconds_per_step": seconds / (progress.step - logged.step),
                        "unreadable": len(self.dataset.unreadable_names()),
                    }
                    log.train(progress.step, self.epoch, values)
                    logged = copy.copy(progress)

                pause = time.perf_counter()
                is_best = False
                if done or (every and progress.step % every == 0):
                    is_best = self._validate(log)
                if done or is_best or progress.step % settings.checkpoint_every == 0:
                    self._save(best=is_best)
                since += time.perf_counter() - pause
        return progress

    @property
    def epoch(self) -> float:
        """Epochs done, fractional."""
        return self.progress.step / self.epoch_steps

    def evaluated_network(self) -> nn.Module:
        """The network that is validated and shipped: the moving average where one is kept."""
        if self.average is None:
            return self.network
        averaged = copy.deepcopy(self.network)
        averaged.load_state_dict(self.average.average)
        return averaged

    def batches(self, consumed: int) -> Iterator[Batch]:
        """Batches without end, from the ``consumed``-th of the run on."""
        per_epoch = self.epoch_steps * self.config.training.accumulate
        epoch, position = divmod(consumed, per_epoch)
        while True:
            self.sampler.load_state_dict({"epoch": epoch, "position": position})
            for index, batch in enumerate(self.loader, start=position):
                if index >= per_epoch:
                    break
                yield batch
            epoch, position = epoch + 1, 0

    def step(self, batches: list[Batch]) -> tuple[float, float]:
        """One optimiser step; returns this rank's loss and the gradient norm before clipping."""
        device, settings = self.world.device, self.config.training
        total = 0.0
        for index, batch in enumerate(batches):
            with contextlib.ExitStack() as stack:
                if index + 1 < len(batches):
                    for module in (self.forward, self.loss):
                        if isinstance(module, DistributedDataParallel):
                            stack.enter_context(module.no_sync())
                images = batch.images.to(device, non_blocking=True)
                labels = batch.labels.to(device, non_blocking=True)
                pixels = self.network.preprocessing(images).contiguous(
                    memory_format=self.memory_format
                )
                with torch.autocast(device.type, self.dtype, enabled=self.dtype is not None):
                    embeddings = self.forward(pixels)
                    if settings.clip_embedding_norm is not None:
                        embeddings.register_hook(self._clip_embedding_gradient)
                    loss = self.loss(embeddings, labels) / len(batches)
                self.scaler.scale(loss).backward()
            total += loss.item()
        optimizer, *_fused = self.optimizers
        self.scaler.unscale_(optimizer)
        parameters = [*self.network.parameters(), *self.head.parameters()]
        norm = clip_gradients(parameters, settings.clip_norm)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return total, norm.item()

    def _clip_embedding_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """Scale the batch's gradient by its embeddings (of all ranks) down to the limit."""
        limit = self.config.training.clip_embedding_norm
        assert limit is not None
        squares = self.world.sum(gradient.float().square().sum())
        # Ranks average their gradients, and a scaler's factor is not part of them.
        norm = squares.sqrt() / (self.world.size * self.scaler.get_scale())
        return gradient * (limit / (norm + 1e-6)).clamp(max=1).to(gradient.dtype)

    def _check_loss(self, loss: float) -> None:
        progress = self.progress
        if not math.isfinite(loss):
            raise UserError(
                f"the loss became {loss} at step {progress.step + 1}; the last good checkpoint is "
                f"{self.checkpointer.folder / 'last'}: lower training.lr or training.autocast"
            )
        if math.isnan(progress.first_loss):
            progress.first_loss = progress.smoothed_loss = loss
        progress.smoothed_loss = 0.95 * progress.smoothed_loss + 0.05 * loss
        limit = self.config.training.max_loss_ratio * abs(progress.first_loss)
        if progress.smoothed_loss > limit:
            raise UserError(
                f"training diverges: the loss rose from {progress.first_loss:.3g} to "
                f"{progress.smoothed_loss:.3g} by step {progress.step + 1}; lower training.lr (or "
                f"raise training.max_loss_ratio); the last good checkpoint is "
                f"{self.checkpointer.folder / 'last'}"
            )

    def _validate(self, log: RunLog) -> bool:
        network = self.evaluated_network()
        network.eval()
        figures = self.validate(network)
        self.network.train()
        log.validation(self.progress.step, self.epoch, self.progress.seconds, figures)
        if not figures:
            return False
        first = next(iter(figures.values()))
        is_best = first > self.progress.best
        self.progress.best = max(first, self.progress.best)
        return is_best

    def _save(self, best: bool) -> None:
        met = {
            name for names in self.world.gather(self.dataset.unreadable_names()) for name in names
        }
        self.progress.unreadable = sorted(met.union(self.progress.unreadable))
        self.checkpointer.save(
            self.progress.step,
            model=self.evaluated_network(),
            state=self._state(),
            progress=vars(self.progress),
            about=self._about() if self.world.is_main else None,
            best=best,
        )

    @cached_property
    def data_fingerprint(self) -> str:
        """Of the training set; it may ask for the size of every file, so once a run."""
        return self.dataset.source.fingerprint()

    def _about(self) -> dict[str, Any]:
        """What a user of the network may want to know of its training."""
        data = self.config.data
        return {
            "head": {"name": self.config.head["name"], **self.head.summary()},
            "data": {
                "fingerprint": self.data_fingerprint,
                "validation_people": data.validation_people,
                "held_out_max_images": data.held_out_max_images,
                "split_seed": data.split_seed,
            },
        }

    def _state(self) -> dict[str, Any]:
        state = ckpt.training_state(self.network, self.head, self.optimizers)
        if self.average is not None:
            state["average"] = self.average.average
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        state[f"rng.{self.world.rank}"] = ckpt.rng_state(self.world.device)
        return state
