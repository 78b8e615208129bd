"""A rank of test_sharding.py: a sharded head beside the dense one on all samples."""

from __future__ import annotations

import copy
import gc
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from killing import join, tell
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sphereface2 import heads
from sphereface2.errors import UserError
from sphereface2.heads import sharding
from sphereface2.training.muon import Muon
from sphereface2.training.optim import clip_gradients

DIM = 8
COLLECTIVES = ((sharding, "all_gather"), (sharding, "reduce_scatter"), (dist, "all_reduce"))


def batch(step: int, classes: int, even: bool = False) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What each rank gets in a step; without ``even``, one sample more a rank."""
    generator = torch.Generator().manual_seed(step)
    sizes = [5 if even else 3 + rank for rank in range(dist.get_world_size())]
    return [
        (
            torch.randn(n, DIM, generator=generator, dtype=torch.float64),
            torch.randint(classes, (n,), generator=generator),
        )
        for n in sizes
    ]


def build(classes: int, name: str = "sphereface2", **options: Any) -> heads.Head:
    torch.manual_seed(7)
    options = {"r": 8, **options} if name == "sphereface2" else options
    return heads.build(name, DIM, classes, **options).double()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def groups(head: heads.Head) -> list[dict[str, Any]]:
    return [{"params": [p]} for p in head.parameters()]


def equality(
    classes: int,
    steps: int,
    fused: bool = False,
    scaling: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """The dense head on everybody's samples, the sharded one on this rank's, step by step."""
    rank, size = dist.get_rank(), dist.get_world_size()
    dense = build(classes, **options)
    scaling = {"process_group": dist.group.WORLD, "chunk_size": 3, **(scaling or {})}
    sharded = build(classes, **options, **scaling)
    assert torch.equal(whole(sharded.weight.detach()), dense.weight)
    settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}
    expected = torch.optim.SGD(groups(dense), **settings)
    optimizers: list[torch.optim.Optimizer] = []
    if fused:
        optimizers.append(heads.FusedSGD(sharded, **settings))
        rest = [group for group in groups(sharded) if group["params"][0] is not sharded.weight]
        optimizers += [torch.optim.SGD(rest, **settings)] if rest else []
    else:
        optimizers.append(torch.optim.SGD(groups(sharded), **settings))
    for step in range(steps):
        parts = batch(step, classes)
        x, labels = parts[rank]
        x.requires_grad_()
        everybody = torch.cat([x.detach() for x, _ in parts]).requires_grad_()
        loss = dense(everybody, torch.cat([labels for _, labels in parts]))
        loss.backward()
        mine = sharded(x, labels)
        mine.backward()
        mean = mine.detach() / size
        dist.all_reduce(mean)
        torch.testing.assert_close(mean, loss.detach(), rtol=1e-9, atol=0)
        before = sum(len(x) for x, _ in parts[:rank])
        torch.testing.assert_close(
            x.grad / size, everybody.grad[before : before + len(x)], rtol=1e-7, atol=1e-12
        )
        for optimizer in [expected, *optimizers]:
            optimizer.step()
            optimizer.zero_grad()
        for found, right in zip(sharded.parameters(), dense.parameters(), strict=True):
            torch.testing.assert_close(whole(found.detach()), right, rtol=1e-7, atol=1e-10)


def between_samples(classes: int, steps: int) -> None:
    """The same of the loss between samples, whose memory has rows of nobody at first."""
    rank, size = dist.get_rank(), dist.get_world_size()
    config = heads.SampleToSampleConfig(s=9.0, m=0.2, weight=0.5)
    dense = heads.SampleToSample(DIM, classes, config).double()
    sharded = heads.SampleToSample(DIM, classes, config, dist.group.WORLD).double()
    for step in range(steps):
        parts = batch(step, classes)
        x, labels = parts[rank]
        everybody = torch.cat([x for x, _ in parts]).requires_grad_()
        all_labels = torch.cat([labels for _, labels in parts])
        x.requires_grad_()
        if step:
            losses = []
            for loss, samples, of in ((dense, everybody, all_labels), (sharded, x, labels)):
                loss.start(samples, of)
                losses.append(loss(samples, of))
                loss.zero_grad()
                losses[-1].backward()
            mean = losses[1].detach() / size
            dist.all_reduce(mean)
            torch.testing.assert_close(mean, losses[0].detach(), rtol=1e-9, atol=0)
            before = sum(len(x) for x, _ in parts[:rank])
            expected = everybody.grad[before : before + len(x)]
            torch.testing.assert_close(x.grad / size, expected, rtol=1e-7, atol=1e-12)
            torch.testing.assert_close(sharded.bias.grad, dense.bias.grad, rtol=1e-7, atol=1e-12)
        dense.remember(everybody, all_labels)
        sharded.remember(x, labels)
        assert torch.equal(whole(sharded.memory), dense.memory)
    torch.testing.assert_close(sharded.bias, dense.bias)
    assert sharded.is_started


class Classifier(nn.Module):
    """A network and a dense head, as a trainer sees them."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(DIM, 9), nn.Tanh(), nn.Linear(9, DIM)).double()
        self.head = build(21, name, **options)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.head(self.network(x), labels)


