"""What differs between devices, without having them."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sphereface2.device import sent
from sphereface2.errors import UserError
from sphereface2.training import config, distributed
from sphereface2.training.checkpoint import rng_state, set_rng_state


class Copies(TorchDispatchMode):
    """Whether the host waited for copies to a device."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default:
            self.waited.append(not kwargs.get("non_blocking", False))
        return func(*args, **(kwargs or {}))


def test_the_host_waits_for_copies_except_with_cuda() -> None:
    with Copies() as copies:
        assert sent(torch.zeros(3), torch.device("meta")).device.type == "meta"
    assert copies.waited == [True]


@pytest.mark.parametrize("device", ["cuda:1", "mps"])
def test_the_state_of_a_devices_generator_is_part_of_a_checkpoint(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, given = torch.device(device), []
    module = f"torch.{place.type}"
    monkeypatch.setattr(f"{module}.get_rng_state", lambda of: torch.tensor([of.index or 0]))
    monkeypatch.setattr(f"{module}.set_rng_state", lambda state, of: given.append((state, of)))
    state = rng_state(place)
    assert state.keys() == {"cpu", place.type}
    set_rng_state(state, place)
    assert given == [(torch.tensor([place.index or 0]), place)]
    set_rng_state({"cpu": state["cpu"]}, place)  # of a run on another device
    assert len(given) == 1
    assert rng_state(torch.device("cpu")).keys() == {"cpu"}


def test_an_apple_gpu_takes_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("sphereface2.training.fit")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(module, "resolve", lambda _: torch.device("mps"))
    assert module._count_ranks("auto", config.load(None, [])) == 1
    monkeypatch.setattr(distributed, "resolve", lambda *_: torch.device("mps"))
    monkeypatch.setattr(distributed, "_fresh_store", lambda *_: torch.distributed.HashStore())
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = r"an Apple GPU trains on one rank, and these are 2: leave out --ranks, or set"
    with pytest.raises(UserError, match=told), distributed.world(threads=torch.get_num_threads()):
        pass
