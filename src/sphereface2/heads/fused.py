"""SGD whose step is part of the head's own pass over the prototypes: no gradient of W is held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sphereface2.errors import UserError, check_choice, check_number
from sphereface2.heads.base import Head
from sphereface2.heads.blocks import Block
from sphereface2.heads.sharding import local

MomentumType = Literal["full", "bfloat16"]


class FusedSGD(torch.optim.Optimizer):
    """SGD for a head's prototypes, taken block by block while the loss is computed.

    The gradient of a block of prototypes is consumed as soon as it is known, so that nothing of
    the size of W is held but W itself and its momentum. With full momentum the step is that of
    ``torch.optim.SGD``, on a CPU to the last bit. Rows that a step does not visit (sampled
    negatives) keep their momentum and are not decayed. On CUDA one kernel takes the step of a
    block, where Triton is installed.

    The step happens when the head is called in training mode with gradients enabled, before
    ``backward``; ``step`` does nothing more and ``zero_grad`` has nothing to do. So the step cannot
    wait for anything that is known later: the sum of several batches (gradient accumulation), the
    norm over all parameters, or a scaler's verdict on the batch. Clip the gradient of the
    embeddings instead (``clip_embedding_gradient``). The gradient from above must be 1, or a
    scaler's factor.

    Args:
        head: a streaming head; its ``weight`` belongs to this optimiser and to no other.
        lr: learning rate ≥ 0; may be changed in ``param_groups``, as schedulers do.
        momentum: in [0, 1).
        weight_decay: ≥ 0.
        nesterov: Nesterov's momentum.
        momentum_dtype: "full", float32 or W's own type if that is wider; "bfloat16" for half the
            memory, rounded stochastically so that small gradients are not lost on average.

    Raises:
        UserError: a value out of its range, a head that cannot take its step on the way.

    Example:
        >>> from sphereface2 import heads
        >>> head = heads.build("sphereface2", 8, 10, streaming=True)
        >>> optimizer = FusedSGD(head, lr=0.1)
        >>> before = head.weight.detach().clone()
        >>> _ = head(torch.randn(4, 8), torch.arange(4))
        >>> torch.equal(head.weight, before), head.weight.grad
        (False, None)
    """

    def __init__(
        self,
        head: Head,
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        momentum_dtype: MomentumType = "full",
    ) -> None:
        check_number("lr", lr, least=0)
        check_number("momentum", momentum, least=0, below=1)
        check_number("weight_decay", weight_decay, least=0)
        check_choice("momentum_dtype", momentum_dtype, get_args(MomentumType))
        if nesterov and not momentum:
            raise UserError("nesterov needs a momentum above 0")
        head.fuse(self)
        settings = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__([head.weight], settings)
        # Even without momentum: torch.distributed.checkpoint would make a state by a step of zero
        # gradients, which would stay.
        state = self.state[head.weight]
        if momentum:
            dtype = torch.bfloat16
            if momentum_dtype == "full":
                dtype = torch.promote_types(head.weight.dtype, torch.float32)
            state["momentum_buffer"] = torch.zeros_like(head.weight, dtype=dtype)
        self.begin_step()

    def begin_step(self) -> None:
        """The head begins a pass."""
        self.noise = _Noise()
        self.seed: Tensor | None = None
        self.rate: Tensor | None = None

    @torch.no_grad()
    def update_(self, block: Block, unit: Tensor | None, gradient: Tensor) -> None:
        """Take the step of some rows of W; see `RowUpdate`."""
        (group,) = self.param_groups
        (weight,) = group["params"]
        if unit is None:
            self._step_by_kernel(block, gradient)
            return
        rows, gradient = block.rows, gradient.to(unit.dtype)
        if block.skip is not None and isinstance(rows, Tensor):
            counts = ~block.skip
            rows, unit, gradient = rows[counts], unit[counts], gradient[counts]
        if group["weight_decay"]:
            gradient.add_(unit, alpha=group["weight_decay"])
        buffer = self.state[weight].get("momentum_buffer")
        step = gradient
        if buffer is not None:
            buffer = local(buffer)
            velocity = buffer[rows]
            in_place = isinstance(rows, slice) and velocity.dtype == gradient.dtype
            if not in_place:
                velocity = velocity.to(gradient.dtype)
            velocity.mul_(group["momentum"]).add_(gradient)
            if not in_place:
                self._store(velocity, buffer, rows)
            step = (
                gradient.add_(velocity, alpha=group["momentum"]) if group["nesterov"] else velocity
            )
        if isinstance(group["lr"], Tensor):
            unit.addcmul_(step, group["lr"].to(unit.dtype), value=-1)
        else:
            unit.add_(step, alpha=-group["lr"])
        stored = local(weight.data)
        if not (isinstance(rows, slice) and stored.dtype == unit.dtype):
            self._store(unit, stored, rows)

    def _step_by_kernel(self, block: Block, gradient: Tensor) -> None:
        from sphereface2.heads import row_kernels

        (group,) = self.param_groups
        (weight,) = group["params"]
        velocity = self.state[weight].get("momentum_buffer")
        if self.seed is None or self.rate is None:
            # On the device, so that nothing waits; from its generator, which checkpoints keep.
            self.seed = torch.randint(2**62, (1,), device=weight.device)
            rate = group["lr"]  # a tensor already in a step that is recorded
            if not isinstance(rate, Tensor):
                rate = torch.full((), rate, dtype=torch.float32, device=weight.device)
            self.rate = rate
        row_kernels.step_rows_(
            local(weight.data),
            None if velocity is None else local(velocity),
            gradient,
            block.rows,
            block.skip,
            self.seed,
            self.rate,
            **{k: group[k] for k in ("momentum", "weight_decay", "nesterov")},
        )

    def _store(self, values: Tensor, into: Tensor, rows: slice | Tensor) -> None:
        if into.dtype == values.dtype:
            into[rows] = values
        elif into.dtype == torch.bfloat16 and values.dtype == torch.float32:
            into[rows] = stochastic_round(values, self.noise.like(values))
        else:
            into[rows] = values.to(into.dtype)

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Nothing: the head has taken the step."""
        if closure is not None:
            raise ValueError("FusedSGD takes no closure: its step is part of the head's pass")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: there is no gradient."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy the state in place, keeping the momentum's type (torch would widen it)."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({k: v for k, v in saved.items() if k != "params"})
            for parameter, key in zip(group["params"], saved["params"], strict=True):
                for name, value in state_dict["state"].get(key, {}).items():
                    self.state[parameter][name].copy_(value)