def wrapped(kind: str, name: str, muon: bool = False, **options: Any) -> None:
    """A dense head replicated or split by torch, beside one that sees everybody's samples."""
    rank, size = dist.get_rank(), dist.get_world_size()
    whole_one, model = Classifier(name, **options), Classifier(name, **options)
    model.head.sync_statistics = True
    call: nn.Module = model
    if kind == "replicated":
        call = DistributedDataParallel(model)
    else:
        fully_shard(model.head if kind == "split" else model, reshard_after_forward=True)
        if kind == "split":
            fully_shard(model.network)
    optimizers: list[torch.optim.Optimizer] = []
    for one in (whole_one, model):
        matrices = [p for p in one.network.parameters() if p.ndim > 1] if muon else []
        rest = [p for p in one.parameters() if all(p is not q for q in matrices)]
        optimizers.append(torch.optim.SGD(rest, lr=0.02, momentum=0.9, weight_decay=1e-3))
        optimizers += [Muon(matrices)] if matrices else []
    for step in range(3):
        parts = batch(step, 21, even=True)
        loss = whole_one(torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]))
        loss.backward()
        mine = call(*parts[rank])
        mine.backward()
        mean = mine.detach() / size
        dist.all_reduce(mean)
        torch.testing.assert_close(mean, loss.detach(), rtol=1e-9, atol=0)
        expected = nn.utils.clip_grad_norm_(whole_one.parameters(), 1.0)
        torch.testing.assert_close(clip_gradients(model.parameters(), 1.0), expected)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for found, right in zip(model.parameters(), whole_one.parameters(), strict=True):
        torch.testing.assert_close(whole(found.detach()), right.detach(), rtol=1e-7, atol=1e-10)
    for found, right in zip(model.buffers(), whole_one.buffers(), strict=True):
        torch.testing.assert_close(found, right)


def copies() -> None:
    """A copy of a sharded head, as moving averages make, has prototypes of its own."""
    head = build(21, process_group=dist.group.WORLD)
    other = copy.deepcopy(head)
    x, labels = batch(0, 21)[dist.get_rank()]
    assert torch.equal(head(x, labels), other(x, labels))
    with torch.no_grad():
        head.weight.zero_()
    assert whole(other.weight.detach()).any()


def documented(folder: Path) -> None:
    """The program of docs/scaling.md; what it leaves fits a dense head."""
    text = (Path(__file__).parents[2] / "docs/scaling.md").read_text()
    (program,) = re.findall(r"```py\n(.*?)```", text, re.DOTALL)
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    names: dict[str, Any] = {}
    exec(compile(program, "docs/scaling.md", "exec"), names)
    dense = heads.SphereFace2(128, num_classes=1000)
    found = {f"head.{key}": value for key, value in dense.state_dict().items()}
    dcp.load({"model": found}, checkpoint_id="checkpoint", no_dist=True)
    assert not torch.equal(found["head.bias"], torch.tensor(dense.margin.initial_bias(1000)))


def disagreement(changed: dict[str, Any]) -> str:
    """What a call says where the last rank's head is another one than the others'."""
    last = dist.get_rank() == dist.get_world_size() - 1
    head = build(**{"classes": 53, **(changed if last else {})}, process_group=dist.group.WORLD)
    try:
        head(*batch(0, 53)[dist.get_rank()])
    except UserError as error:
        return str(error)
    return "nothing"


