"""The cost model of the heads (`head_cost.py`) against measurements, and evaluated.

Claim: memory, operations and memory traffic of a training step are what the formulas say. Peak
memory is measured in fresh processes, operations and traffic are counted by watching every operator
of a step, time is a ratio to the three bare matrix products in the same process. Messages are
measured by `benchmarks/sharded.py`.

    python benchmarks/cost_model.py             # predicted beside measured, then the tables
    python benchmarks/cost_model.py --tables    # the tables for clusters only
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import head_cost as cost
from head_cost import Cost
from heads import contender, peak_memory, seconds
from sphereface2 import backbones, heads

GB = 1e9


# --- Steps that run here, and what the model says of them ----------------------------------------


@dataclass(frozen=True)
class Setup:
    """A head with its optimiser, and its cost."""

    name: str
    head: str
    cost: Callable[..., Cost]
    scaling: dict[str, Any]
    momentum: str | None = None
    """Of a fused optimiser; None: torch.optim.SGD."""


SETUPS = {
    setup.name: setup
    for setup in (
        Setup(
            "SphereFace2 dense",
            "sphereface2",
            lambda *a, **k: cost.sphereface2(*a, form="dense", **k),
            {},
        ),
        Setup("SphereFace2 streaming", "sphereface2", cost.sphereface2, {"streaming": True}),
        Setup(
            "SphereFace2 fused",
            "sphereface2",
            lambda *a, **k: cost.sphereface2(*a, form="fused", **k),
            {"streaming": True},
            "full",
        ),
        Setup(
            "SphereFace2 fused, bf16 momentum",
            "sphereface2",
            lambda *a, **k: cost.sphereface2(*a, form="fused", momentum_bytes=2, **k),
            {"streaming": True},
            "bfloat16",
        ),
        Setup(
            "SphereFace2 fused, 10 % of negatives",
            "sphereface2",
            lambda *a, **k: cost.sphereface2(*a, form="fused", share=0.1, **k),
            {"negatives": "uniform", "negative_share": 0.1},
            "full",
        ),
        Setup("CosFace dense", "cosface", lambda *a, **k: cost.softmax(*a, form="dense", **k), {}),
        Setup(
            "CosFace streaming",
            "cosface",
            lambda *a, **k: cost.softmax(*a, form="streaming", **k),
            {"streaming": True},
        ),
    )
}


def training_step(
    setup: Setup, people: int, dim: int, batch: int, chunk: int
) -> Callable[[], None]:
    """Forward, backward and update of a head on random samples."""
    torch.manual_seed(0)
    scaling = {**setup.scaling, **({"chunk_size": chunk} if setup.scaling else {})}
    head = heads.build(setup.head, dim, people, **scaling)
    settings: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    rest = list(head.parameters())
    if setup.momentum:
        heads.FusedSGD(head, momentum_dtype=setup.momentum, **settings)  # type: ignore[arg-type]
        rest = [p for p in rest if p is not head.weight]
    optimizer = torch.optim.SGD(rest, foreach=False, **settings)
    x, labels = torch.randn(batch, dim), torch.randint(people, (batch,))

    def step() -> None:
        optimizer.zero_grad()
        head(x.requires_grad_(), labels).backward()
        x.grad = None
        optimizer.step()

    return step


class Count(TorchDispatchMode):
    """Counts the operations of matrix products and the elements that operators read and write.

    An operator that looks up or sets a few entries of a tensor by index counts with nothing, a view
    or an allocation too.
    """

    FREE = ("empty", "new_empty", "index", "index_put", "index_add", "gather", "nll_loss_forward")

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        if func.is_view or name.startswith(self.FREE) or func._schema.name == "aten::scatter_":
            return result
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        if name == "nll_loss_backward":
            given = {}
        read = [t for key, value in given.items() if key != "out" for t in tree_leaves(value)]
        tensors = [t for t in (*read, *tree_leaves(result)) if isinstance(t, torch.Tensor)]
        self.elements += sum(t.numel() for t in tensors)
        if name in ("mm", "addmm"):
            first, second = [t for t in read if isinstance(t, torch.Tensor)][-2:]
            self.flops += 2 * first.shape[0] * first.shape[1] * second.shape[1]
        return result


def counted(setup: Setup, people: int, dim: int, batch: int, chunk: int) -> tuple[float, float]:
    """Operations and bytes of memory traffic of one step."""
    step = training_step(setup, people, dim, batch, chunk)
    step()
    with Count() as count:
        step()
    return count.flops, cost.FLOAT * count.elements


def measured_memory(setup: Setup, people: int, dim: int, batch: int, chunk: int) -> float:
    """Peak bytes of two steps in a fresh process, beyond those of torch itself."""
    words = ["--worker", setup.name, *map(str, (people, dim, batch, chunk))]
    done = subprocess.run(
        [sys.executable, __file__, *words], capture_output=True, text=True, check=True
    )
    peak: float = json.loads(done.stdout.splitlines()[-1])
    return peak


def memory_worker(name: str, *shape: str) -> None:
    torch.set_num_threads(2)
    warm = training_step(SETUPS[name], 64, 8, 4, 16)
    warm(), warm()  # the libraries' own buffers
    before = peak_memory()
    step = training_step(SETUPS[name], *map(int, shape))  # type: ignore[arg-type]
    step(), step()
    print(json.dumps(1024 * (peak_memory() - before)))


def check(arguments: argparse.Namespace) -> None:
    shape = (arguments.people, arguments.dim, arguments.batch)
    chunk = arguments.chunk
    print(
        f"{shape[0]:,} people, {shape[1]}-d, batch {shape[2]}, {chunk} classes a block, "
        f"{arguments.threads} threads; forward, backward and update\n"
    )
    print(
        "| step | memory, model | measured | operations, model | counted | traffic, model | "
        "counted | products ×, model | time ×, measured |\n|---|---|---|---|---|---|---|---|---|"
    )
    for setup in SETUPS.values():
        told = setup.cost(*shape, **({"chunk": chunk} if setup.scaling else {}))
        memory = measured_memory(setup, *shape, chunk)
        flops, traffic = counted(setup, *shape, chunk)
        bare = contender("bare products", arguments.batch, arguments.dim, arguments.people)
        step = training_step(setup, *shape, chunk)
        bare(), step()
        ratio = statistics.median(
            1 / (seconds(bare) / seconds(step)) for _ in range(arguments.rounds)
        )
        bound = cost.sphereface2(*shape).flops
        print(
            f"| {setup.name} | {told.memory / GB:.2f} GB | {memory / GB:.2f} GB "
            f"| {told.flops / 1e9:.1f} G | {flops / 1e9:.1f} G "
            f"| {told.traffic / GB:.2f} GB | {traffic / GB:.2f} GB "
            f"| {told.flops / bound:.2f} | {ratio:.2f} |",
            flush=True,
        )
        del bare, step


# --- Clusters that are not here -------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """Peak figures of an accelerator and its links, from its maker's data sheet."""

    name: str = "H100 SXM"
    memory: float = 80e9
    flops: float = 67e12
    """float32 products, which is what the heads compute in."""
    half_flops: float = 989e12
    """Products in bfloat16, which is what a backbone computes in under autocast."""
    bandwidth: float = 3.35e12
    """Bytes/s of its memory."""
    link: float = 450e9
    """Bytes/s that it sends to others in its node."""
    network: float = 50e9
    """Bytes/s that it sends to other nodes (400 Gbit/s a GPU)."""
    node: int = 8
    """GPUs a node."""
    for_backbone: float = 20e9
    """Memory set aside for the backbone, its activations and its images."""

    def milliseconds(self, step: Cost) -> tuple[float, float, float]:
        """For the products, the memory traffic and the messages, each at full speed."""
        link = self.link if step.ranks <= self.node else self.network
        parts = (step.flops / self.flops, step.traffic / self.bandwidth, step.sent / link)
        products, traffic, messages = (1e3 * part for part in parts)
        return products, traffic, messages

    def fits(self, step: Cost) -> bool:
        """Whether the head leaves the backbone its memory."""
        return step.memory <= self.memory - self.for_backbone


