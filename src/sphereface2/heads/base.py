"""What all heads share: the prototypes and the checks of a batch."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, TypedDict, Unpack, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sphereface2.errors import UserError, check_choice, check_count, check_flag, check_number
from sphereface2.heads.blocks import RowUpdate, default_chunk
from sphereface2.heads.sharding import Shard

DRAWN_ROWS = 8192
SMALLEST_NORM = 1e-12
"""An embedding shorter than this has no direction: its cosines are 0 and it gets no gradient."""


Negatives = Literal["all", "uniform", "hard"]
WeightType = Literal["float32", "bfloat16"]
Compute = Literal["float32", "bf16"]


class Scaling(TypedDict, total=False):
    """Keywords by which a head grows with the number of people; `Head` describes them."""

    streaming: bool
    chunk_size: int | None
    process_group: dist.ProcessGroup | None
    negatives: Negatives
    negative_share: float
    weight_dtype: WeightType
    compute: Compute


class Head(nn.Module):
    """A loss over classes: embeddings and labels in, one number out.

    Args:
        embedding_dim: d, the length of an embedding, ≥ 1.
        num_classes: C, the number of people, ≥ 2.
        streaming: work block after block of classes, so that memory besides W and its gradient
            does not grow with C. The other options of this list imply it.
        chunk_size: classes a block, ≥ 1; None: what suits the device.
        process_group: of torch.distributed; W is sharded over its ranks. Each rank calls the head
            with its own samples and gets its share of the loss: the mean over the ranks is the
            loss of all samples, and gradients are such that DistributedDataParallel's average over
            ranks is the gradient of that.
        negatives: "all" (default, exact). "uniform": the batch's own classes and a uniform sample
            of the others in each step, weighted so that loss and gradient are right on average.
            "hard": the prototypes nearest to the batch by an approximate index; biased.
        negative_share: share of the classes that a sample of negatives visits, in (0, 1].
        weight_dtype: "float32" (default), or "bfloat16" for W in half the memory, which needs a
            `FusedSGD`: it rounds stochastically, so that small steps are not lost on average.
        compute: "float32" (default), or "bf16" for products of bfloat16 numbers with float32 sums:
            faster where matrix units have them. Prototypes are cast a block at a time; cosines
            with other classes and all derivatives are rounded to 8 bits, those with the own class,
            the losses and the sums over blocks are not. Batches in float64 stay in float64.

    A head supports those of these options that `parameters` lists for it.

    Attributes:
        weight: (C, d) parameter, one prototype a person, xavier-normal at the start. Its rows are
            renormalised in place before every forward pass, so that the gradient reaches unit rows
            and weight decay cannot change a direction. A DTensor split by rows with a process
            group; its start does not depend on the number of ranks.

    Calling a head with embeddings (B, d) of any floating type and labels (B,) of an integer type
    returns the batch's loss, a scalar of at least float32. Autocast does not reach inside. Trainers
    of pytorch-metric-learning give None as a third argument where there is no miner.

    Raises:
        UserError: in the constructor, a value out of its range; in a call, shapes that do not fit,
            an empty batch, a label outside 0 … C - 1, a miner's tuples, or ranks of a process
            group whose heads differ.
    """

    scaling: ClassVar[frozenset[str]] = frozenset()
    """The keywords of `Scaling` that this head supports."""
    unit_rows: ClassVar[bool] = True
    """Whether the rows of `weight` are kept at length 1."""
    stored: DTensor | None = None
    """This rank's share of `weight` where `fully_shard` splits it, and gathers it in every pass."""
    fused: RowUpdate | None = None
    """The optimiser that takes its step within the forward pass, if there is one."""
    trust_batches: bool = False
    """Set it to True where the caller vouches for its batches, as the training loop does: labels
    are then not read to check their range, nor are other ranks asked whether their head is the
    same and how large their batches are, which must be equal. Either makes a GPU's host wait at
    every call; a first step without it finds most mistakes."""
    sync_statistics: bool = False
    """Set it to True where ranks train replicas of the head, each with its share of a batch, and
    call it together: running statistics (AdaFace, CurricularFace) are then those of the whole batch
    of the default process group, as with SyncBatchNorm."""

    def __init__(self, embedding_dim: int, num_classes: int, **scaling: Unpack[Scaling]) -> None:
        super().__init__()
        check_count("embedding_dim", embedding_dim, 1)
        check_count("num_classes", num_classes, 2)
        for name in scaling.keys() - self.scaling:
            raise UserError(f"{type(self).__name__} does not support {name}")
        self.embedding_dim = embedding_dim
        self.num_classes = num_classes
        group = scaling.get("process_group")
        self.negatives: Negatives = scaling.get("negatives", "all")
        check_choice("negatives", self.negatives, get_args(Negatives))
        self.negative_share = scaling.get("negative_share", 0.1)
        check_number("negative_share", self.negative_share, above=0, most=1)
        self.chunk_size = scaling.get("chunk_size")
        if self.chunk_size is not None:
            check_count("chunk_size", self.chunk_size, 1)
        self.compute: Compute = scaling.get("compute", "float32")
        check_choice("compute", self.compute, get_args(Compute))
        kept = scaling.get("weight_dtype", "float32")
        check_choice("weight_dtype", kept, get_args(WeightType))
        check_flag("streaming", streaming := scaling.get("streaming", False))
        implied = group is not None or self.chunk_size is not None or self.negatives != "all"
        implied = implied or self.compute != "float32" or kept != "float32"
        self.streaming = streaming or implied
        self.shard = Shard.of(num_classes, group)
        dtype = torch.bfloat16 if kept == "bfloat16" else torch.get_default_dtype()
        self.weight = nn.Parameter(self._initial_weight(dtype))

    def __setattr__(self, name: str, value: Any) -> None:
        # `fully_shard` puts the share in the place of what was gathered after every pass.
        if name == "weight" and isinstance(value, DTensor) and self.shard.group is None:
            vars(self)["stored"] = value
        super().__setattr__(name, value)

    def _initial_weight(self, dtype: torch.dtype) -> Tensor:
        """Xavier-normal rows of this rank, the same whatever the number of ranks and the device."""
        shard, d = self.shard, self.embedding_dim
        rows = torch.empty(shard.rows, d, dtype=dtype)
        deviation = math.sqrt(2 / (self.num_classes + d))
        # Drawn for all ranks in order. Torch draws normal numbers by 16, hence the round number.
        for first in range(0, self.num_classes, DRAWN_ROWS):
            drawn = torch.empty(min(DRAWN_ROWS, self.num_classes - first), d, device="cpu")
            drawn.normal_(0, deviation)
            low, high = max(first, shard.start), min(first + len(drawn), shard.stop)
            if low < high:
                rows[low - shard.start : high - shard.start] = drawn[low - first : high - first]
        return shard.distribute(rows, self.num_classes)

    @property
    def asks_host(self) -> str | None:
        """What must be otherwise for a step whose values the host does not look at, if anything."""
        return "negatives must be all or uniform" if self.negatives == "hard" else None

    def fuse(self, optimizer: RowUpdate) -> None:
        """Let ``optimizer`` take its step with `weight` within the forward pass.

        Raises:
            UserError: the head is not streaming, or its gradient is not known in one pass.
        """
        raise UserError(f"{type(self).__name__} needs its loss before its gradient: not fusible")

    def chunk(self, x: Tensor) -> int:
        """Classes a block for embeddings (B, d) of a rank."""
        samples = len(x) * self.shard.size
        return self.chunk_size or default_chunk(x.device.type, samples, self.embedding_dim)

    def forward(self, embeddings: Tensor, labels: Tensor, indices_tuple: None = None) -> Tensor:
        if indices_tuple is not None:
            raise UserError("a head compares with all prototypes and takes no tuples of a miner")
        sizes = self.num_classes, self.embedding_dim
        labels = check_batch(embeddings, labels, *sizes, trusted=self.trust_batches)
        dtype = torch.promote_types(embeddings.dtype, self.weight.dtype)
        dtype = torch.promote_types(dtype, torch.float32)
        if self.stored is not None and self.unit_rows:
            # What is gathered for the backward pass and what the optimiser moves is this.
            renormalise_(self.stored.detach(), dtype)
        with torch.autocast(embeddings.device.type, enabled=False):
            return self.loss(embeddings.to(dtype), labels)

    def loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Scalar loss of a checked batch: embeddings (B, d) in float32 or 64, labels (B,) int64."""
        raise NotImplementedError

    def cosine_gradients(self, embeddings: Tensor, labels: Tensor) -> Tensor | None:
        """∂L/∂cos θ_i of each sample, (B, C) in float32, for inspection.

        Args:
            embeddings: (B, d) float32, of which no gradient is taken.
            labels: (B,) int64.

        Returns:
            None where the loss is no function of the cosines, or W is sharded.
        """
        return None

    def unit_weight(self, dtype: torch.dtype) -> Tensor:
        """Renormalise the rows of `weight` in place and return it, (C, d), as `dtype`."""
        # Through .data, unseen by autograd: a backward pass still waiting for these rows may go
        # ahead unless an optimiser step came between.
        renormalise_(self.weight.data, dtype)
        return self.weight.to(dtype)

    def summary(self) -> dict[str, Any]:
        """JSON-able facts worth keeping beside the trained network."""
        return {"num_classes": self.num_classes}

    def extra_repr(self) -> str:
        return f"embedding_dim={self.embedding_dim}, num_classes={self.num_classes}"


def check_batch(
    embeddings: Tensor, labels: Tensor, classes: int, dim: int, *, trusted: bool
) -> Tensor:
    """Raise a UserError for a batch that does not fit; return the labels as int64.

    ``trusted``: the labels are known to lie in 0 … ``classes`` - 1 and are not read.
    """
    if not (isinstance(embeddings, Tensor) and isinstance(labels, Tensor)):
        given = " and ".join(type(one).__name__ for one in (embeddings, labels))
        raise UserError(f"embeddings and labels must be tensors, got {given}: give torch.tensor(…)")
    if labels.device != embeddings.device:
        raise UserError(
            f"labels must be on the device of the embeddings, {embeddings.device}, and are on "
            f"{labels.device}: give labels.to({str(embeddings.device)!r})"
        )
    if embeddings.ndim != 2 or embeddings.shape[1] != dim:
        raise UserError(f"embeddings must have shape (B, {dim}), got {tuple(embeddings.shape)}")
    if not embeddings.is_floating_point():
        raise UserError(f"embeddings must be floating point, got {embeddings.dtype}")
    if labels.shape != embeddings.shape[:1]:
        raise UserError(
            f"labels must have shape ({embeddings.shape[0]},), one for each embedding, "
            f"got {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise UserError(f"labels must be integers (int64), got {labels.dtype}")
    if len(labels) == 0:
        raise UserError("the batch is empty: embeddings must hold at least one row")
    labels = labels.long()
    if trusted:
        return labels
    lowest, highest = (int(bound) for bound in torch.stack(torch.aminmax(labels)).tolist())
    if lowest < 0 or highest >= classes:
        wrong = lowest if lowest < 0 else highest
        raise UserError(f"label {wrong} is outside 0 … {classes - 1}")
    return labels


def unit_rows(x: Tensor) -> Tensor:
    """Rows of (B, d) scaled to length 1, with gradient.

    Any magnitude is safe: nothing overflows or underflows on the way, and a row shorter than
    `SMALLEST_NORM` becomes 0 and gets gradient 0 rather than an immense one.

    Example:
        >>> unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    # The result does not depend on a row's scale, so dividing by a constant of its size is exact.
    size = x.detach().abs().amax(1, keepdim=True)
    x = x / size.masked_fill(size < SMALLEST_NORM, torch.inf)
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / norm.masked_fill(norm == 0, torch.inf)


def renormalise_(rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Scale the rows of (c, d) to length 1 in place, with norms computed in ``dtype``.

    Rows of length 1 up to rounding stay as they are, so that a forward pass for evaluation changes
    nothing.

    Example:
        >>> renormalise_(torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=dtype)
    norms.masked_fill_((norms - 1).abs() < 8 * torch.finfo(norms.dtype).eps, 1)
    return rows.div_(norms.clamp_min_(SMALLEST_NORM))
