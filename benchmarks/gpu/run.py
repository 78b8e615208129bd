"""Everything that this project claims of a GPU, measured in one run of at most nine minutes.

    python benchmarks/gpu/run.py                         # all parts on the first GPU
    python benchmarks/gpu/run.py --parts heads,capacity
    python benchmarks/gpu/run.py --skip speedrun --limits heads=60,tests=90 --out reports/gpu
    python benchmarks/gpu/run.py --device cpu --tiny     # every part at toy size, anywhere

Each part runs in a process of its own, with a limit on its time; a part that fails or takes too
long is recorded with its error, the next one goes on, and the exit status is 1 in the end. After
each part the results so far are in ``results.json``; ``log.txt`` holds what the parts printed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
CARRIED = ROOT / ".gpu"
"""Wheels and faces for a machine that downloads nothing; see the README here."""

PARTS = {
    "tests": 110,
    "heads": 60,
    "capacity": 25,
    "steps": 45,
    "partial_fc": 70,
    "backbones": 100,
    "speedrun": 130,
}
"""Name of the module beside this one, and its seconds; the most valuable first."""
TOTAL = 540
GRACE = 20
"""Seconds that a part gets after its own limit, to finish the measurement it is at."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="which, separated by commas")
    parser.add_argument("--skip", default="", help="which not")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="limit on all parts together")
    parser.add_argument("--limits", default="", help="of single parts: heads=60,speedrun=45")
    parser.add_argument("--data", type=Path, default=CARRIED / "faces")
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "reports" / "gpu"))
    )
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]
    if arguments.child:
        sys.exit(child(arguments))
    chosen = split(parser, arguments.parts)
    skipped = split(parser, arguments.skip)
    limits = dict(word.split("=") for word in arguments.limits.split(",") if word)
    split(parser, ",".join(limits))
    arguments.limits = {**PARTS, **{name: float(limit) for name, limit in limits.items()}}
    sys.exit(run([name for name in PARTS if name in chosen and name not in skipped], arguments))


def split(parser: argparse.ArgumentParser, names: str) -> list[str]:
    """Names of parts, checked."""
    listed = [name for name in names.split(",") if name]
    for name in listed:
        if name not in PARTS:
            parser.error(f"there is no part {name!r}; there are {', '.join(PARTS)}")
    return listed


def run(names: list[str], arguments: argparse.Namespace) -> int:
    """Run the parts one after another; 1 if one failed."""
    started = time.monotonic()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, (out / "log.txt").open("w") as log:
        environment = {**os.environ, "PYTHONPATH": python_path(Path(scratch), log)}
        environment["PYTHONUNBUFFERED"] = "1"
        results: dict[str, Any] = {"tiny": arguments.tiny, "parts": {}}
        for name in names:
            left = arguments.seconds - (time.monotonic() - started)
            seconds = min(arguments.limits[name], left - GRACE)
            if seconds < 5:
                results["parts"][name] = {"status": "not run", "error": "no time was left"}
            else:
                print(f"== {name} (at most {seconds:.0f} s)", flush=True)
                found = run_part(name, seconds, arguments, Path(scratch), environment, log)
                about = found.pop("environment", None)
                results["environment"] = results.get("environment") or about
                results["parts"][name] = found
                print(f"   {found['status']}, {found['seconds']:.0f} s", flush=True)
            results["seconds"] = round(time.monotonic() - started, 1)
            replace_json(out / "results.json", results)
    print(report(results))
    return int(any(part["status"] != "ok" for part in results["parts"].values()))


def run_part(
    name: str,
    seconds: float,
    arguments: argparse.Namespace,
    scratch: Path,
    environment: dict[str, str],
    log: IO[str],
) -> dict[str, Any]:
    """Run one part in a process of its own and return what it left."""
    file = scratch / f"{name}.json"
    command = [sys.executable, str(Path(__file__)), "--child", name, "--out", str(file)]
    command += ["--device", arguments.device, "--seconds", str(seconds)]
    command += ["--data", str(arguments.data), *(["--tiny"] if arguments.tiny else [])]
    log.write(f"\n===== {name}\n")
    log.flush()
    mark = log.tell()
    started = time.monotonic()
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )
    try:
        status = process.wait(seconds + GRACE)
        error = None if status == 0 else f"the part ended with status {status}"
    except subprocess.TimeoutExpired:
        error = f"the part took more than {seconds + GRACE:.0f} s and was ended"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found = json.loads(file.read_text()) if file.exists() else {"rows": []}
    found["seconds"] = round(time.monotonic() - started, 1)
    found["status"] = "ok" if error is None else "failed"
    if error is not None:
        found["error"] = error
        found["output"] = Path(log.name).read_text()[mark:][-3000:]
    return found


def child(arguments: argparse.Namespace) -> int:
    """Run one part in this process; its rows go to ``--out`` as they come."""
    import torch

    from gpu.measure import Part, environment, write_json
    from sphereface2.device import resolve

    device = resolve(arguments.device)
    about = environment(device)
    module = importlib.import_module(f"gpu.{arguments.child}")
    given = not arguments.tiny and (arguments.data / "train.rec").exists()
    part = Part(
        device,
        arguments.tiny,
        arguments.seconds,
        arguments.data if given else None,
        save=lambda rows: write_json(arguments.out, {"environment": about, "rows": rows}),
    )
    torch.manual_seed(0)
    module.run(part)
    for row in part.rows:
        print(json.dumps(row, default=str))
    return int(part.failures > 0)


def python_path(scratch: Path, log: IO[str]) -> str:
    """This repository, and the carried wheels where the machine lacks their packages."""
    paths = [str(ROOT / "src"), str(ROOT / "benchmarks")]
    wheels = sorted((CARRIED / "wheels").glob("*.whl"))
    if importlib.util.find_spec("pydantic") is None and wheels:
        site = scratch / "site"
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
            + ["--no-compile", "--target", str(site), *map(str, wheels)],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        if done.returncode:  # the parts that need them will fail, the others not
            print("the wheels in .gpu/ cannot be installed; log.txt says why", flush=True)
        paths.append(str(site))
    return os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])


def replace_json(path: Path, content: Any) -> None:
    """Replace a JSON file in one step. No torch is needed here, unlike in ``measure``.

    Places of this machine are left out: results are kept in the repository.
    """
    text = json.dumps(content, indent=1) + "\n"
    for place, name in (
        (f"{ROOT}{os.sep}", ""),
        (sys.executable, "python"),
        (f"{tempfile.gettempdir()}{os.sep}", ""),
    ):
        text = text.replace(place, name)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def report(results: dict[str, Any]) -> str:
    """The results as short tables, the last thing printed."""
    about = results.get("environment") or {}
    lines = [
        f"\n{about.get('device')}, torch {about.get('torch')}, CUDA {about.get('cuda')}, "
        f"revision {str(about.get('revision'))[:12]}, sources {about.get('sources')}, "
        f"{results.get('seconds', 0):.0f} s"
        + (", toy sizes: no figure counts" if results["tiny"] else "")
    ]
    for name, part in results["parts"].items():
        lines.append(f"\n{name}: {part['status']} {part.get('error') or ''}".rstrip())
        tables: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for row in part.get("rows", []):
            tables.setdefault(tuple(row), []).append(row)
        for columns, rows in tables.items():
            cells = [list(columns), *([shown(row[c]) for c in columns] for row in rows)]
            widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
            lines += [
                "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
                for row in cells
            ]
    return "\n".join(lines)


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else str(value)


if __name__ == "__main__":
    main()
