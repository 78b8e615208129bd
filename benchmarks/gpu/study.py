"""Runs studies on a GPU, many cells at a time, and packs what is done.

    python benchmarks/gpu/study.py --seconds 420                  # run, then pack into --out
    python benchmarks/gpu/study.py --pack-only --out FOLDER       # at any time, also beside the run

A cell of a small network uses a small part of a GPU: with NVIDIA's MPS, which is started where it
is installed, a dozen processes train six times as fast as one. It needs no install step, as run.py:
the wheels and faces are those of `.gpu/`, copied to ``--work`` first. The next run goes on: unpack
``cells.tar.xz`` into ``--work/cells`` before.

``cells.tar.xz`` holds the results, ``embeddings.tar`` the test people's embeddings of as many cells
as fit, the first seeds first.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu.run import CARRIED, ROOT, python_path

QUEUE = [
    ROOT / "configs" / "study" / f"{name}.yaml"
    for name in ("claim", "one-threshold", "confirmation")
]
"""Those of which cells are missing, the most valuable first."""
ROOM = 15_500_000
"""Bytes of embeddings."""
KEPT = ("cell.json", "failed.txt")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--study", type=Path, nargs="+", default=QUEUE, help="in this order")
    parser.add_argument("--seconds", type=float, default=420, help="after which no cell starts")
    parser.add_argument("--jobs", type=int, default=12)
    parser.add_argument("--work", type=Path, default=Path("/tmp/study"))
    parser.add_argument("--data", type=Path, default=CARRIED / "faces")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--mps", type=Path, default=Path("/tmp/mps"), help="pipes of the daemon")
    parser.add_argument("--pack-only", action="store_true")
    arguments = parser.parse_args()
    cells = arguments.work / "cells"
    status = 0
    if not arguments.pack_only:
        cells.mkdir(parents=True, exist_ok=True)
        status = run(arguments, cells)
    arguments.out.mkdir(parents=True, exist_ok=True)
    pack(cells, arguments.out)
    sys.exit(status)


def run(arguments: argparse.Namespace, cells: Path) -> int:
    """Run the studies; 0 if none failed. What they say goes to ``study.log`` in the work folder."""
    work: Path = arguments.work
    data = shutil.copytree(arguments.data, work / "faces", dirs_exist_ok=True)
    with (work / "study.log").open("a") as log:
        environment = {**os.environ, "SPHEREFACE2_DATA": str(data), "COLUMNS": "200"}
        environment["PYTHONPATH"] = python_path(work, log)
        if shutil.which("nvidia-cuda-mps-control"):
            environment |= {
                "CUDA_MPS_PIPE_DIRECTORY": str(arguments.mps),
                "CUDA_MPS_LOG_DIRECTORY": str(arguments.mps),
                "CUDA_MPS_CLIENT_PRIORITY": "1",  # below what else there is
            }
            arguments.mps.mkdir(exist_ok=True)
            # Fails where one runs already, which will do.
            subprocess.run(["nvidia-cuda-mps-control", "-d"], env=environment, stdout=log)
        command = [sys.executable, "-m", "sphereface2", "study", "run"]
        command += ["--cells", str(cells), "--jobs", str(arguments.jobs)]
        until, status = time.monotonic() + arguments.seconds, 0
        for study in arguments.study:
            left = max(0.0, until - time.monotonic())
            words = [*command, "--seconds", f"{left:.0f}", str(study)]
            status |= subprocess.run(words, env=environment, stdout=log, stderr=log).returncode
        return status


def pack(cells: Path, out: Path) -> None:
    """Pack the results of finished and failed cells, whole files only."""
    done = sorted(path.parent for path in cells.glob("*/cell.json"))
    # Fast rather than small, and by renaming: whoever packs may be at the end of borrowed time.
    with tarfile.open(out / "cells.part", "w:xz", preset=1) as archive:
        for name in KEPT:
            for path in sorted(cells.glob(f"*/{name}")):
                archive.add(path, path.relative_to(cells))
        if (cells / "sets").is_dir():
            archive.add(cells / "sets", "sets")
        for path in cells.parent.glob("study.log"):
            archive.add(path, path.name)
    (out / "cells.part").rename(out / "cells.tar.xz")
    seeds = {}
    for folder in done:
        result = json.loads((folder / "cell.json").read_text())
        # One of the grid, not a trial alone, nor one that came from cells.tar.xz.
        if result["pairs"] and (folder / "test.npy").exists():
            noise = result["config"]["data"]["label_noise"]["share"]
            seeds[folder] = noise, result["config"]["seed"]
    left = ROOM
    with tarfile.open(out / "embeddings.tar", "w") as archive:
        for folder in sorted(seeds, key=seeds.__getitem__):
            content = (folder / "test.npy").read_bytes()
            left -= len(content) + 1024
            if left < 0:
                break
            information = tarfile.TarInfo(f"{folder.name}/test.npy")
            information.size = len(content)
            archive.addfile(information, io.BytesIO(content))
    print(f"{len(done)} cells packed, the embeddings of {len(seeds)} as far as they fit")


if __name__ == "__main__":
    main()
