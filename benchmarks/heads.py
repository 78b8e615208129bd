"""Heads over many people against the three bare matrix products, and against their rivals.

The bound is what no exact head can avoid: the logits and the two gradients, three products of
batch × dim × people. Every contender runs forward and backward on the same inputs, in turns with
the bound and the streaming SphereFace2 ("ours") within one process; a figure is the median ratio
of the turns of a round. Peak memory is measured in a fresh process for each, in all and beyond
what W and its gradient take.

    python benchmarks/heads.py                    # 100,000 people: all contenders
    python benchmarks/heads.py --scaling          # streaming at 10 k to 1 M people, with a plot
    python benchmarks/heads.py --giant 4000000    # one fused training step at that many people
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sphereface2 import heads

Step = Callable[[], object]


def authors_formula(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """SphereFace2-C written plainly: dense, one-hot, BCE with weights (λ .7, r 40, m .4, t 3)."""
    with torch.no_grad():
        weight.data = F.normalize(weight.data, dim=1)
    cos = F.normalize(x, dim=1) @ weight.T
    one_hot = torch.zeros_like(cos).scatter_(1, labels.view(-1, 1), 1.0)
    with torch.no_grad():
        g = 2 * ((cos + 1) / 2).pow(3) - 1
        g = g - 0.4 * (2 * one_hot - 1)
        shift = g - cos
    logits = 40 * (cos + shift) + bias
    classes = weight.shape[0]
    factor = 50 * classes / 40 * (0.7 * one_hot + 0.3 * (1 - one_hot))
    return F.binary_cross_entropy_with_logits(logits, one_hot, weight=factor)


def contender(name: str, batch: int, dim: int, people: int) -> Step:
    """A forward and backward pass on random inputs; gradients are dropped afterwards."""
    torch.manual_seed(0)
    x = torch.randn(batch, dim, requires_grad=True)
    labels = torch.randint(people, (batch,))

    if name.startswith("bare products"):
        dtype = torch.bfloat16 if "bf16" in name else torch.float32
        w = torch.randn(people, dim, dtype=dtype)
        unit = x.detach().to(dtype)

        def bare() -> tuple[Tensor, Tensor]:
            logits = unit @ w.T
            return logits @ w, logits.T @ unit

        return bare

    if name.startswith("authors"):
        weight = torch.nn.Parameter(torch.randn(people, dim))
        bias = torch.nn.Parameter(torch.zeros(()))
        parameters = [weight, bias]

        def loss() -> Tensor:
            return authors_formula(x, weight, bias, labels)

    elif name.startswith("pytorch-metric-learning"):
        from pytorch_metric_learning import losses

        rival = {"CosFace": losses.CosFaceLoss, "ArcFace": losses.ArcFaceLoss}[name.split()[-1]]
        module = rival(num_classes=people, embedding_size=dim)
        parameters = list(module.parameters())

        def loss() -> Tensor:
            value: Tensor = module(x, labels)
            return value

    else:
        kind, form = name.split()[:2]
        head = heads.build(kind.lower(), dim, people, **{"streaming": form == "streaming"})
        parameters = list(head.parameters())

        def loss() -> Tensor:
            value: Tensor = head(x, labels)
            return value

    def step() -> None:
        loss().backward()
        for tensor in (x, *parameters):
            tensor.grad = None

    return step


CONTENDERS = [
    "bare products",
    "SphereFace2 streaming",
    "SphereFace2 dense",
    "authors' formula",
    "CosFace streaming",
    "CosFace dense",
    "pytorch-metric-learning CosFace",
    "pytorch-metric-learning ArcFace",
    "bare products bf16",
]


def seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def peak_memory() -> float:
    """Greatest resident size of this process so far, in KiB."""
    # Not getrusage: a child's figure there starts from its parent's.
    (line,) = [k for k in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in k]
    return float(line.split()[1])


def gib(kib: float) -> float:
    return kib / 1024**2


def peak(function: str, *arguments: object) -> dict[str, float]:
    """Run a function of this file in a fresh process; it prints JSON with its peak memory."""
    done = subprocess.run(
        [sys.executable, __file__, "--worker", function, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def memory_worker(name: str, batch: str, dim: str, people: str) -> None:
    """Peak memory of two steps beyond the process before and beyond W and its gradient."""
    torch.randn(256, 256) @ torch.randn(256, 256)  # the library's own buffers
    before = peak_memory()
    step = contender(name, int(batch), int(dim), int(people))
    step(), step()
    after = peak_memory()
    held = 2 * int(people) * int(dim) * 4 / 1024
    print(json.dumps({"total": gib(after - before), "extra": gib(after - before - held)}))


def compare(arguments: argparse.Namespace) -> None:
    shape = (arguments.batch, arguments.dim, arguments.people)
    print(
        f"batch {shape[0]}, {shape[1]}-d, {shape[2]:,} people, {arguments.threads} thread(s); "
        f"median of {arguments.rounds} rounds"
    )
    bound, ours = CONTENDERS[:2]
    print(
        f"{'':34} {'seconds':>8} {'× bound':>8} {'× ours':>7} {'peak GiB':>9} {'beyond W, dW':>13}"
    )
    for name in CONTENDERS:
        steps = {key: contender(key, *shape) for key in dict.fromkeys((bound, ours, name))}
        turns: list[dict[str, float]] = []
        for _ in range(arguments.rounds + 1):  # the first warms up
            turns.append({key: seconds(step) for key, step in steps.items()})
        del steps
        turns = turns[1:]
        memory = peak("memory", name, *shape)
        print(
            f"{name:34} {statistics.median(turn[name] for turn in turns):8.3f} "
            f"{statistics.median(turn[name] / turn[bound] for turn in turns):8.2f} "
            f"{statistics.median(turn[name] / turn[ours] for turn in turns):7.2f} "
            f"{memory['total']:9.2f} {memory['extra']:13.2f}",
            flush=True,
        )


def scaling(arguments: argparse.Namespace) -> None:
    rows = []
    print(f"{'people':>10} {'seconds':>9} {'× bound':>8} {'µs a class':>10} {'extra GiB':>10}")
    for people in (10_000, 30_000, 100_000, 300_000, 1_000_000):
        shape = (arguments.batch, arguments.dim, people)
        bare, step = contender(CONTENDERS[0], *shape), contender(CONTENDERS[1], *shape)
        bare(), step()
        pairs = [(seconds(bare), seconds(step)) for _ in range(arguments.rounds)]
        del bare, step
        ratio = statistics.median(measured / bound for bound, measured in pairs)
        measured = statistics.median(measured for _, measured in pairs)
        extra = peak("memory", CONTENDERS[1], *shape)["extra"]
        rows.append((people, measured, ratio, extra))
        print(
            f"{people:10,} {measured:9.3f} {ratio:8.2f} {1e6 * measured / people:10.2f} "
            f"{extra:10.3f}",
            flush=True,
        )
    if arguments.plot:
        plot(rows, arguments)


def plot(rows: list[tuple[int, float, float, float]], arguments: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    people = [row[0] for row in rows]
    axes[0].loglog(people, [row[1] for row in rows], "o-", label="measured")
    slope = rows[-1][1] / rows[-1][0]
    axes[0].loglog(people, [slope * p for p in people], "--", color="0.6", label="linear")
    axes[0].set(xlabel="people", ylabel="seconds a step", title="Time")
    axes[0].legend(frameon=False)
    axes[1].semilogx(people, [row[3] for row in rows], "o-")
    axes[1].set(xlabel="people", ylabel="GiB", title="Memory beyond W and its gradient")
    axes[1].set_ylim(0, max(0.5, *(row[3] for row in rows)))
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"SphereFace2 streaming, batch {arguments.batch}, {arguments.dim}-d")
    figure.savefig(arguments.plot, dpi=120)
    print(f"plot: {arguments.plot}")


def giant_worker(people: str, batch: str, dim: str, weights: str, threads: str) -> None:
    """Fused training steps, exact over all negatives, with bfloat16 momentum."""
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    shape = (int(batch), int(dim), int(people))
    head = heads.build("sphereface2", *shape[1:], streaming=True, weight_dtype=weights)
    heads.FusedSGD(head, 0.1, momentum=0.9, weight_decay=5e-4, momentum_dtype="bfloat16")
    x = torch.randn(shape[0], shape[1], requires_grad=True)
    labels = torch.randint(shape[2], (shape[0],))

    def step() -> None:
        head(x, labels).backward()
        x.grad = None

    step()
    measured = statistics.median(seconds(step) for _ in range(3))
    peak_kib = peak_memory()
    # The bound at a size that leaves room for it, scaled: the products are linear in the people.
    part = min(shape[2], 200_000)
    bare = contender(CONTENDERS[0], shape[0], shape[1], part)
    bare()
    bound = statistics.median(seconds(bare) for _ in range(5)) * shape[2] / part
    print(json.dumps({"seconds": measured, "bound": bound, "peak": gib(peak_kib)}))


def giant(arguments: argparse.Namespace) -> None:
    shape = (arguments.giant, arguments.giant_batch, arguments.dim)
    found = peak("giant", *shape, arguments.weights, arguments.threads)
    print(
        f"{shape[0]:,} people × {shape[2]}-d, batch {shape[1]}, {arguments.weights} weights, "
        f"bfloat16 momentum, one exact training step:\n"
        f"peak resident memory {found['peak']:.2f} GiB, {found['seconds']:.2f} s; three bare "
        f"products {found['bound']:.2f} s (scaled), ratio {found['seconds'] / found['bound']:.2f}"
    )


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        {"memory": memory_worker, "giant": giant_worker}[sys.argv[2]](*sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--people", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--plot", type=Path, default=None, help="with --scaling: a PNG")
    parser.add_argument("--giant", type=int, default=None, metavar="PEOPLE")
    parser.add_argument("--giant-batch", type=int, default=64)
    parser.add_argument("--weights", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.giant:
        giant(arguments)
    elif arguments.scaling:
        scaling(arguments)
    else:
        compare(arguments)


if __name__ == "__main__":
    main()
