"""The step: it waits for no device, and what goes wrong is decided before the update."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sphereface2 import backbones, heads
from sphereface2.data.dataset import Batch
from sphereface2.errors import UserError
from sphereface2.training import config, sections
from sphereface2.training.checkpoint import restore_training_state, training_state
from sphereface2.training.distributed import World
from sphereface2.training.step import TrainingStep, channels_last_is_sound, compile_units
from sphereface2.training.watch import SMOOTHING, LossWatch

PEOPLE, BATCH = 40, 6


def training_step(device: str = "cpu", **settings: Any) -> TrainingStep:
    tree: dict[str, Any] = {
        "backbone": {"name": "sfnet4", "width": 0.125, "input_size": 32, "batch_norm": True},
        "training": {"batch_size": BATCH, "threads": 1, "epochs": 8},
    }
    for key, value in settings.items():
        sections.assign(tree, key.replace("__", "."), value)
    step = TrainingStep(config.from_dict(tree), World(0, 1, 0, 1, torch.device(device)), PEOPLE)
    step.forward.train()
    step.loss.train()
    return step


def batches(count: int = 1, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Batch(
            torch.randint(256, (BATCH, 3, 32, 32), dtype=torch.uint8, generator=generator),
            torch.randint(PEOPLE, (BATCH,), generator=generator),
            [],
            torch.randint(PEOPLE, (BATCH,), generator=generator),
        )
        for _ in range(count)
    ]


FUSED = {
    "training__fused_head": True,
    "training__clip_norm": None,
    "training__clip_embedding_norm": 1.0,
    "head__streaming": True,
    "head__chunk_size": 7,
}
NEVER_WAITS = {
    **{name: {"head__name": name} for name in heads.available()},
    **{
        f"{name} streaming": {"head__name": name, "head__streaming": True, "head__chunk_size": 7}
        for name in heads.available()
        if "streaming" in heads.parameters(name)
        and not heads.build(name, 2, 2, streaming=True).asks_host
    },
    "margin A": {"head__margin_type": "A", "head__detach": "margin", "head__bias": "per_class"},
    "fused": FUSED,
    "fused in bfloat16": {
        **FUSED,
        "training__fused_momentum": "bfloat16",
        "head__weight_dtype": "bfloat16",
    },
    "sampled": {"head__negatives": "uniform"},
    "accumulated": {"training__accumulate": 2, "training__autocast": "bf16"},
    "adamw": {"training__optimizer": "adamw"},
    "muon": {"training__optimizer": "muon"},
    "between samples": {"sample_to_sample__weight": 1.0},
}


@pytest.fixture
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device has none."""
    monkeypatch.setattr(torch, "autocast", lambda *_args, **_options: nullcontext())


