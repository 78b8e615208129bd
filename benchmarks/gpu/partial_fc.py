"""Exact and sampled SphereFace2 against Partial-FC, a whole training step with IResNet-100.

`PartialFC` is our own implementation of An et al., "Killing Two Birds with One Stone: Efficient and
Robust Training of Face Recognition CNNs by Partial FC" (CVPR 2022), on one device: each step trains
the batch's own classes and a random sample of the others up to a share of all, with ArcFace over
the sample, and updates the sampled rows and their momentum alone. Its products run under
half-precision autocast, its prototypes and momentum are float32.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpu import measure
from gpu.heads import SGD, Inputs
from gpu.measure import Part, Step
from sphereface2 import backbones

RIVAL = "Partial-FC ArcFace 0.1"
SHARE = 0.1
BATCH = 128
PEOPLE = (1_000_000, 10_000_000, 4_000_000)
TOGETHER = 4_000_000
"""Up to so many people all contenders fit on one card at once."""


class PartialFC(nn.Module):
    """ArcFace over the batch's own classes and a random sample of the others.

    Args:
        embedding_dim: d.
        num_classes: C.
        share: share of the classes that a step trains, in (0, 1].
        s, m: ArcFace's scale and margin in radians.
        lr, momentum, weight_decay: of the SGD over the sampled rows.
        dtype: of the products under autocast; float32: no autocast.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_classes: int,
        *,
        share: float = SHARE,
        s: float = 64.0,
        m: float = 0.5,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.share, self.s, self.m, self.dtype = share, s, m, dtype
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        shape = (num_classes, embedding_dim)
        self.register_buffer("weight", torch.empty(shape, device=device).normal_(std=0.01))
        self.register_buffer("velocity", torch.zeros(shape, device=device))
        self.weight: Tensor
        self.velocity: Tensor

    def sample(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Ascending rows to train, and the labels among them."""
        classes = len(self.weight)
        score = torch.rand(classes, device=labels.device)
        score[labels] = 2.0  # own classes come first
        count = max(int(self.share * classes), len(labels))
        rows = score.topk(min(count, classes)).indices.sort().values
        return rows, torch.searchsorted(rows, labels)

    def backward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Send the gradient into ``embeddings``, take the step of the sampled rows; the loss."""
        rows, own = self.sample(labels)
        sampled = self.weight[rows].requires_grad_()
        with torch.autocast(
            embeddings.device.type, self.dtype, enabled=self.dtype != torch.float32
        ):
            cos = F.linear(F.normalize(embeddings.float()), F.normalize(sampled))
        cos = cos.float().clamp(-1, 1)
        samples = torch.arange(len(own), device=own.device)
        target = cos[samples, own]
        moved = target * math.cos(self.m) - (1 - target.square()).clamp_min(0).sqrt() * math.sin(
            self.m
        )
        falling = target - self.m * math.sin(self.m)
        target = torch.where(target > -math.cos(self.m), moved, falling)
        logits = cos.index_put((samples, own), target) * self.s
        loss = F.cross_entropy(logits, own)
        loss.backward()
        self.update(rows, sampled)
        return loss.detach()

    @torch.no_grad()
    def update(self, rows: Tensor, sampled: Tensor) -> None:
        """SGD with momentum on the sampled rows."""
        assert sampled.grad is not None
        gradient = sampled.grad.add_(sampled, alpha=self.weight_decay)
        velocity = self.velocity[rows].mul_(self.momentum).add_(gradient)
        self.velocity[rows] = velocity
        self.weight[rows] = sampled.add_(velocity, alpha=-self.lr)


class Backbone:
    """A network in training, bfloat16 autocast and channels-last, with SGD.

    On a GPU its forward and backward passes are CUDA graphs: launched one by one, a thousand
    kernels of IResNet-100 would be bound by the host, and hide what the heads add.
    """

    def __init__(self, name: str, batch: int, device: torch.device, **options: object) -> None:
        self.device = device
        net = backbones.build(name, **options).to(device)
        self.network = net.to(memory_format=torch.channels_last).train()
        side = net.preprocessing.size
        self.pixels = torch.randn(batch, 3, *side, device=device).contiguous(
            memory_format=torch.channels_last
        )
        parameters = [p for p in net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(parameters, lr=0.01, fused=device.type == "cuda", **SGD)
        self.passes: Callable[[Tensor], Tensor] = self.network
        if device.type == "cuda":
            with self.autocast():
                self.passes = torch.cuda.make_graphed_callables(self.network, (self.pixels,))

    def autocast(self) -> torch.autocast:
        # A cast that a graph holds must not be taken from the cache of a pass outside of it.
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)

    def forward(self) -> Tensor:
        with self.autocast():
            return self.passes(self.pixels)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def run(part: Part) -> None:
    device = part.device
    batch, name = (8, "sfnet4") if part.tiny else (BATCH, "iresnet100")
    options = {"width": 0.125, "input_size": 32, "embedding_dim": 16} if part.tiny else {}
    backbone = Backbone(name, batch, device, **options)
    dim = backbone.network.embedding_dim

    def bare() -> None:
        backbone.forward().float().square().sum().backward()
        backbone.update()

    def ours(people: int, **choice: object) -> Step:
        kept = "bfloat16" if people > 4_000_000 else "float32"
        head = Inputs(batch, dim, people, device).fused_head(
            "bfloat16" if kept == "bfloat16" else "full",
            weight_dtype=kept,
            compute="bf16",
            **choice,
        )
        labels = torch.randint(people, (batch,), device=device)

        def step() -> None:
            head(backbone.forward(), labels).backward()
            backbone.update()

        return step

    def partial(people: int) -> Step:
        head = PartialFC(dim, people, device=device)
        labels = torch.randint(people, (batch,), device=device)

        def step() -> None:
            head.backward(backbone.forward(), labels)
            backbone.update()

        return step

    contenders = {
        RIVAL: partial,
        "SphereFace2 exact": lambda people: ours(people),
        "SphereFace2 sampled 0.1": lambda people: ours(
            people, negatives="uniform", negative_share=SHARE
        ),
    }
    for people in (500, 2_000) if part.tiny else PEOPLE:
        # All in turns where they fit together, else one by one beside the bare backbone.
        names = list(contenders)
        rival: float | None = None
        for group in [names] if people <= TOGETHER else [[name] for name in names]:
            if part.left < 5 and not part.tiny:
                part.record(people=people, heads=group, error="no time was left")
                continue
            found: dict[str, measure.Row] = {}
            with part.attempting(people=people, heads=group):
                found = compare(part, {name: contenders[name] for name in group}, people, bare)
            for head, row in found.items():
                rival = row["ms a step"] if head == RIVAL else rival
                ratio = rival and row["ms a step"] / rival
                part.record(people=people, head=head, batch=batch, **row, **{"× Partial-FC": ratio})


def compare(
    part: Part, builds: dict[str, Callable[[int], Step]], people: int, bare: Step
) -> dict[str, measure.Row]:
    """Whole steps in turns with the backbone's part of them."""
    steps: dict[str, Step] = {}
    peaks: dict[str, float | None] = {}
    with measure.matmul_precision("high"):
        for name, build in builds.items():
            held = measure.held_gib(part.device)
            steps[name] = build(people)
            steps[name]()
            peak = measure.peak_gib(steps[name], part.device)
            peaks[name] = peak and peak - held
        seconds = 0 if part.tiny else 2.0 * len(steps)
        times = measure.in_turns({**steps, "bare": bare}, part.device, seconds=seconds, warm_up=1)
    return {
        name: {
            "GiB beyond the backbone": peaks[name],
            "ms a step": statistics.median(times[name]),
            "backbone alone ms": statistics.median(times["bare"]),
        }
        for name in steps
    }