GPU = Gpu()
EACH, DIM, SHARE = 128, 512, 0.1
CLUSTERS = (8, 64, 512)


def backbone_milliseconds(name: str) -> float:
    """Forward and backward pass of `EACH` images at full speed in bfloat16."""
    with torch.device("meta"), FlopCounterMode(display=False) as count:
        network = backbones.build(name, embedding_dim=DIM).eval()
        network(torch.empty(1, 3, *network.preprocessing.size))
    return 1e3 * 3 * EACH * count.get_total_flops() / GPU.half_flops


def rows(people: int) -> Iterator[tuple[str, list[Cost]]]:
    """Name and costs, one for each of `CLUSTERS`, of every way to train that many people."""

    def everywhere(build: Callable[[int], Cost]) -> list[Cost]:
        return [build(ranks) for ranks in CLUSTERS]

    yield (
        "softmax, a copy on each GPU",
        everywhere(lambda r: cost.replicated(cost.softmax(people, DIM, EACH, form="dense"), r)),
    )
    yield (
        "softmax, sharded",
        everywhere(lambda r: cost.softmax(people, DIM, EACH * r, ranks=r)),
    )
    yield (
        "softmax, sharded, Partial-FC 10 %",
        everywhere(lambda r: cost.softmax(people, DIM, EACH * r, ranks=r, share=SHARE)),
    )
    yield (
        "SphereFace2, sharded",
        everywhere(lambda r: cost.sphereface2(people, DIM, EACH * r, ranks=r)),
    )
    yield (
        "SphereFace2, sharded, fused",
        everywhere(lambda r: cost.sphereface2(people, DIM, EACH * r, ranks=r, form="fused")),
    )
    yield (
        "SphereFace2, sharded, fused, bf16 weights and momentum",
        everywhere(
            lambda r: cost.sphereface2(
                people, DIM, EACH * r, ranks=r, form="fused", weight_bytes=2, momentum_bytes=2
            )
        ),
    )
    yield (
        "SphereFace2, sharded, fused, 10 % of negatives",
        everywhere(
            lambda r: cost.sphereface2(people, DIM, EACH * r, ranks=r, form="fused", share=SHARE)
        ),
    )