def stochastic_round(values: Tensor, noise: Tensor) -> Tensor:
    """Round float32 to bfloat16, up or down with probabilities that make the mean exact.

    Args:
        values: any shape, float32, contiguous; overwritten.
        noise: the same shape, int32, uniform on 0 … 65535.

    Example:
        >>> noise = torch.tensor([0, 65535], dtype=torch.int32)
        >>> stochastic_round(torch.tensor([1.001, 1.001]), noise)
        tensor([1.0000, 1.0078], dtype=torch.bfloat16)
    """
    # bfloat16 is the upper half of a float32: noise below it carries over with the probability
    # that the lower half tells.
    bits = values.view(torch.int32).add_(noise).bitwise_and_(-65536)
    return bits.view(torch.float32).to(torch.bfloat16)


class _Noise:
    """Uniform noise at the cost of one draw for many blocks.

    Every block reads a pool of noise from another place. An element's noise is uniform and
    independent from step to step; only elements far apart share some within one.
    """

    REUSES = 64
    pool: Tensor | None = None
    uses = 0

    def like(self, values: Tensor) -> Tensor:
        """int32 on 0 … 65535 in the shape of ``values``."""
        count = values.numel()
        pool = self.pool
        if (
            pool is None
            or pool.numel() < 2 * count
            or pool.device != values.device
            or self.uses >= self.REUSES
        ):
            pool = torch.randint(65536, (2 * count,), dtype=torch.int32, device=values.device)
            self.pool, self.uses = pool, 0
        self.uses += 1
        start = int(torch.randint(pool.numel() - count + 1, ()))
        return pool[start : start + count].view(values.shape)
