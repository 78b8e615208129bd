"""Images a second of a backbone's forward and backward pass on tensors in memory.

    OMP_NUM_THREADS=1 python benchmarks/backbone_speed.py             # PReLU, bf16, ReLU: ratios
    OMP_NUM_THREADS=1 python benchmarks/backbone_speed.py networks    # candidates for a recipe

All variants live in one process and take turns; the figure is each one's fastest round in
processor time, so that other work on the machine disturbs the ratios little.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn

from sphereface2 import backbones
from sphereface2.backbones.activation import PReLU

NETWORKS = [
    ("sfnet10", 64, {"width": 0.25}),
    ("sfnet20", 64, {"width": 0.25}),
    ("sfnet20", 64, {"width": 0.5}),
    ("sfnet36", 64, {"width": 0.25}),
    ("sfnet20", 80, {"width": 0.25}),
    ("sfnet20", 96, {"width": 0.25}),
    ("sfnet20", 112, {"width": 0.25}),
    ("iresnet18", 64, {"width": 0.25}),
    ("mobilefacenet", 64, {"width": 0.5}),
    ("mobilefacenet", 112, {"width": 0.5}),
]


def step_of(
    name: str, size: int, batch: int, dtype: torch.dtype, torch_prelu: bool = False, **options
) -> Callable[[], None]:
    """One forward and backward pass over a fixed batch."""
    torch.manual_seed(0)
    net = backbones.build(name, input_size=size, **options)
    if torch_prelu:
        for module in net.modules():
            if isinstance(module, PReLU):
                module.__class__ = nn.PReLU
    net = net.to(memory_format=torch.channels_last)
    images = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    direction = torch.randn(batch, net.embedding_dim)

    def step() -> None:
        net.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            embeddings = net(images)
        (embeddings.float() * direction).sum().backward()

    return step


def rates(steps: dict[str, Callable[[], None]], batch: int, rounds: int) -> dict[str, float]:
    """Images a second of processor time for each step, from its fastest round."""
    fastest = dict.fromkeys(steps, float("inf"))
    for round_number in range(rounds + 1):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if round_number:  # the first round warms caches and builds kernels
                fastest[name] = min(fastest[name], time.process_time() - start)
    return {name: batch / seconds for name, seconds in fastest.items()}


def cost(name: str, **options: object) -> tuple[int, int]:
    """Parameters, and multiply-adds of one image's forward pass (convolutions, linear layers)."""
    with torch.device("meta"):
        net = backbones.build(name, **options).eval()
        total = 0

        def count(module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
            nonlocal total
            total += output.numel() * module.weight[0].numel()

        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(count)
        net(torch.zeros(1, 3, *net.input_size))
    return sum(parameter.numel() for parameter in net.parameters()), total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=["variants", "networks"], default="variants")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    batch = arguments.batch
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} thread(s), batch {batch}, forward + backward")
    if arguments.what == "variants":
        bf16, fp32 = torch.bfloat16, torch.float32
        steps = {
            label: step_of("sfnet20", 64, batch, dtype, width=0.25, batch_norm=True, **options)
            for label, dtype, options in [
                ("fp32, torch's PReLU", fp32, {"activation": "prelu", "torch_prelu": True}),
                ("fp32, PReLU", fp32, {"activation": "prelu"}),
                ("fp32, ReLU", fp32, {"activation": "relu"}),
                ("bf16, torch's PReLU", bf16, {"activation": "prelu", "torch_prelu": True}),
                ("bf16, PReLU", bf16, {"activation": "prelu"}),
                ("bf16, ReLU", bf16, {"activation": "relu"}),
            ]
        }
        measured = rates(steps, batch, arguments.rounds)
        print("SFNet-20, batch norm, quarter width, 64×64")
        base = measured["fp32, torch's PReLU"]
        for name, rate in measured.items():
            print(f"{name:22s} {rate:7.0f} images/s  {rate / base:5.2f}×")
        ratio = measured["bf16, PReLU"] / measured["bf16, torch's PReLU"]
        print(f"PReLU against torch's own under bf16: {ratio:.2f}×")
        return
    print(
        f"{'network':16s} {'size':>4s} {'width':>5s} {'act.':>5s} {'M par.':>7s} "
        f"{'M mul-add':>9s} {'img/s':>5s}"
    )
    for name, size, options in NETWORKS:
        options |= {"batch_norm": True} if name.startswith("sfnet") else {}
        steps = {
            activation: step_of(name, size, batch, torch.bfloat16, activation=activation, **options)
            for activation in ("relu", "prelu")
        }
        parameters, operations = cost(name, input_size=size, **options)
        for activation, rate in rates(steps, batch, arguments.rounds).items():
            print(
                f"{name:16s} {size:4d} {options['width']:5.3g} {activation:>5s} "
                f"{parameters / 1e6:7.2f} {operations / 1e6:9.1f} {rate:5.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
