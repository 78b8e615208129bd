"""The training loop, the same for one process on a laptop and for torchrun on many.

record -> image -> batch -> embedding -> loss -> update. The loop knows no file format and no
metric: it is given batches, and a function that validates.
"""

from __future__ import annotations

import copy
import math
import signal
import time
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sphereface2.data.dataset import Batch, FaceDataset
from sphereface2.data.sampler import BatchSampler
from sphereface2.errors import Stopped, UserError, counted
from sphereface2.heads.sharding import local
from sphereface2.signals import Stopper
from sphereface2.training import checkpoint as ckpt
from sphereface2.training.config import RunConfig
from sphereface2.training.distributed import World
from sphereface2.training.loading import EveryEpoch, build_loader, loaded, lost_workers
from sphereface2.training.logging import RunLog
from sphereface2.training.manifest import PROGRESS
from sphereface2.training.optim import MovingAverage, learning_rate_factor, set_learning_rate
from sphereface2.training.similarities import similarities
from sphereface2.training.step import TrainingStep
from sphereface2.training.teacher import Teacher
from sphereface2.training.watch import Losses

Validate = Callable[[Any, Callable[[], bool]], tuple[dict[str, float], list[str]] | None]
"""Network -> figures in [0, 1], the first being the one by which the best checkpoint is chosen, and
the names of unreadable images; the same on every rank. It is asked now and then whether to stop,
and then gives None."""


@dataclass
class Progress:
    """Where a run stands; stored as ``progress.json``."""

    step: int = 0
    """Optimiser steps done."""
    best: float = -math.inf
    """Best first figure of a validation so far."""
    first_loss: float = math.nan
    smoothed_loss: float = math.nan
    lowest_loss: float = math.nan
    """Least value of ``smoothed_loss`` so far."""
    images: int = 0
    """Images trained on, over all ranks."""
    seconds: float = 0.0
    """Wall time inside training steps, over all resumptions."""
    unreadable: list[str] = field(default_factory=list)
    """Names of images met that cannot be read, over all ranks."""
    world_size: int = 1
    best_step: int | None = None
    """Step of the best checkpoint."""
    pending: bool = False
    """The step was stopped before its validation."""
    epoch_steps: int = 0
    """Optimiser steps an epoch."""
    shift: int = 0
    """What to add to ``step`` to get the steps that the epochs done would take at today's batch
    size; other than 0 after a resumption with another one."""


