"""One optimiser step: batches -> embeddings -> loss -> gradient -> update."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sphereface2 import backbones, heads
from sphereface2.cuda_graph import Graphed
from sphereface2.data.dataset import Batch
from sphereface2.device import sent
from sphereface2.errors import UserError, counted
from sphereface2.training.config import RunConfig, head_options
from sphereface2.training.distributed import World
from sphereface2.training.optim import build_optimizers, clip_gradients, drop_gradients
from sphereface2.training.starting import freeze
from sphereface2.training.teacher import Teacher
from sphereface2.training.watch import LossWatch

AUTOCAST = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
GRAPHED = ["cuda"]
"""Devices whose steps can be recorded."""


def channels_last_is_sound(network: nn.Module, device: torch.device) -> bool:
    """Whether torch computes the gradients of images in that layout soundly.

    On MPS those of batch normalisation are wrong (pytorch issue 175189). On a CPU those of a
    convolution of 1×1 pixels with a stride, from fewer than 16 channels, are written past their
    memory and end the process (torch 2.14, AVX-512).
    """
    if device.type != "cpu":
        return device.type != "mps"
    return not any(
        isinstance(layer, nn.Conv2d)
        and layer.kernel_size == (1, 1)
        and max(layer.stride) > 1
        and layer.in_channels < 16
        for layer in network.modules()
    )


def compile_units(network: nn.Module, device: torch.device) -> None:
    """Compile the units that a network is made of, in place, each kind and shape of unit once.

    A unit is a module nearest the root whose class is not torch's own. That takes a fraction of
    the time that compiling the whole takes, as IResNet-100's 49 residual units are of eight kinds.
    """
    from torch._dynamo import config  # imports the compiler, in seconds

    # Shapes of one class that are compiled; with more the rest would run as it is.
    config.recompile_limit = max(config.recompile_limit, 32)

    def units(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            if type(child).__module__.startswith("torch.nn."):
                yield from units(child)
            else:
                yield child

    # By itself the compiler takes a CPU's convolutions to channels-last.
    layout = {} if channels_last_is_sound(network, device) else {"layout_optimization": False}
    for unit in list(units(network)) or [network]:
        unit.compile(dynamic=False, options=layout)


def check_compiler(device: torch.device) -> None:
    """UserError if torch.compile lacks something here, told before anything is trained."""
    from torch._dynamo.exc import BackendCompilerFailed

    try:
        torch.compile(torch.neg)(torch.ones(2, device=device))
    except BackendCompilerFailed as error:
        why = str(error).strip().partition("\n")[0]
        raise UserError(
            f"training.compile: torch cannot compile here ({why}); install what it lacks, g++ for "
            "a CPU or Triton for a GPU, or set training.compile to false"
        ) from error


class TrainingStep:
    """Network, head and optimisers of a run; called with batches it takes one optimiser step.

    The host waits for the device nowhere in a step, except where the step cannot be taken without:
    a gradient scaler (fp16) asks whether the gradient overflowed, and hard negatives are searched
    on the host. With ``training.cuda_graph`` the steps from the fourth on replay one graph, for
    which every number that changes is on the device: rates and the step's number go there with the
    labels. Parameters and the optimisers' states must then stay where they are.

    A step whose loss or gradient is not finite, or by which training diverges, is decided on the
    device, alike on all ranks: its gradient, and that of every step after it, counts as 0, so that
    the weights stay finite until the host reads of it in `watch`. Momentum and weight decay move
    them until then, and a fused head has taken the step already. None of it lasts: who validates
    or saves the weights must read `watch` before, and a run goes on from its last checkpoint.

    Args:
        config: the whole configuration.
        world: this process's place.
        num_classes: labels are 0 … ``num_classes`` - 1, which is not checked again.
        teacher: whose embeddings those of the network follow, if any.

    Attributes:
        network, head, teacher, samples: bare modules, on the device; ``samples`` is the loss
            between samples, if there is one.
        samples_from: number of the first step in which that loss counts.
        forward, loss, distil: the same as they are called: replicated over the ranks. With
            ``training.compile`` the network's units are compiled in place; a deep copy's are not.
        optimizers: of all parameters.
        scaler: of gradients, for fp16.
        watch: the losses.
    """

    def __init__(
        self, config: RunConfig, world: World, num_classes: int, teacher: Teacher | None = None
    ) -> None:
        self.config, self.world = config, world
        settings = config.training
        device = world.device

        torch.manual_seed(config.seed)
        network = backbones.build(**config.backbone)
        freeze(network, settings)
        options, sharded = head_options(config)
        if sharded and world.size > 1:
            options["process_group"] = world.group
        with device:
            head = heads.build(
                **options, embedding_dim=network.embedding_dim, num_classes=num_classes
            )
        # From here on ranks draw differently (dropout); the parameters above are equal.
        torch.manual_seed(config.seed * 1_000_003 + world.rank + 1)
        last = settings.channels_last and channels_last_is_sound(network, device)
        self.memory_format = torch.channels_last if last else torch.contiguous_format
        self.network = network.to(device).to(memory_format=self.memory_format)
        self.head = head.to(device)
        self.head.trust_batches = True
        self.teacher = None if teacher is None else teacher.to(device)
        if self.teacher is not None:
            self.teacher.place_prototypes(self.head)
        self.samples, self.samples_from = self._between_samples(num_classes), 2
        self.optimizers = build_optimizers(
            settings, self.network, self.head, self.teacher, self.samples
        )
        self.dtype = AUTOCAST[settings.autocast]
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.autocast == "fp16")

        if settings.compile:
            check_compiler(device)
            compile_units(self.network, device)
        # Trying cuDNN's algorithms pays for one shape of batch; which one wins may differ by run.
        if device.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
            torch.backends.cudnn.benchmark = True
        self.forward = self._replicate(self.network)
        # A sharded head does its own communication.
        self.loss = self.head if self.head.shard.group else self._replicate(self.head)
        self.head.sync_statistics = world.size > 1 and self.head.shard.group is None
        self.distil = None if self.teacher is None else self._replicate(self.teacher)
        if settings.fused_head and isinstance(self.loss, DistributedDataParallel):
            raise UserError(
                "training.fused_head on several ranks needs head.sharded true: replicas of the "
                "prototypes would take different steps"
            )
        self.watch = LossWatch(
            device, settings.max_loss_ratio, check_norm=not self.scaler.is_enabled()
        )
        self._graph = self._graphed() if settings.cuda_graph else None

    def _between_samples(self, num_classes: int) -> heads.SampleToSample | None:
        wanted, world = self.config.sample_to_sample, self.world
        if not wanted.weight:
            return None
        group = world.group if world.size > 1 else None
        with world.device:
            return heads.SampleToSample(
                self.network.embedding_dim, num_classes, wanted, group, even=True
            )

    def _graphed(self) -> Graphed[tuple[Tensor, Tensor]]:
        """The step as a CUDA graph.

        Raises:
            UserError: not here.
        """
        if self.world.device.type not in GRAPHED or self.world.size > 1:
            raise UserError(
                "training.cuda_graph must be false except on one CUDA device, and this is "
                f"{self.world.device.type} with {counted(self.world.size, 'rank')}: leave it out"
            )
        if self.teacher is not None:
            self.teacher.keep_on(self.world.device)
        return Graphed(self._recorded, self.world.device, "the training step")

    def _replicate(self, module: nn.Module) -> nn.Module:
        trainable = any(p.requires_grad for p in module.parameters())
        if self.world.size == 1 or not trainable:
            return module
        ids = [self.world.device] if self.world.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)

    def _replicas(self) -> list[DistributedDataParallel]:
        modules = (self.forward, self.loss, self.distil)
        return [one for one in modules if isinstance(one, DistributedDataParallel)]

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The bare modules that are trained, by name."""
        found = {"backbone": self.network, "head": self.head}
        if self.teacher is not None and any(True for _ in self.teacher.parameters()):
            found["teacher"] = self.teacher
        if self.samples is not None:
            found["samples"] = self.samples
        return found

    def begin(self, batch_size: int) -> None:
        """Training mode; to be called before the first step.

        Args:
            batch_size: images of a batch of this rank.
        """
        self.forward.train()
        self.loss.train()
        self._settle(batch_size)

    def _settle(self, count: int) -> None:
        """Let DistributedDataParallel put its gradients in their final order before the first step.

        It does so after its first backward pass. The sum over three ranks or more depends on the
        order in its last bits, and so would a resumed run.
        """
        replicated = self._replicas()
        if self.world.size < 3 or not replicated:
            return
        tensors = [
            tensor for module in replicated for tensor in [*module.parameters(), *module.buffers()]
        ]
        before = [tensor.detach().clone() for tensor in tensors]
        device = self.world.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            shape = (count, 3, *self.network.preprocessing.size)
            images = torch.randint(256, shape, dtype=torch.uint8, device=device)
            pixels = self.network.preprocessing(images).contiguous(memory_format=self.memory_format)
            with torch.autocast(device.type, self.dtype, enabled=self.dtype is not None):
                embeddings = self.forward(pixels)
                loss = embeddings.sum()
                if self.loss in replicated:
                    loss = loss + self.loss(
                        embeddings, torch.zeros(count, dtype=torch.int64).to(device)
                    )
                if self.distil in replicated and self.teacher is not None:
                    targets = self.teacher.of(torch.zeros(count, dtype=torch.int64))
                    loss = loss + self.distil(embeddings, targets.to(device))
            loss.backward()
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
                tensor.grad = None

    def __call__(self, batches: Sequence[Batch], step: int = 1) -> tuple[Tensor, Tensor]:
        """Take a step.

        Args:
            batches: one for each forward-backward pass, of equal size on all ranks.
            step: its number, from 1, to be told if it goes wrong.

        Returns:
            () mean loss over the ranks, without that between samples, which would make it jump, and
            () norm of the gradient before clipping, on the device; with ``training.cuda_graph`` the
            next step overwrites them.
        """
        between = self.samples
        starts = between is not None and step >= self.samples_from and not between.is_started
        if self._graph is None or starts:
            return self._take(batches, step)
        (batch,) = batches
        # All numbers travel as one tensor: the bits of pairs of float32 as int64.
        numbers = [group["lr"] for group in self._groups] + [step]
        numbers += [0] * (len(numbers) % 2)
        floats = torch.tensor(numbers, dtype=torch.float32)
        packed = torch.cat([batch.labels, batch.positions, floats.view(torch.int64)])
        if self.world.device.type == "cuda":
            packed = packed.pin_memory()
        return self._graph(batch.images, packed)

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def _recorded(self, images: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
        """The step of what `__call__` has packed: nothing in it is a number of Python."""
        count, groups = len(images), self._groups
        labels, positions = packed[: 2 * count].split(count)
        *rates, step = packed[2 * count :].view(torch.float32)[: len(groups) + 1].unbind()
        kept = [group["lr"] for group in groups]
        try:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
            return self._take([Batch(images, labels, [], positions)], step)
        finally:
            for group, number in zip(groups, kept, strict=True):
                group["lr"] = number

    def _take(self, batches: Sequence[Batch], step: int | Tensor) -> tuple[Tensor, Tensor]:
        device, settings = self.world.device, self.config.training
        total = torch.zeros((), device=device)
        for index, batch in enumerate(batches):
            with contextlib.ExitStack() as stack:
                if index + 1 < len(batches):
                    for module in self._replicas():
                        stack.enter_context(module.no_sync())
                images = sent(batch.images, device)
                labels = sent(batch.labels, device)
                pixels = self.network.preprocessing(images).contiguous(
                    memory_format=self.memory_format
                )
                with torch.autocast(device.type, self.dtype, enabled=self.dtype is not None):
                    embeddings = self.forward(pixels)
                    if settings.clip_embedding_norm is not None:
                        embeddings.register_hook(self._clip_embedding_gradient)
                    told = self._losses(embeddings, labels, batch)
                    loss = told + self._of_samples(embeddings, labels, step)
                self.scaler.scale(loss / len(batches)).backward()
            total += told.detach() / len(batches)
        total = self.world.sum(total) / self.world.size
        eager = [one for one in self.optimizers if not isinstance(one, heads.FusedSGD)]
        for optimizer in eager:
            self.scaler.unscale_(optimizer)
        parameters = [p for module in self.modules.values() for p in module.parameters()]
        norm = clip_gradients(parameters, settings.clip_norm)
        drop_gradients(parameters, self.watch.observe(total, norm, step))
        for optimizer in eager:
            self.scaler.step(optimizer)
        self.scaler.update()
        for optimizer in eager:
            optimizer.zero_grad(set_to_none=True)
        return total, norm

    def _losses(self, embeddings: Tensor, labels: Tensor, batch: Batch) -> Tensor:
        """The head's loss and the teacher's, weighted; one that weighs nothing is left out."""
        if self.distil is None or self.teacher is None:
            return self.loss(embeddings, labels)
        weights = self.config.teacher
        targets = sent(self.teacher.of(batch.positions), self.world.device)
        loss: Tensor = weights.weight * self.distil(embeddings, targets)
        return loss + weights.labels * self.loss(embeddings, labels) if weights.labels else loss

    def _of_samples(self, embeddings: Tensor, labels: Tensor, step: int | Tensor) -> Tensor | float:
        """The loss between samples, where it counts; the batch is remembered for the next."""
        between = self.samples
        if between is None:
            return 0.0
        counts = step >= self.samples_from
        loss: Tensor | float = 0.0
        if isinstance(counts, Tensor):  # decided on the device in each replay
            loss = between(embeddings, labels) * counts
        elif counts:
            between.start(embeddings, labels)
            loss = between(embeddings, labels)
        between.remember(embeddings, labels)
        return loss

    def _clip_embedding_gradient(self, gradient: Tensor) -> Tensor:
        """Scale the batch's gradient by its embeddings (of all ranks) down to the limit."""
        limit = self.config.training.clip_embedding_norm
        assert limit is not None
        squares = self.world.sum(gradient.float().square().sum())
        # Ranks average their gradients, and a scaler's factor is not part of them.
        factor = self.scaler.scale(torch.ones((), device=squares.device))
        norm = squares.sqrt() / (self.world.size * factor)
        return gradient * (limit / (norm + 1e-6)).clamp(max=1).to(gradient.dtype)