class NoDoubles(TorchDispatchMode):
    """The meta device makes no float64, which an Apple GPU has not."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor) and one.device.type == "meta":
                assert one.dtype not in (torch.float64, torch.complex128), func
        return result


@pytest.mark.usefixtures("no_autocast")
@pytest.mark.parametrize("case", NEVER_WAITS)
def test_the_host_reads_nothing_of_a_step_and_the_device_needs_no_float64(case: str) -> None:
    """Tensors of the meta device have no values: whoever asks for one is refused."""
    step = training_step("meta", **NEVER_WAITS[case])
    with NoDoubles():
        for number in (1, 2):
            loss, norm = step(batches(step.config.training.accumulate), number)
    assert loss.device.type == norm.device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError)):
        step.watch.read()


def weights(step: TrainingStep) -> list[torch.Tensor]:
    parameters = [*step.network.parameters(), *step.head.parameters()]
    return [parameter.detach().clone() for parameter in parameters]


@pytest.mark.parametrize("wrong", ["loss", "gradient"])
def test_what_is_not_finite_never_reaches_the_weights(wrong: str) -> None:
    step = training_step(training__momentum=0.0, training__weight_decay=0.0)
    step(batches(seed=1), 1)

    def spoil(module: torch.nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        if wrong == "loss":
            return out * math.inf
        out.register_hook(lambda gradient: gradient * math.nan)
        return out

    handle = step.head.register_forward_hook(spoil)
    before = weights(step)
    loss, _ = step(batches(seed=2), 2)
    handle.remove()
    assert loss.isfinite().item() == (wrong == "gradient")
    step(batches(seed=3), 3)  # fine by itself, but the run is over
    for old, new in zip(before, weights(step), strict=True):
        # The forward pass renormalises the prototypes.
        torch.testing.assert_close(
            new, torch.nn.functional.normalize(old) if old.ndim == 2 and len(old) == PEOPLE else old
        )
    seen = step.watch.read()
    assert seen.wrong_step == 2
    assert math.isfinite(seen.loss) == (wrong == "gradient")
    assert not math.isfinite(seen.norm)
    assert math.isfinite(seen.smoothed) == (wrong == "gradient")


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("optimizer", ["sgd", "muon", "adamw"])
def test_optimizers_go_on_from_their_state(optimizer: str, momentum: float) -> None:
    """Also from before the loss between samples begins, whose bias has had no gradient then, and
    with a part that is frozen; who has gone on from a state holds one that others go on from."""
    settings = {"training__optimizer": optimizer, "training__momentum": momentum}
    settings |= {"sample_to_sample__weight": 1.0, "training__freeze": ["stages.0"]}
    whole, cut = training_step(**settings), training_step(**settings, seed=1)
    whole.samples_from = cut.samples_from = 3
    whole(batches(seed=1), 1)
    state = copy.deepcopy(training_state(whole.modules, whole.optimizers))
    new = training_state(cut.modules, cut.optimizers)
    restore_training_state(state, cut.modules, cut.optimizers)
    held, expected, again = (
        {name: one.keys() for name, one in tree["optimizer"]["state"].items()}
        for tree in (state, new, training_state(cut.modules, cut.optimizers))
    )
    assert held == expected == again
    for step in (whole, cut):
        torch.manual_seed(0)
        for number in (2, 3, 4):
            step(batches(seed=number), number)
    for one, other in zip(weights(whole), weights(cut), strict=True):
        assert torch.equal(one, other)
    bias = [step.modules["samples"].bias for step in (whole, cut)]
    assert torch.equal(*bias) and bias[0] != training_step(**settings).modules["samples"].bias


def test_the_watch_follows_the_mean_and_stops_once() -> None:
    watch = LossWatch(torch.device("cpu"), max_ratio=2.0)
    losses = [4.0, 3.0, 5.0, 90.0, 91.0]
    smoothed = losses[0]
    for number, loss in enumerate(losses, 1):
        wrong = watch.observe(torch.tensor(loss), torch.tensor(1.0), number)
        if number <= 4:
            smoothed += SMOOTHING * (loss - smoothed)
        assert wrong.item() == (number >= 4)
        seen = watch.read()
        assert seen.first == 4.0
        assert seen.smoothed == pytest.approx(smoothed)
        assert seen.wrong_step == (4 if number >= 4 else 0)
        assert seen.lowest == pytest.approx(4.0 if number == 1 else 3.95)
    assert seen.loss == 90.0
    resumed = LossWatch(torch.device("cpu"), max_ratio=2.0)
    resumed.resume(4.0, 7.99)
    assert not resumed.observe(torch.tensor(8.0), torch.tensor(1.0), 9)
    assert resumed.observe(torch.tensor(9.0), torch.tensor(1.0), 10)


def test_a_scaler_may_meet_an_overflow() -> None:
    watch = LossWatch(torch.device("cpu"), max_ratio=2.0, check_norm=False)
    assert not watch.observe(torch.tensor(1.0), torch.tensor(math.inf), 1)
    assert watch.observe(torch.tensor(math.nan), torch.tensor(1.0), 2)


NARROW = """
import sys
import torch
from sphereface2 import backbones
from sphereface2.training.step import channels_last_is_sound, compile_units

network = backbones.build("iresnet18", input_size=112, width=0.125)
sound = channels_last_is_sound(network, torch.device("cpu"))
memory_format = torch.channels_last if sound else torch.contiguous_format
network.to(memory_format=memory_format)
if "compiled" in sys.argv:
    compile_units(network, torch.device("cpu"))
images = torch.zeros(16, 3, 112, 112).to(memory_format=memory_format)
for _ in range(4):
    network(images).sum().backward()
print(sound)
"""


@pytest.mark.parametrize("how", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_a_narrow_network_is_not_trained_in_a_layout_that_ends_the_process(how: str) -> None:
    run = subprocess.run([sys.executable, "-c", NARROW, how], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "False\n"), run.stderr
    wider = backbones.build("iresnet18", input_size=112, width=0.25)
    assert channels_last_is_sound(wider, torch.device("cpu"))


def test_a_compiler_that_is_missing_is_told_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with (
        inductor.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(UserError, match=r"training\.compile: .*no-such-compiler.*install .* false"),
    ):
        training_step(training__compile=True)


def test_units_are_compiled_in_place_and_copies_are_not() -> None:
    network = backbones.build("iresnet18", input_size=32, width=0.125)
    compile_units(network, torch.device("cpu"))
    compiled = {name for name, part in network.named_modules() if part._compiled_call_impl}
    units = {f"layer{stage}.{unit}" for stage in range(1, 5) for unit in range(2)}
    assert compiled == {"prelu", *units}
    assert not any(part._compiled_call_impl for part in copy.deepcopy(network).modules())
