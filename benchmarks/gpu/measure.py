"""What all parts share: where they run, how they time, and where their rows go."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
MOST_TURNS = 50

Step = Callable[[], object]
Row = dict[str, Any]


@dataclass
class Part:
    """One part of the script while it runs.

    Args:
        device: where to run.
        tiny: toy sizes, for tests of the script itself.
        seconds: how long the part may take; it begins no further measurement after that.
        data: folder with ``train.rec`` and ``lfw.bin``, or None.
        save: called with all rows after each row, so that a part that is ended early leaves what
            it has measured.
    """

    device: torch.device
    tiny: bool = False
    seconds: float = 60.0
    data: Path | None = None
    save: Callable[[list[Row]], None] = lambda rows: None
    rows: list[Row] = field(default_factory=list)
    failures: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds left to this part."""
        return self.seconds - (time.monotonic() - self.started)

    def record(self, **row: Any) -> None:
        """Keep one row of figures."""
        self.rows.append(row)
        self.save(self.rows)

    @contextmanager
    def attempting(self, **names: Any) -> Iterator[Row]:
        """A row that is recorded, with the error in it, only if the block fails.

        Running out of memory is a finding; any other error makes the part fail in the end, but
        what comes after it is still measured.
        """
        row: Row = dict(names)
        try:
            yield row
        except torch.OutOfMemoryError:
            row["error"] = "out of memory"
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error!s:.300}"
            self.failures += 1
        finally:
            release(self.device)
        if "error" in row:
            self.record(**row)

    @contextmanager
    def measuring(self, **names: Any) -> Iterator[Row]:
        """A row that is recorded at the end, also if the block fails; see `attempting`."""
        with self.attempting(**names) as row:
            yield row
        if "error" not in row:
            self.record(**row)


def synchronise(device: torch.device) -> None:
    """Wait until everything queued on ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give unused device memory back, so that the next measurement starts from an empty card."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def in_turns(
    steps: Mapping[str, Step], device: torch.device, *, seconds: float, warm_up: int = 3
) -> dict[str, list[float]]:
    """Milliseconds of each step, measured in turns.

    Neighbouring turns see the same clocks and temperature, so their ratios are steadier than the
    times. On CUDA a turn is timed by events on the stream, and the host runs ahead of the device as
    in training.

    Args:
        steps: what to time, by name.
        device: where they run.
        seconds: time for all turns together; at least 3 and at most 50 turns are taken.
        warm_up: untimed calls of each step before.
    """
    for step in steps.values():
        for _ in range(warm_up):
            step()
    synchronise(device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    started = time.monotonic()
    turns = 0
    while turns < 3 or (turns < MOST_TURNS and time.monotonic() - started < seconds):
        for name, step in steps.items():
            times[name].append(milliseconds(step, device))
        turns += 1
    return times


def milliseconds(step: Step, device: torch.device) -> float:
    """Milliseconds of one call."""
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def median_ratio(times: dict[str, list[float]], name: str, to: str) -> float:
    """The median over turns of one step's time by another's."""
    return statistics.median(a / b for a, b in zip(times[name], times[to], strict=True))


def peak_gib(step: Step, device: torch.device) -> float | None:
    """Most device memory held during one call, in GiB, what was held before included."""
    if device.type != "cuda":
        return None
    synchronise(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    synchronise(device)
    return torch.cuda.max_memory_allocated(device) / 2**30


def held_gib(device: torch.device) -> float:
    """Device memory held now, in GiB."""
    return torch.cuda.memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """``highest``: float32 products; ``high``: TF32 on the matrix units."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def ceilings(part: Part) -> Row:
    """What the card reaches on a large product and a large copy, random data."""
    side = 256 if part.tiny else 8192
    row: Row = {}
    for name, dtype, precision in (
        ("bf16", torch.bfloat16, "highest"),
        ("tf32", torch.float32, "high"),
        ("fp32", torch.float32, "highest"),
    ):
        a, b = (torch.randn(side, side, device=part.device, dtype=dtype) for _ in range(2))
        with matmul_precision(precision):
            (times,) = in_turns({name: lambda a=a, b=b: a @ b}, part.device, seconds=1).values()
        row[f"{name} TFLOP/s"] = 2 * side**3 / statistics.median(times) / 1e9
    source = torch.randn(2**16 if part.tiny else 2**30, device=part.device)
    target: Tensor = torch.empty_like(source)
    (times,) = in_turns({"copy": lambda: target.copy_(source)}, part.device, seconds=1).values()
    row["copy GB/s"] = 2 * 4 * source.numel() / statistics.median(times) / 1e6
    return row


def environment(device: torch.device) -> Row:
    """The card, the software and the revision that figures belong to."""
    about: Row = {
        "device": "CPU",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "revision": os.environ.get("REVISION") or revision(),
        "sources": sources(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about["device"] = properties.name
        about["memory GiB"] = round(properties.total_memory / 2**30, 1)
        about["multiprocessors"] = properties.multi_processor_count
        about["cudnn"] = torch.backends.cudnn.version()
    return about


def sources() -> str:
    """A digest of the package's source, for a copy of the repository without its history."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "src").rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def revision() -> str | None:
    """The repository's commit, with ``+`` where files differ from it; None outside git."""
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*words: str) -> str:
    command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file in one step."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1, default=str) + "\n")
    temporary.replace(path)
