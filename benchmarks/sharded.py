"""The sharded head on 1, 2 and 4 ranks: messages, equality, time; a sharded softmax beside it.

Claim: a step of the sharded SphereFace2 moves O(B·d) bytes, whatever the number of people, and
gives the dense head's loss and gradients. A sharded CosFace, written below for this comparison as
economically as separate operations allow, must in addition agree on every sample's greatest logit
and on its normaliser (two all-reduces) before any gradient, and keep its logits until then.

Each rank is a process with one thread. Bytes are those of the tensors that the collectives gather
or reduce, counted where torch is called; time is a ratio to the bare matrix products of the rank's
share, in turns with it in the same processes.

    python benchmarks/sharded.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

import head_cost as cost
from sphereface2 import heads
from sphereface2.heads import sharding
from sphereface2.heads.base import Head, renormalise_, unit_rows
from sphereface2.heads.sharding import Shard, local
from sphereface2.machine import cores

SCALE, MARGIN = 64.0, 0.35


class ShardedCosFace(Head):
    """CosFace with W split over the ranks; the conventions of a sharded SphereFace2."""

    scaling = frozenset({"process_group"})

    def loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        renormalise_(local(self.weight.data))
        loss: Tensor = _ShardedCosFace.apply(
            unit_rows(embeddings), local(self.weight), labels, self.shard
        )
        return loss


class _ShardedCosFace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, labels: Tensor, shard: Shard) -> Tensor:
        batch = shard.gather(x, labels)
        x, columns = batch.x, batch.labels - shard.start
        (samples,) = torch.nonzero((columns >= 0) & (columns < shard.rows), as_tuple=True)
        own = (samples, columns[samples])
        logits = (x @ w.T).mul_(SCALE)
        logits[own] -= SCALE * MARGIN
        greatest = logits.amax(1)
        if shard.group is not None:
            dist.all_reduce(greatest, op=dist.ReduceOp.MAX, group=shard.group)
        logits -= greatest[:, None]
        sums = x.new_zeros(len(x), 2)  # own logits and normalisers, in one message
        sums[samples, 0] = logits[own]
        sums[:, 1] = logits.exp_().sum(1)
        shard.sum(sums)
        losses = sums[:, 1].log() - sums[:, 0]
        # The gradient by the cosines, over the exponentials.
        logits *= (SCALE / sums[:, 1:]) / len(x)
        logits[own] -= SCALE / len(x)
        grad_x = shard.scatter_sum(logits @ w, batch)
        ctx.grads = (grad_x * shard.size, logits.T @ x)
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_w = ctx.grads
        return grad_x * grad, grad_w.mul_(grad), None, None


@contextmanager
def counting() -> Iterator[list[tuple[str, int]]]:
    """Kind and bytes of every collective of a step."""
    found: list[tuple[str, int]] = []

    def watched(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*tensors: Tensor, **kwargs: Any) -> Any:
            found.append((name, max(t.numel() * t.element_size() for t in tensors)))
            return original(*tensors, **kwargs)

        return call

    with ExitStack() as patches:
        for module, name in (
            (sharding, "all_gather"),
            (sharding, "reduce_scatter"),
            (dist, "all_reduce"),
        ):
            counting = watched(name, getattr(module, name))
            patches.enter_context(mock.patch.object(module, name, counting))
        yield found


def seconds(work: Callable[[], object]) -> float:
    """Until the last rank is through."""
    dist.barrier()
    start = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - start


def worst_difference(head: nn.Module, dense: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Largest difference of loss and gradients from the dense head, relative to the largest entry.

    The sharded head sees this rank's samples, the dense one everybody's.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    own = slice(rank * len(x) // ranks, (rank + 1) * len(x) // ranks)
    mine = x[own].clone().requires_grad_()
    loss = head(mine, labels[own])
    loss.backward()
    assert mine.grad is not None
    mean, whole = loss.detach() / ranks, torch.zeros_like(x)
    dist.all_reduce(mean)
    whole[own] = mine.grad / ranks
    dist.all_reduce(whole)
    gradient = local(head.weight.grad)  # type: ignore[arg-type]
    x = x.clone().requires_grad_()
    expected = dense(x, labels)
    expected.backward()
    shard = head.shard
    pairs = [
        (mean, expected.detach()),
        (whole, x.grad),
        (gradient, dense.weight.grad[shard.start : shard.stop]),  # type: ignore[index]
    ]
    head.zero_grad(), dense.zero_grad()
    worst = torch.tensor(max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs))
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return float(worst)


def worker(people: int, dim: int, batch: int, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    x, labels = torch.randn(batch, dim), torch.randint(people, (batch,))
    own = slice(rank * batch // ranks, (rank + 1) * batch // ranks)
    group = dist.group.WORLD if ranks > 1 else None
    for name, dense_type in (("SphereFace2", heads.SphereFace2), ("CosFace", heads.CosFace)):
        torch.manual_seed(7)
        dense = dense_type(dim, people)
        torch.manual_seed(7)
        if name == "SphereFace2":
            head: Head = heads.SphereFace2(dim, people, process_group=group, streaming=True)
        else:
            head = ShardedCosFace(dim, people, process_group=group)
        difference = worst_difference(head, dense, x, labels)
        del dense
        mine, w = x[own].clone().requires_grad_(), local(head.weight.detach())

        def step(head: Head = head, mine: Tensor = mine) -> None:
            head(mine, labels[own]).backward()
            head.zero_grad()
            mine.grad = None

        def bare(w: Tensor = w) -> tuple[Tensor, Tensor]:
            logits = x @ w.T
            return logits @ w, logits.T @ x

        with counting() as messages:
            step()
        bare()
        pairs = [(seconds(bare), seconds(step)) for _ in range(rounds)]
        if rank == 0:
            found = {
                "head": name,
                "ranks": ranks,
                "people": people,
                "messages": messages,
                "difference": difference,
                "seconds": statistics.median(s for _, s in pairs),
                "ratio": statistics.median(s / b for b, s in pairs),
            }
            print(json.dumps(found), flush=True)
    dist.destroy_process_group()


def measure(ranks: int, *shape: int) -> list[dict[str, Any]]:
    """Figures of both heads on so many ranks; shape is people, dim, batch, rounds."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(ranks), __file__, "--worker", *map(str, shape)),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def model(head: str, people: int, dim: int, batch: int, ranks: int) -> cost.Cost:
    """What `head_cost.py` says of a head of this script."""
    formula = cost.sphereface2 if head == "SphereFace2" else cost.softmax
    return formula(people, dim, batch, ranks=ranks)


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        worker(*map(int, sys.argv[2:]))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--people", type=int, nargs="+", default=[20_000, 100_000])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch", type=int, default=256, help="of all ranks")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(
        f"batch {arguments.batch} of all ranks, {arguments.dim}-d, {cores()} cores, gloo, "
        f"one thread a rank; median of {arguments.rounds} rounds\n\n"
        "| people | ranks | head | bytes a step | model | collectives | of these before any "
        "gradient | seconds | × bare products | from the dense head |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    )
    for people in arguments.people:
        for ranks in arguments.ranks:
            for found in measure(ranks, people, arguments.dim, arguments.batch, arguments.rounds):
                kinds = [kind for kind, _ in found["messages"]]
                # SphereFace2's one all-reduce, of the bias, is after all gradients.
                before = len(kinds) - 1 - (found["head"] == "SphereFace2") if kinds else 0
                told = model(found["head"], people, arguments.dim, arguments.batch, ranks).messages
                print(
                    f"| {people:,} | {ranks} | {found['head']} "
                    f"| {sum(size for _, size in found['messages']):,} "
                    f"| {sum(m.size for m in told):,.0f} | {len(kinds)} | {before} "
                    f"| {found['seconds']:.3f} | {found['ratio']:.2f} "
                    f"| {found['difference']:.0e} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
