"""A loss between samples, to be added to a loss over classes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from sphereface2.errors import check_count, check_number
from sphereface2.heads.base import check_batch, unit_rows
from sphereface2.heads.blocks import Block, default_chunk
from sphereface2.heads.sharding import Shard, local
from sphereface2.heads.streaming import Work, streamed_one_vs_all
from sphereface2.margins import BinaryMargin, Own


@dataclass
class SampleToSampleConfig:
    """A loss between samples beside the head's, see `heads.SampleToSample`."""

    weight: Annotated[float, Field(ge=0, le=1e38)] = 0.0
    """Of this loss, beside that of the head; 0: none. The loss that is logged is without it."""
    s: Annotated[float, Field(gt=0, le=1e38)] = 64.0
    """Scale of the similarities."""
    m: Annotated[float, Field(ge=0, le=1e38)] = 0.1
    """Margin of the positive."""
    begin: Annotated[float, Field(ge=0, le=1e38)] = 1.0
    """Epochs after which it counts; the memory is filled from the first step on."""


class SampleToSample(nn.Module):
    """The unified loss between samples (USS): UCE whose prototypes are a memory of images.

    L = softplus(-(s·(⟨x, v_y⟩ - m) - b')) + Σ_{i≠y} softplus(s·⟨x, v_i⟩ - b') and the mean over the
    batch, where v_i is the unit embedding of the last image of person i that was seen, without
    gradient; people of whom none was seen are left out. After its loss, a batch takes its place in
    the memory, of several images of a person the last one. b' is learned, from the batch's mean of
    log Σ_{i≠y} exp(s·⟨x, v_i⟩) at the first use. As in `UCE`, it is SphereFace2's loss with t = 1,
    r = s, λ = ½, the margin m/2 on both sides, the bias b = -b' - s·m/2 and the weight 2s.
    Li et al., "UniTSFace: Unified Threshold Integrated Sample-to-Sample Loss for Face Recognition",
    NeurIPS 2023, who add it to the loss over classes from the second pass on.

    Args:
        embedding_dim: d, ≥ 1.
        num_classes: C, ≥ 2.
        config: scale, margin and weight, which must be above 0.
        process_group: of torch.distributed; the memory is sharded over its ranks, each of which
            calls the module with its own samples, as with a sharded `Head`.
        even: all ranks have equally many samples, labels are known to lie in 0 … C - 1, and the
            memory holds somebody at the first `start`. None of it is checked then, for which a
            GPU's host would wait.

    Each step calls `start`, which acts once, the loss itself and `remember`, with embeddings (B, d)
    of any floating type and integer labels (B,).

    Raises:
        UserError: in the constructor, a value out of its range; in a call, shapes that do not fit,
            an empty batch, or a label outside 0 … C - 1.

    Attributes:
        memory: (C, d) buffer, v, 0 where nobody was seen; a DTensor split by rows with a group.
        bias: () parameter, b.
        started: () bool buffer, whether ``bias`` has got its start.

    Example:
        >>> between = SampleToSample(2, 3, SampleToSampleConfig(weight=1.0, s=16.0))
        >>> for batch in torch.tensor([[9.0, 9.0], [9.0, 0.0]]), torch.tensor([[2.0, 0], [0, 1]]):
        ...     labels = torch.tensor([0, 2])
        ...     between.start(batch, labels)
        ...     loss = between(batch, labels)
        ...     between.remember(batch, labels)
        >>> between.memory
        tensor([[1., 0.],
                [0., 0.],
                [0., 1.]])
    """

    memory: Tensor
    started: Tensor

    def __init__(
        self,
        embedding_dim: int,
        num_classes: int,
        config: SampleToSampleConfig,
        process_group: dist.ProcessGroup | None = None,
        *,
        even: bool = False,
    ) -> None:
        super().__init__()
        check_count("embedding_dim", embedding_dim, 1)
        check_count("num_classes", num_classes, 2)
        check_number("weight", config.weight, above=0)
        check_number("s", config.s, above=0)
        check_number("m", config.m, least=0)
        self.config, self.even = config, even
        self.sizes = num_classes, embedding_dim
        self.margin = BinaryMargin("C", lam=0.5, r=config.s, m=config.m / 2, t=1.0)
        self.shard = Shard.of(num_classes, process_group)
        rows = torch.zeros(self.shard.rows, embedding_dim)
        self.register_buffer("memory", self.shard.distribute(rows, num_classes))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self.bias = nn.Parameter(torch.zeros(()))
        self.is_started = False  # as `started`, without waiting for the device
        self.register_load_state_dict_post_hook(_read_started)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss, () as a streaming head's."""
        labels = check_batch(embeddings, labels, *self.sizes, trusted=self.even)
        with torch.autocast(embeddings.device.type, enabled=False):
            x = unit_rows(embeddings.to(torch.promote_types(embeddings.dtype, self.memory.dtype)))
            memory = local(self.memory)
            samples = len(x) * self.shard.size
            chunk = default_chunk(x.device.type, samples, x.shape[1])
            work = Work(
                self.margin,
                self.shard,
                lambda _, own: self._plan(own, chunk),
                visits_all=True,
                scale=2 * self.config.s * self.config.weight,
                chunk=chunk,
                even=self.even,
            )
            return streamed_one_vs_all(x, memory, self.bias.to(x.dtype), labels, work)

    def _plan(self, own: Tensor, chunk: int) -> Iterator[Block]:
        """All rows of the memory, without the people who have none."""
        memory = local(self.memory)
        if not len(memory):
            return
        empty = ~memory.any(1)
        own = own.where(~empty[own.clamp(0, len(memory) - 1)], -1)
        for start in range(0, len(memory), chunk):
            stop = min(start + chunk, len(memory))
            own_here = Own(own, start, stop - start)
            yield Block(slice(start, stop), own_here, skip=empty[start:stop])

    @torch.no_grad()
    def remember(self, embeddings: Tensor, labels: Tensor) -> None:
        """Put the batch of all ranks into the memory."""
        labels = check_batch(embeddings, labels, *self.sizes, trusted=self.even)
        memory = local(self.memory)
        x = unit_rows(embeddings.detach().to(memory.dtype))
        batch = self.shard.gather(x, labels, even=self.even)
        if not len(memory):
            return
        own = batch.labels - self.shard.start
        # Rows of other ranks stand for one of this rank's. Whatever is named several times is
        # written with the same values, and nothing waits for the device.
        rows = own.clamp(0, len(memory) - 1)
        ordered, order = own.sort(stable=True)
        last = order[(torch.searchsorted(ordered, rows, right=True) - 1).clamp_min(0)]
        new = batch.x[last]
        # What is not finite, in a step that is skipped, would stay until the person's next image.
        seen = (own[last] == rows) & new.isfinite().all(1)
        memory.index_copy_(0, rows, new.where(seen[:, None], memory[rows]))

    @torch.no_grad()
    def start(self, embeddings: Tensor, labels: Tensor) -> None:
        """Give the bias its start, unless it has it or the memory has nobody to meet."""
        labels = check_batch(embeddings, labels, *self.sizes, trusted=self.even)
        if self.is_started:
            return
        memory = local(self.memory)
        batch = self.shard.gather(unit_rows(embeddings.to(memory.dtype)), labels, even=self.even)
        levels = batch.x.new_full((len(batch.x),), -torch.inf)
        chunk = default_chunk(memory.device.type, *batch.x.shape)
        for block in self._plan(batch.labels - self.shard.start, chunk):
            z = (batch.x @ memory[block.rows].T).mul_(self.config.s)
            block.own.put_(z, -torch.inf)
            assert block.skip is not None
            z.masked_fill_(block.skip, -torch.inf)
            levels = torch.logaddexp(levels, z.logsumexp(1))
        levels = self.shard.logsumexp(levels)
        met = levels > -torch.inf  # not where the memory has nobody else
        if not self.even and not met.any():
            return
        level = levels.where(met, 0.0).sum() / met.sum().clamp_min(1)
        self.bias.copy_(-level - self.config.s * self.config.m / 2)
        self.started.fill_(True)
        self.is_started = True


def _read_started(module: nn.Module, _: object) -> None:
    module.is_started = bool(module.started)  # type: ignore[assignment]