class Trainer:
    """Builds a run's parts from its configuration and trains.

    Args:
        config: the whole configuration.
        run: the run's folder, existing.
        world: this process's place.
        dataset: training images; its labels are 0 … ``num_classes`` - 1.
        sampler: the batches of an epoch for this rank.
        validate: called on every rank with the network to evaluate (in eval mode).
        held_out: images that ``validate`` reads, which share in the allowance of unreadable ones.
        teacher: of ``dataset``, if there is one.
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
        held_out: int = 0,
        teacher: Teacher | None = None,
    ) -> None:
        self.config, self.world, self.validate = config, world, validate
        self.images = len(dataset) + held_out
        self.dataset, self.sampler = dataset, sampler
        settings = config.training
        device = world.device

        self.step = TrainingStep(config, world, num_classes, teacher)
        self.network, self.head = self.step.network, self.step.head
        self.optimizers, self.scaler = self.step.optimizers, self.step.scaler
        self.restart_average()

        self.epoch_steps = len(sampler) // settings.accumulate
        if self.epoch_steps == 0:
            raise UserError(
                f"{len(dataset)} training images make no batch of "
                f"{settings.batch_size}; lower training.batch_size"
            )
        workers = config.data.workers
        placed = config.data.cache == "device"
        if workers is None:
            workers = 0 if placed or device.type != "cuda" else 4
        self.keys = EveryEpoch(sampler, self.epoch_steps * settings.accumulate)
        self.loader = build_loader(dataset, self.keys, world, workers, placed=placed)
        self.total_steps = max(1, round(settings.epochs * self.epoch_steps))
        # At the second step at the earliest: the memory is empty before.
        self.samples_begin = max(1, round(config.sample_to_sample.begin * self.epoch_steps)) + 1
        self.progress = Progress(world_size=world.size, epoch_steps=self.epoch_steps)
        self.checkpointer = ckpt.Checkpointer(run, world)
        self.run = run
        #: What a resumption must find again, kept with every checkpoint.
        self.record: dict[str, Any] = {}

    def restart_average(self) -> None:
        """Let the moving average, if there is one, start at the present weights."""
        decay = self.config.training.ema
        self.average = MovingAverage(self.network, decay) if decay else None

    def resume(self, found: ckpt.Checkpoint) -> None:
        """Restore a checkpoint, of any number of ranks, precision and batch size.

        Raises:
            UserError: it does not fit the configuration, or has trained for longer.
        """
        try:
            self.progress = progress = Progress(**found.progress)
        except TypeError as error:
            raise UserError(f"{found.folder / PROGRESS} cannot be understood") from error
        state, stored = self._state(), self.checkpointer.keys(found)
        own_rng = f"rng.{self.world.rank}"
        same_ranks = progress.world_size == self.world.size
        if not same_ranks:
            state.pop(own_rng)
        # What the run did without so far begins now.
        if not any(key.startswith("average.") for key in stored):
            state.pop("average", None)
        if not any(key.startswith("scaler") for key in stored):
            state.pop("scaler", None)
        self.checkpointer.load(found, state)
        ckpt.restore_training_state(state, self.step.modules, self.optimizers)
        if self.average is not None:
            self.average.average = state.get("average") or {
                key: value.clone() for key, value in self.network.state_dict().items()
            }
        if "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])
        losses = progress.first_loss, progress.smoothed_loss, progress.lowest_loss
        self.step.watch.resume(*losses)
        if same_ranks:
            ckpt.set_rng_state(state[own_rng], self.world.device)
        else:
            torch.manual_seed(hash((self.config.seed, progress.step, self.world.rank)))
        progress.world_size = self.world.size
        before = progress.epoch_steps or self.epoch_steps
        done = (progress.step + progress.shift) / before
        if before != self.epoch_steps:
            progress.shift = round(done * self.epoch_steps) - progress.step
        progress.epoch_steps = self.epoch_steps
        if self.position > self.total_steps:
            raise UserError(
                f"training.epochs = {self.config.training.epochs:g}, but {self.run} has trained "
                f"{counted(done, 'epoch')}; give more, or start a new run"
            )

    @property
    def position(self) -> int:
        """Steps of the schedule done: ``progress.step``, counted in today's batch size."""
        return self.progress.step + self.progress.shift

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to train."""
        return self.position == self.total_steps and not self.progress.pending

    def train(self, stopper: Stopper | None = None) -> Progress:
        """Train to the end of the schedule, from wherever ``progress`` stands.

        Args:
            stopper: asked after each step, on all ranks together, whether to stop.

        Raises:
            Stopped: it said so; a checkpoint of the last step is whole.
            UserError: training diverges, images or loader processes fail, a checkpoint cannot be
                written.
        """
        self.stopper = stopper or Stopper("")
        settings, progress = self.config.training, self.progress
        log = RunLog(
            self.run,
            main=self.world.is_main,
            total_steps=self.total_steps - progress.shift,
            start_step=progress.step,
            pending=progress.pending,
        )
        batches = self.batches(self.position * settings.accumulate)
        logged = copy.copy(progress)
        since = time.perf_counter()
        self.step.samples_from = self.samples_begin - progress.shift
        self.step.begin(self.sampler.batch_size // self.world.size)
        try:
            with lost_workers(self.loader), log, self.stopper.deferred(), closing(batches):
                if progress.pending:
                    self._conclude(log, stopping=False)
                while self.position < self.total_steps:
                    factor = learning_rate_factor(settings, self.position, self.total_steps)
                    set_learning_rate(self.optimizers, factor)
                    micro = [next(batches) for _ in range(settings.accumulate)]
                    self.step(micro, progress.step + 1)
                    stopping = self._agree(micro)
                    if self.average is not None:
                        self.average.update(self.network, progress.step)
                    progress.step += 1
                    log.advance(progress.step)
                    progress.images += sum(len(one.labels) for one in micro) * self.world.size
                    now = time.perf_counter()
                    progress.seconds += now - since
                    since = now

                    if progress.step % settings.log_every == 0 or self.is_done:
                        self._log(log, logged, micro[0])
                        logged = copy.copy(progress)

                    pause = time.perf_counter()
                    self._conclude(log, stopping)
                    since += time.perf_counter() - pause
                self.checkpointer.wait()
        except Stopped as stop:
            raise Stopped(
                f"stopped at step {progress.step}; continue with "
                f"sphereface2 fit --resume {self.run}",
                stop.status - 128,
            ) from None
        finally:
            self.checkpointer.close()
        return progress

    def _log(self, log: RunLog, logged: Progress, batch: Batch) -> None:
        """Log the last step, with means since ``logged``."""
        progress, seen = self.progress, self._check_loss()
        seconds = progress.seconds - logged.seconds
        values = {
            "seconds": progress.seconds,
            "loss": seen.loss,
            "lr": self.optimizers[0].param_groups[0]["lr"],
            "gradient_norm": seen.norm,
            "images_per_second": (progress.images - logged.images) / seconds,
            "seconds_per_step": seconds / (progress.step - logged.step),
            "unreadable": len(progress.unreadable),
        }
        if self.config.training.log_similarities:
            values |= similarities(self.step, batch)
        log.train(progress.step, self.epoch, values)

    def _conclude(self, log: RunLog, stopping: bool) -> None:
        """What is due after a step: validation, a checkpoint, the end."""
        progress = self.progress
        wanted = self.config.validation.every * self.epoch_steps
        every = max(1, round(wanted)) if wanted else 0  # less than half a step is not never
        done = self.position == self.total_steps
        is_best = False
        if done or (every and self.position % every == 0):
            progress.pending = True
            try:
                if not stopping:
                    is_best = self._validate(log)
            except UserError:
                self._save(best=False)
                self.checkpointer.wait()
                raise
            stopping = stopping or progress.pending
        periodic = progress.step % self.config.training.checkpoint_every == 0
        if done or is_best or stopping or periodic:
            self._save(best=is_best)
        if stopping:
            self.checkpointer.wait()
            raise Stopped("", self.stopper.signum or signal.SIGTERM)

    def _agree(self, micro: Sequence[Batch]) -> bool:
        """Exchange what ranks must know of each other after a step: whether one is to stop."""
        unreadable = [self.dataset.source.name(i) for batch in micro for i in batch.unreadable]
        asked, met = self.world.count(self.stopper.signum is not None, len(unreadable))
        if met:
            self._note_unreadable(chain.from_iterable(self.world.gather(unreadable)))
        return asked > 0

    def _note_unreadable(self, names: Iterable[str]) -> None:
        """Count unreadable images; UserError, alike on all ranks, once their share is too large."""
        met = self.progress.unreadable  # sorted; may be so many that to sort them a step is slow
        for name in names:
            if met[(place := bisect_left(met, name)) : place + 1] != [name]:
                met.insert(place, name)
        allowed = self.config.data.max_unreadable
        if len(met) > allowed * self.images:
            raise UserError(
                f"{len(met)} of {self.images} images cannot be read ({', '.join(met[:3])}, …), "
                f"more than the allowed share of {allowed:g}: repair the data set or raise "
                "data.max_unreadable"
            )

    @property
    def epoch(self) -> float:
        """Epochs done, fractional."""
        return self.position / self.epoch_steps

    def evaluated_network(self) -> nn.Module:
        """The network that is validated and shipped: the moving average where one is kept."""
        if self.average is None and not self.config.training.compile:
            return self.network
        copied = copy.deepcopy(self.network)  # not compiled: evaluation has batches of any size
        if self.average is not None:
            copied.load_state_dict(self.average.average)
        return copied

    def batches(self, consumed: int) -> Generator[Batch, None, None]:
        """Batches without end, from the ``consumed``-th of the run on."""
        self.keys.consumed = consumed
        yield from loaded(self.loader)

    def _check_loss(self) -> Losses:
        """Read the losses so far; UserError, alike on all ranks, if a step went wrong."""
        progress, seen = self.progress, self.step.watch.read()
        progress.first_loss, progress.smoothed_loss = seen.first, seen.smoothed
        progress.lowest_loss = seen.lowest
        if not seen.wrong_step:
            return seen
        if math.isfinite(seen.loss) and math.isfinite(seen.norm):
            raise UserError(
                f"training diverges: the loss rose from {seen.first:.3g} to {seen.smoothed:.3g} by "
                f"step {seen.wrong_step}; lower training.lr (or raise training.max_loss_ratio); "
                f"{self._last_good()}"
            )
        what = "gradient's norm" if math.isfinite(seen.loss) else "loss"
        value = seen.norm if math.isfinite(seen.loss) else seen.loss
        raise UserError(
            f"the {what} became {value} at step {seen.wrong_step}; lower training.lr or "
            f"training.autocast; {self._last_good()}"
        )

    def _last_good(self) -> str:
        """What is left of a run that goes wrong."""
        self.checkpointer.wait()
        last, good = self.checkpointer.last(), self.checkpointer.last_good()
        if last is None:
            return "there is no checkpoint yet"
        if good is None:
            return "no checkpoint is from before the loss rose: start a new run"
        if good == last:
            return f"the last good checkpoint is {good}, which --resume {self.run} goes on from"
        return f"the last good checkpoint, from before the loss rose, is {good}: --resume {good}"

    def _validate(self, log: RunLog) -> bool:
        """Log the figures; whether they are the best so far. A stop leaves the step pending."""
        self._check_loss()
        self._share_buffers()
        network = self.evaluated_network()
        network.eval()
        validated = self.validate(network, lambda: self.stopper.signum is not None)
        self.network.train()
        if validated is None:
            return False
        figures, unreadable = validated
        self._note_unreadable(unreadable)
        self.progress.pending = False
        log.validation(self.progress.step, self.epoch, self.progress.seconds, figures)
        if not figures:
            return False
        first = next(iter(figures.values()))
        # Few held-out people often give the same figure twice; the later network has learned more.
        is_best = first >= self.progress.best
        if is_best:
            self.progress.best, self.progress.best_step = first, self.progress.step
        return is_best

    def _share_buffers(self) -> None:
        """Give all ranks the running statistics of rank 0, as each forward pass does."""
        buffers = dict(self.network.named_buffers())
        averages = self.average.average if self.average is not None else {}
        averaged = [averages[key] for key in buffers if averages]
        tensors = [*buffers.values(), *averaged, *self.head.buffers()]
        self.world.share([tensor for tensor in tensors if tensor.is_floating_point()])

    def _save(self, best: bool) -> None:
        self._check_loss()
        self._share_buffers()
        # An update may overflow, and a fused head has taken its step before anything is known.
        parameters = [p for module in self.step.modules.values() for p in module.parameters()]
        finite = all(bool(local(p.detach()).isfinite().all()) for p in parameters)
        if self.world.count(not finite)[0]:
            raise UserError(
                f"training diverges: the weights are not finite at step {self.progress.step}; "
                f"lower training.lr; {self._last_good()}"
            )
        self.checkpointer.save(
            self.progress.step,
            model=self.evaluated_network(),
            state=self._state(),
            progress=vars(self.progress),
            run=self.record,
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
        state = ckpt.training_state(self.step.modules, self.optimizers)
        if self.average is not None:
            state["average"] = self.average.average
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        state[f"rng.{self.world.rank}"] = ckpt.rng_state(self.world.device)
        return state
