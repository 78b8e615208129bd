"""Heads over many people against the three bare matrix products and against their rivals.

The bound is what no exact head can avoid: the logits and the two gradients, three products of
batch × dim × people. Every contender takes turns with the three products in the same precision
(``× bound``) and is also told against those in bf16, the fastest there are (``× bf16``). NOTES.md
beside this counts what each must do.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from gpu import measure
from gpu.measure import Part, Step
from heads import authors_formula
from sphereface2 import heads
from sphereface2.cuda_graph import Graphed
from sphereface2.heads import terms

BATCH, DIM = 1024, 512
PEOPLE = (1_000_000, 100_000)
SGD = {"momentum": 0.9, "weight_decay": 5e-4}


def products(batch: int, dim: int, people: int, device: torch.device, dtype: torch.dtype) -> Step:
    """The three bare products."""
    x = torch.randn(batch, dim, device=device, dtype=dtype)
    w = torch.randn(people, dim, device=device, dtype=dtype)

    def step() -> tuple[Tensor, Tensor]:
        logits = x @ w.T
        return logits @ w, logits.T @ x

    return step


class Inputs:
    """Random embeddings and labels, and steps over them."""

    def __init__(self, batch: int, dim: int, people: int, device: torch.device) -> None:
        self.dim, self.people, self.device = dim, people, device
        self.x = torch.randn(batch, dim, device=device, requires_grad=True)
        self.labels = torch.randint(people, (batch,), device=device)

    def head(self, name: str, **options: object) -> heads.Head:
        with drawn_on(self.device), self.device:
            head = heads.build(name, self.dim, self.people, **options)
        head.trust_batches = True  # as in training: labels are not checked, which would wait
        return head

    def step(self, loss: Callable[[Tensor, Tensor], Tensor], parameters: list[Tensor]) -> Step:
        """Forward and backward; the gradients are dropped."""

        def step() -> None:
            loss(self.x, self.labels).backward()
            for tensor in (self.x, *parameters):
                tensor.grad = None

        return step

    def ours(self, name: str, **options: object) -> Step:
        head = self.head(name, **options)
        return self.step(head, list(head.parameters()))

    def eager(self) -> Step:
        """Streaming without the kernel."""
        step = self.ours("sphereface2", streaming=True)

        def without() -> None:
            with patch.object(terms, "has_kernel", lambda: False):
                step()

        return without

    def fused_head(self, momentum: str = "full", **options: object) -> heads.Head:
        """A head that takes its step with the prototypes within the pass over them."""
        head = self.head("sphereface2", streaming=True, **options)
        heads.FusedSGD(head, 0.1, momentum_dtype=momentum, **SGD)
        return head

    def fused(self, **options: object) -> Step:
        """Forward, backward and the update within one pass."""
        head = self.fused_head(**options)
        return self.step(head, list(head.parameters()))

    def authors(self) -> Step:
        weight = torch.nn.Parameter(torch.randn(self.people, self.dim, device=self.device))
        bias = torch.nn.Parameter(torch.zeros((), device=self.device))
        return self.step(lambda x, labels: authors_formula(x, weight, bias, labels), [weight, bias])

    def metric_learning(self, half: bool = False) -> Step:
        from pytorch_metric_learning import losses

        module = losses.CosFaceLoss(num_classes=self.people, embedding_size=self.dim)
        module = module.to(self.device)

        def loss(x: Tensor, labels: Tensor) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
                return module(x, labels)

        return self.step(loss, list(module.parameters()))


def graphed(step: Step, device: torch.device) -> Step:
    """The step as a CUDA graph, which the host launches at once."""
    return Graphed(step, device, "the step") if device.type == "cuda" else step


@contextmanager
def drawn_on(device: torch.device) -> Iterator[None]:
    """Draw prototypes on the device.

    Heads draw them on the CPU, the same ones on every device, which takes a minute for ten million
    people and matters to no time of a step.
    """

    def draw(head: heads.Head, dtype: torch.dtype) -> Tensor:
        rows = torch.empty(head.shard.rows, head.embedding_dim, dtype=dtype, device=device)
        return rows.normal_()

    with patch.object(heads.Head, "_initial_weight", draw):
        yield


Build = Callable[[Inputs], Step]
HALF = {"momentum": "bfloat16", "weight_dtype": "bfloat16", "compute": "bf16"}
SAMPLED = {"negatives": "uniform", "negative_share": 0.1}
STREAMED = {"streaming": True}
CONTENDERS: list[tuple[str, str, Build]] = [
    ("SphereFace2 fused update, bf16 W and momentum", "bf16", lambda of: of.fused(**HALF)),
    ("first, as a CUDA graph", "bf16", lambda of: graphed(of.fused(**HALF), of.device)),
    ("SphereFace2 fused update", "bf16", lambda of: of.fused(compute="bf16")),
    ("SphereFace2 streaming", "bf16", lambda of: of.ours("sphereface2", compute="bf16")),
    ("SphereFace2 sampled 0.1, fused", "bf16", lambda of: of.fused(compute="bf16", **SAMPLED)),
    ("SphereFace2 streaming", "tf32", lambda of: of.ours("sphereface2", **STREAMED)),
    ("SphereFace2 fused update", "tf32", lambda of: of.fused()),
    ("SphereFace2 dense", "tf32", lambda of: of.ours("sphereface2")),
    ("CosFace streaming", "tf32", lambda of: of.ours("cosface", **STREAMED)),
    ("CosFace dense", "tf32", lambda of: of.ours("cosface")),
    ("SphereFace2 streaming, eager", "tf32", lambda of: of.eager()),
    ("authors' formula", "tf32", lambda of: of.authors()),
    ("first, 8,192 a block", "bf16", lambda of: of.fused(**HALF, chunk_size=8192)),
    ("first, 32,768 a block", "bf16", lambda of: of.fused(**HALF, chunk_size=32768)),
]
if importlib.util.find_spec("pytorch_metric_learning") is not None:
    CONTENDERS[5:5] = [
        ("pytorch-metric-learning CosFace", "tf32", lambda of: of.metric_learning()),
        ("pytorch-metric-learning CosFace", "bf16", lambda of: of.metric_learning(half=True)),
    ]


def run(part: Part) -> None:
    batch, dim = (32, 16) if part.tiny else (BATCH, DIM)
    sizes = (200, 500) if part.tiny else PEOPLE
    part.record(**measure.ceilings(part))
    each = part.left / (len(sizes) * len(CONTENDERS))
    for people in sizes:
        for name, precision, build in CONTENDERS:
            if part.left < 2:
                part.record(people=people, head=name, products=precision, error="no time was left")
                continue
            shape = (batch, dim, people, part.device)
            with part.measuring(people=people, head=name, products=precision) as row:
                torch.manual_seed(0)
                seconds = 0.0 if part.tiny else each / 3
                bound = torch.bfloat16 if precision == "bf16" else torch.float32
                with measure.matmul_precision("high"):
                    row |= compare(build, shape, part, seconds, bound)


def compare(
    build: Build,
    shape: tuple[int, int, int, torch.device],
    part: Part,
    seconds: float,
    bound: torch.dtype,
) -> measure.Row:
    """One contender in turns with its bounds."""
    device = part.device
    held = measure.held_gib(device)
    step = build(Inputs(*shape))
    step()
    peak = measure.peak_gib(step, device)
    contenders = {
        "step": step,
        "bf16": products(*shape, dtype=torch.bfloat16),
    }
    if bound != torch.bfloat16:
        contenders["bound"] = products(*shape, dtype=bound)
    times = measure.in_turns(contenders, device, seconds=seconds)
    return {
        "ms": statistics.median(times["step"]),
        "× bound": measure.median_ratio(times, "step", [*contenders][-1]),
        "× bf16": measure.median_ratio(times, "step", "bf16"),
        "bf16 products ms": statistics.median(times["bf16"]),
        "GiB": None if peak is None else peak - held,
    }