def tables() -> str:
    """The cost of a step at 10 and 100 million people, as Markdown."""
    lines = [
        f"{GPU.name}: {GPU.memory / GB:.0f} GB, of which {GPU.for_backbone / GB:.0f} GB for the "
        f"backbone; {GPU.flops / 1e12:.0f} TFLOP/s in float32, {GPU.bandwidth / 1e12:.2f} TB/s; "
        f"{GPU.link / GB:.0f} GB/s within a node of {GPU.node}, {GPU.network / GB:.0f} GB/s "
        f"between nodes. {EACH} images a GPU, {DIM}-d. An asterisk: does not fit. "
        f"IResNet-100 beside it: {backbone_milliseconds('iresnet100'):.1f} ms at the least, in "
        f"bfloat16 at {GPU.half_flops / 1e12:.0f} TFLOP/s.",
    ]
    for people in (10_000_000, 100_000_000):
        header = " | ".join(f"{r} GPUs" for r in CLUSTERS)
        lines += [
            f"\n{people / 1e6:.0f} million people: memory a GPU in GB; then the least milliseconds "
            "for products + memory traffic + messages\n",
            f"| step | {header} | {header} |",
            "|---" * (1 + 2 * len(CLUSTERS)) + "|",
        ]
        for name, costs in rows(people):
            memory = [f"{c.memory / GB:.1f}{'' if GPU.fits(c) else ' *'}" for c in costs]
            times = [" + ".join(f"{t:.{int(t < 10)}f}" for t in GPU.milliseconds(c)) for c in costs]
            lines.append(f"| {name} | {' | '.join((*memory, *times))} |")
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        memory_worker(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--people", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tables", action="store_true", help="do not measure")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.tables:
        check(arguments)
        print()
    print(tables())


if __name__ == "__main__":
    main()