def disagreements() -> None:
    """Ranks whose heads differ all say so, and can go on."""
    last = dist.get_world_size() - 1
    for changed, told in (
        ({"classes": 54}, f"num_classes is 53 on rank 0 and 54 on rank {last}"),
        ({"m": 0.2}, "m=0.2"),
        ({"loss_weight": 2.0}, f"weight of the loss is 50.0 on rank 0 and 2.0 on rank {last}"),
        ({"bias": "per_class"}, f"number of biases is 1 on rank 0 and C on rank {last}"),
        ({"name": "siglip"}, "the loss is BinaryMargin"),
    ):
        assert told in disagreement(changed), changed
    assert disagreement({}) == "nothing"


def bytes_moved(classes: int) -> dict[str, int]:
    """Bytes that a step hands to each collective, counted where torch is called."""
    counted: Counter[str] = Counter()

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*tensors: torch.Tensor, **kwargs: Any) -> Any:
            counted[name] += max(t.numel() * t.element_size() for t in tensors)
            return original(*tensors, **kwargs)

        return call

    with ExitStack() as patches:
        for module, name in COLLECTIVES:
            watched = counting(name, getattr(module, name))
            patches.enter_context(mock.patch.object(module, name, watched))
        head = build(classes, process_group=dist.group.WORLD)
        x, labels = batch(0, classes, even=True)[dist.get_rank()]
        head(x.requires_grad_(), labels).backward()
    return dict(counted)


def checkpoint(folder: Path, classes: int, write: bool) -> None:
    """Train four steps, or load what four steps left, then two more; all ranks' sums agree."""
    head = build(classes, process_group=dist.group.WORLD)
    optimizer = heads.FusedSGD(head, lr=0.05)

    def steps(numbers: range) -> None:
        for step in numbers:
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(12, DIM, generator=generator, dtype=torch.float64)
            labels = torch.randint(classes, (12,), generator=generator)
            part = slice(dist.get_rank(), None, dist.get_world_size())
            head(x[part].requires_grad_(), labels[part]).backward()

    def state() -> dict[str, Any]:
        return {"head": head.state_dict(), "optimizer": get_optimizer_state_dict(head, optimizer)}

    if write:
        steps(range(4))
        dcp.save(state(), checkpoint_id=folder)
    else:
        stored = state()
        dcp.load(stored, checkpoint_id=folder)
        head.load_state_dict(stored["head"])
        set_optimizer_state_dict(head, optimizer, stored["optimizer"])
    steps(range(4, 6))
    result = whole(head.weight.detach())
    if dist.get_rank() == 0:
        torch.save(result, folder.with_suffix(f".{dist.get_world_size()}.pt"))


def work(rank: int, ranks: int, port: int, log: Path, task: str, argument: str) -> None:
    """One of the tasks, as one of so many ranks."""
    tell(log)
    join(rank, ranks, port)
    torch.set_num_threads(1)
    if task == "documented":
        documented(Path(argument))
        return
    dist.init_process_group("gloo")
    if task == "equality":
        for kind in "CAM":
            equality(53, 20, margin_type=kind)
        equality(53, 20, detach="margin", bias="per_class")
        equality(5, 5)
        equality(53, 20, fused=True)
        equality(53, 20, name="siglip")
        equality(53, 20, name="sface")
        between_samples(23, 8)
        between_samples(4, 8)
        # A sample of everybody: the weights and own classes of a rank's share are right.
        equality(53, 20, scaling={"negatives": "uniform", "negative_share": 1.0})
    elif task == "wrapped":
        for name in ("adaface", "curricularface"):
            wrapped("replicated", name)
        wrapped("split", "cosface", muon=True)
        wrapped("split", "adaface", streaming=True, chunk_size=4)
        wrapped("root", "cosface")
        wrapped("root", "softmax")
    elif task == "disagreement":
        disagreements()
        copies()
    elif task == "bytes":
        counts = {classes: bytes_moved(classes) for classes in (100, 1000)}
        if dist.get_rank() == 0:
            Path(argument).write_text(json.dumps(counts))
    else:
        checkpoint(Path(argument), 53, write=task == "write")
    dist.barrier()
    dist.destroy_process_group()
    gc.collect()
    # One that is still there when Python shuts down may abort the process.
    # (`fully_shard` keeps its group.)
    assert task == "wrapped" or not gloo_threads(), gloo_threads()


def gloo_threads() -> list[str]:
    """Names of this process's threads that gloo started; none where /proc does not tell."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]
